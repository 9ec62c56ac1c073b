"""A trained encoder (all-MiniLM-L6-v2, from a package): adapted to similarity, merged, mixed, saved, loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trimtab import BOFTConfig, LoraConfig, PeftModel, VeraConfig, get_peft_model
from trimtab.files.sources import packaged_minilm

pytestmark = pytest.mark.slow  # the package is downloaded at first

PAIRS = [
    ("the contract ends in May", "the agreement expires in spring"),
    ("a dog runs over the field", "an animal is in the meadow"),
    ("he plays the violin", "she fixed the car"),
    ("interest rates rise", "bread is baked at night"),
]
WANTED = torch.tensor([1.0, 1.0, 0.0, 0.0])
CONFIGS = [
    LoraConfig(r=8, target_modules=["query", "value"], task_type="FEATURE_EXTRACTION"),
    VeraConfig(r=64, target_modules=["query", "value"], task_type="FEATURE_EXTRACTION"),
    BOFTConfig(boft_block_size=8, target_modules=["query", "value"], task_type="FEATURE_EXTRACTION"),
]


@pytest.fixture(scope="module")
def inputs() -> list[Any]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(packaged_minilm())
    return [tokenizer(list(side), return_tensors="pt", padding=True) for side in zip(*PAIRS, strict=True)]


def base() -> Any:
    from transformers import AutoModel

    return AutoModel.from_pretrained(packaged_minilm()).eval()


def similar(model: Any, inputs: list[Any], **more: Any) -> Tensor:
    """Cosines of the pairs (4,)."""
    sides = []
    for side in inputs:
        mask = side["attention_mask"][..., None]
        sides.append((model(**side, **more).last_hidden_state * mask).sum(1) / mask.sum(1))
    return torch.cosine_similarity(*sides)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.peft_type.value)
def test_trained_merged_mixed_saved_loaded(config: Any, inputs: list[Any], tmp_path: Path) -> None:
    plain = similar(base(), inputs)
    assert plain[:2].min() > plain[2:].max(), "the weights are trained ones"
    model = get_peft_model(base(), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(10):
        loss = (similar(model, inputs) - WANTED).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]
    out = similar(model.eval(), inputs)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    torch.testing.assert_close(similar(loaded, inputs), out)
    mixed = similar(loaded, inputs, adapter_names=["default", "__base__", "__base__", "default"])
    torch.testing.assert_close(mixed, torch.stack([out[0], plain[1], plain[2], out[3]]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(similar(loaded.merge_and_unload(), inputs), out, rtol=1e-4, atol=1e-4)
