"""Adapters' files combined into one: as `add_weighted_adapter` does, without the base model.

What a low-rank adapter adds to is not needed to add such adapters up. Layers of the shapes that their factors have,
which hold no numbers, stand in its place; the rest is what a loaded model does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trimtab.core.combining import TYPES
from trimtab.core.config import PeftConfig
from trimtab.errors import ConfigError, ExportError
from trimtab.files.codec import PREFIX
from trimtab.files.factors import ENDINGS
from trimtab.files.store import load_shapes
from trimtab.shell.peft_model import PeftModel

__all__ = ["Combined", "combine_adapters"]

BESIDE = (".lora_magnitude_vector", ".lora_B.bias")  # tensors of a layer that has factors, too


@dataclass(frozen=True)
class Combined:
    """What was combined into what.

    Attributes:
        adapters: {folder: weight}.
        ranks: the lowest and the highest rank of the result's layers.
        parameters: numbers in its file.
    """

    output: str
    adapters: dict[str, float]
    mode: str
    layers: int
    ranks: tuple[int, int]
    parameters: int


def combine_adapters(
    adapters: Sequence[str],
    output: str | Path,
    weights: Sequence[float] | None = None,
    mode: str = "cat",
    rank: int | None = None,
    density: float | None = None,
    sign: str = "total",
    base: Any = None,
    overwrite: bool = False,
) -> Combined:
    """Combine the adapters in folders, and save the result as an adapter: whole, or not at all.

    Args:
        weights: one an adapter, 1 by default; a negative one subtracts, and one adapter alone is scaled.
        mode: a `combination_type` of `add_weighted_adapter`; "cat" is the exact sum.
        rank: what SVDs are cut to; by default the largest of the adapters'.
        density: the share of entries that pruning keeps.
        sign: how TIES elects signs: "total" or "frequency".
        base: the model they are for, where their files do not say all (whole modules, methods other than LoRA).

    Raises:
        ConfigError: weights or settings that cannot be.
        ExportError: adapters that cannot be combined, or an output that is there.
    """
    weights = [1.0] * len(adapters) if weights is None else [float(w) for w in weights]
    folder = Path(output)
    _check(adapters, weights, mode)
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise ExportError(f"{folder} is there already: --overwrite, or another --output.")
    names = [f"part{i}" for i in range(len(adapters))]
    model: Any = None
    for name, source in zip(names, adapters, strict=True):
        if model is None:
            base = base if base is not None else skeleton(adapters)
            model = PeftModel.from_pretrained(base, source, adapter_name=name)
        else:
            model.load_adapter(source, name)
    settings = {"combination_type": mode, "svd_rank": rank, "density": density, "majority_sign_method": sign}
    try:
        model.add_weighted_adapter(names, weights, "default", **settings)
    except ValueError as error:
        raise ExportError(_told(str(error), dict(zip(names, adapters, strict=True)))) from error
    config = model.peft_config["default"]
    config.base_model_name_or_path = PeftConfig.from_pretrained(adapters[0]).base_model_name_or_path
    model.save_pretrained(folder, selected_adapters=["default"])
    found = [m.r for layer in model.graft.layers.values() for m in layer.methods.get("default", ()) if hasattr(m, "r")]
    shapes = load_shapes(folder)
    return Combined(
        str(folder),
        dict(zip(map(str, adapters), weights, strict=True)),
        mode,
        len(found),
        (min(found, default=0), max(found, default=0)),
        sum(torch.Size(shape).numel() for shape in shapes.values()),
    )


def _check(adapters: Sequence[str], weights: Sequence[float], mode: str) -> None:
    if not adapters:
        raise ConfigError("Name the adapters to combine.")
    if len(weights) != len(adapters):
        raise ConfigError(f"Every adapter needs one weight, but there are {len(adapters)} and {len(weights)}.")
    if mode not in TYPES:
        raise ConfigError(f"There is no mode '{mode}'. Known: {', '.join(TYPES)}.")


def skeleton(adapters: Sequence[str]) -> nn.Module:
    """Modules of the shapes that the adapters' factors have, at their paths; their weights hold no numbers.

    Raises:
        ExportError: tensors that say nothing of their layer's shape.
    """
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    odd: list[str] = []
    for source in adapters:
        for key, shape in load_shapes(source).items():
            end = next((end for pair in ENDINGS for end in pair if key.endswith(end)), None)
            if end is not None:
                part = end.removeprefix(".lora_").removesuffix(".weight")  # A, B, embedding_A, embedding_B
                shapes.setdefault(key.removeprefix(PREFIX).removesuffix(end), {})[part] = shape
            elif not any(beside in key for beside in BESIDE):
                odd.append(key)
    if odd or not shapes:
        few = ", ".join(odd[:3]) + (f" and {len(odd) - 3} more" if len(odd) > 3 else "")
        raise ExportError(
            f"The base model is needed (--model): {few or 'no factors of a LoRA'} in "
            f"{', '.join(map(str, adapters))} says nothing of the layer's shape."
        )
    root = nn.Module()
    for path, parts in shapes.items():
        _place(root, path, _layer(path, parts))
    return root


def _layer(path: str, parts: Mapping[str, tuple[int, ...]]) -> nn.Module:
    """A layer as its factors tell it, over one number that stands for all of its weight's."""
    layer: nn.Module
    if "embedding_A" in parts:
        layer = nn.Embedding(1, 1)
        rows, width = parts["embedding_A"][1], parts["embedding_B"][0]
        layer.num_embeddings, layer.embedding_dim = rows, width
        shape = (rows, width)
    elif {"A", "B"} <= parts.keys() and len(parts["A"]) == 2:
        layer = nn.Linear(1, 1, bias=False)
        shape = (parts["B"][0], parts["A"][1])
        layer.out_features, layer.in_features = shape
    else:
        raise ExportError(f"The base model is needed (--model): '{path}' is no linear layer or embedding.")
    layer.weight = nn.Parameter(torch.zeros(()).expand(shape), requires_grad=False)
    return layer


def _place(root: nn.Module, path: str, layer: nn.Module) -> None:
    parent = root
    *above, name = path.split(".")
    for part in above:
        if part not in parent._modules:
            parent.add_module(part, nn.Module())
        parent = parent._modules[part]  # type: ignore[assignment]
    parent.add_module(name, layer)


def _told(text: str, names: Mapping[str, str]) -> str:
    """A message that calls adapters by their folders."""
    for name, source in names.items():
        text = text.replace(name, str(source))
    return text
