"""A null adapter: random B·A of the same Frobenius norm as another adapter's delta, layer by layer.

What it does to a model, any change of that size does. A figure of the real adapter means something beside its figure.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import ConfigError, PeftError
from trimtab.files.codec import PREFIX
from trimtab.files.factors import read_factors
from trimtab.methods.lora import LoraConfig
from trimtab.shell.state import get_peft_model_state_dict, set_peft_model_state_dict


@dataclass(frozen=True)
class Delta:
    """How much an adapter changes one weight."""

    norm: float  # Frobenius
    rank: int  # of the null adapter's pair


def delta_norms(model: Any, adapter: str) -> dict[str, Delta]:
    """{path of a layer: the norm of its dW}.

    Of a plain LoRA by its factors; of any other method by merging it, which is undone bit by bit.

    Raises:
        PeftError: the method changes no weight (a prompt), or the base's number format cannot be written.
    """
    config = model.peft_config[adapter]
    raw = config.to_json()
    if raw["peft_type"] == "LORA" and not raw.get("use_dora"):
        tensors = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
        factors, _ = read_factors(raw, tensors)
        return {path: Delta(f.norm(), f.rank) for path, f in factors.items()}
    if config.is_prompt_learning:
        raise ConfigError(f"{raw['peft_type']} changes no weight: there is no null adapter of the same norm.")
    return _by_merging(model, adapter)


def _by_merging(model: Any, adapter: str) -> dict[str, Delta]:
    layers = {path: _matrix(model, path) for path in model.base_model.targeted_module_names}
    before = {path: w.detach().to("cpu", torch.float64, copy=True) for path, w in layers.items() if w is not None}
    model.merge_adapter([adapter])
    try:
        after = {path: _matrix(model, path) for path in before}
        return {
            path: Delta(float((w.detach().to("cpu", torch.float64) - before[path]).norm()), min(8, *w.shape[:2]))
            for path, w in after.items()
            if w is not None
        }
    finally:
        model.unmerge_adapter()


def _matrix(model: Any, path: str) -> Tensor | None:
    """The weight of the base's layer, where it is one that a pair of factors can change."""
    try:
        layer = model.get_base_model().get_submodule(path)
    except AttributeError:  # a parameter without a layer of its own: experts
        return None
    weight = getattr(getattr(layer, "base_layer", layer), "weight", None)
    return weight if isinstance(weight, Tensor) and weight.ndim >= 2 else None


def add_null_adapter(
    model: Any, adapter: str, name: str = "null", seed: int = 0, norms: dict[str, Delta] | None = None
) -> dict[str, Delta]:
    """Add a null adapter of `adapter` to the model; it is loaded, not active.

    Returns:
        The norms it has, which are those of the adapter; layers that no pair of factors can change are left out.

    Raises:
        PeftError: there is none of this adapter; the message says why.
    """
    norms = delta_norms(model, adapter) if norms is None else norms
    modules = {p: d for p, d in norms.items() if math.isfinite(d.norm) and _matrix(model, p) is not None}
    if not modules:
        raise PeftError(f"The adapter '{adapter}' changes no layer that a pair of factors could change.")
    r = max(d.rank for d in modules.values())
    # Patterns are matched from the end of a path: an escaped whole path fits itself alone.
    ranks = {re.escape(path): d.rank for path, d in modules.items() if d.rank != r}
    config = LoraConfig(r=r, lora_alpha=r, target_modules=list(modules), rank_pattern=ranks,
                        alpha_pattern=dict(ranks), init_lora_weights=False, inference_mode=True)  # fmt: skip
    model.add_adapter(name, config)
    start = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    draw = torch.Generator().manual_seed(seed)
    tensors = {key: torch.randn(t.shape, generator=draw) for key, t in start.items()}
    factors, _ = read_factors(model.peft_config[name].to_json(), tensors)
    for path, f in factors.items():
        key = PREFIX + path + (".lora_B.weight" if PREFIX + path + ".lora_B.weight" in tensors else ".lora_embedding_B")
        tensors[key] *= modules[path].norm / f.norm()
    set_peft_model_state_dict(model, tensors, adapter_name=name)
    return modules
