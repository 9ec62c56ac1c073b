"""Adapters for the tests of rank/: on disk, every tensor random, with layers of every kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import trimtab
from tests.models import toy
from trimtab.rank.changes import changes

LAYERS = ["embed", "scaled", "up", "down", "head", "conv"]


def stirred(adapted: Any, seed: int = 3, size: float = 0.5) -> Any:
    """The model with every tensor of its adapter moved."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=draw).to(parameter.dtype), alpha=size)
    return adapted.eval()


def lora(base: Any = None, **fields: Any) -> Any:
    """The toy (or `base`) with a random LoRA."""
    config = trimtab.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": LAYERS, **fields})
    return stirred(trimtab.get_peft_model(toy() if base is None else base, config))


def saved(folder: Path, adapted: Any = None, **fields: Any) -> Path:
    """The folder of a random LoRA (or of the adapter of a model)."""
    (lora(**fields) if adapted is None else adapted).save_pretrained(folder, save_embedding_layers=False)
    return folder


@torch.no_grad()
def dense(adapted: Any, name: str = "default") -> dict[str, Tensor]:
    """{layer: dW in full} of an adapter, by the methods' formulas."""
    return {change.path: change.delta() for change in changes(adapted, name)}


def loaded(folder: Path, base: Any = None) -> Any:
    """The toy (or `base`) with the adapter of a folder, strictly."""
    return trimtab.PeftModel.from_pretrained(toy() if base is None else base, folder)
