"""How transformers' own loader is told about an adapter's keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from trimtab.as_peft.constants import prefix_of
from trimtab.files.codec import ON_DISK

__all__ = [
    "build_peft_weight_mapping",
    "convert_peft_adapter_state_dict_for_transformers",
    "convert_peft_config_for_transformers",
]


def build_peft_weight_mapping(
    weight_conversions: list[Any] | None, adapter_name: str, peft_config: Any = None
) -> list[Any]:
    """The renamings that turn an adapter file's keys into those of a model with the adapter injected."""
    if not weight_conversions:
        return []
    from transformers.core_model_loading import WeightRenaming

    kind = str(getattr(getattr(peft_config, "peft_type", None), "value", "LORA"))
    start = prefix_of(kind)
    renamings = [WeightRenaming("base_model.model.model.", "model."), WeightRenaming("base_model.model.", "")]
    whole = [(t, d) for t, d in ON_DISK.items() if d.startswith(start)]
    for template, disk in whole:  # leaves whose name on disk is not just their name without the adapter
        renamings.append(WeightRenaming(rf"{disk}$", template.format(adapter_name)))
    others = "".join(rf"(?!{disk}(?:$|\.))" for _, disk in whole)
    renamings.append(WeightRenaming(rf"({others}{start}[^\.]*)", rf"\1.{adapter_name}"))
    if start != prefix_of("TRAINABLE_TOKENS"):
        renamings.append(WeightRenaming(rf"({prefix_of('TRAINABLE_TOKENS')}[^\.]*)", rf"\1.{adapter_name}"))
    return renamings + [c for c in weight_conversions if isinstance(c, WeightRenaming)]


def convert_peft_config_for_transformers(peft_config: Any, model: nn.Module, conversions: list[Any] | None) -> None:
    """Nothing to do: configs are completed when the adapter is added."""


def convert_peft_adapter_state_dict_for_transformers(
    model: nn.Module, peft_config: Any, adapter_state_dict: Mapping[str, Tensor], adapter_name: str = "default"
) -> dict[str, Tensor]:
    """The same tensors: the codec reads every layout."""
    return dict(adapter_state_dict)
