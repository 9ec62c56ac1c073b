"""How transformers' own loader is told about an adapter's keys."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.as_peft.constants import prefix_of
from trimtab.core.targets import matches
from trimtab.files.codec import ON_DISK

LAZY = ("FlattenDims", "PeftConcatenate", "PermuteDims")

__all__ = [
    *LAZY,
    "build_peft_weight_mapping",
    "convert_peft_adapter_state_dict_for_transformers",
    "convert_peft_config_for_transformers",
]


def __getattr__(name: str) -> Any:
    if name in LAZY:
        return _steps()[name]
    raise AttributeError(name)


@cache
def _steps() -> dict[str, type]:
    """The steps that peft has beside transformers' own, which are classes of it."""
    from transformers.core_model_loading import Concatenate, ConversionOps

    class Step(ConversionOps):
        """A change of each tensor by itself, {name: tensor}."""

        def of(self, tensor: Tensor) -> Tensor:
            raise NotImplementedError

        def convert(
            self, input_dict: Any, source_patterns: Any, target_patterns: Any, config: Any = None, **kwargs: Any
        ) -> Any:
            return {name: self.of(tensor) for name, tensor in input_dict.items()}

        @property
        def reverse_op(self) -> Any:
            raise NotImplementedError(f"{type(self).__name__} cannot be reversed.")

    class FlattenDims(Step):
        """Tensors with some neighbouring axes as one.

        Args:
            dims: the first and the last of them; one number: from it to the end.
        """

        def __init__(self, dims: int | tuple[int, ...]) -> None:
            self.dims = dims

        def of(self, tensor: Tensor) -> Tensor:
            return tensor.flatten(*((self.dims,) if isinstance(self.dims, int) else self.dims))

    class PermuteDims(Step):
        """Tensors with their axes in another order."""

        def __init__(self, dims: tuple[int, ...]) -> None:
            self.dims = dims

        def of(self, tensor: Tensor) -> Tensor:
            return tensor.permute(self.dims)

    class PeftConcatenate(Concatenate):
        """B of layers (experts, out, r) or (out, r) that have become one: block-diagonal, experts the fastest axis."""

        def convert(
            self, input_dict: Any, source_patterns: Any, target_patterns: Any, full_layer_name: str = "", **kwargs: Any
        ) -> Any:
            linears = list(input_dict.values())
            if linears[0].ndim == 2:
                return {full_layer_name: torch.block_diag(*linears)}
            return {full_layer_name: stacked(zip(*linears))}

        reverse_op = Step.reverse_op

    return {step.__name__: step for step in (FlattenDims, PermuteDims, PeftConcatenate)}


def stacked(experts: Iterable[Sequence[Tensor]]) -> Tensor:
    """B (out of all, r of all · experts) of each expert's (out, r) of several layers, as the codec has it."""
    return torch.stack([torch.block_diag(*linears) for linears in experts], -1).flatten(1)


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
    own = [c for c in weight_conversions if isinstance(c, WeightRenaming)]
    return renamings + own + _stackings(weight_conversions, adapter_name, peft_config)


def _stackings(weight_conversions: list[Any], adapter_name: str, config: Any) -> list[Any]:
    """For each conversion that makes a parameter of experts' Linears: the same of the pairs they were adapted with."""
    from transformers.core_model_loading import WeightConverter

    wanted, found = getattr(config, "target_modules", None), []
    for conversion in weight_conversions:
        steps = [type(step).__name__ for step in getattr(conversion, "operations", ())]
        linears = [pattern.replace("\\", "").split(".")[-2] for pattern in conversion.source_patterns]
        if steps in (["MergeModulelist"], ["MergeModulelist", "Concatenate"]) and _names(wanted, linears):
            found.append(conversion)
    stackings = []
    for conversion in found:
        place, _, parameter = conversion.target_patterns[0].rpartition(".")
        # PEFT nests a module's parameters in their order, the first innermost: the last is what goes down again.
        beside = any(c is not conversion and c.target_patterns[0].startswith(f"{place}.") for c in found)
        depth = "base_layer." if beside and parameter != "down_proj" else ""
        for factor in "AB":
            end = f"lora_{factor}.{adapter_name}.weight"
            sources = [pattern.removesuffix("weight") + end for pattern in conversion.source_patterns]
            stackings.append(WeightConverter(sources, f"{place}.{depth}{end}", [_stack()(factor)]))
    return stackings


def _names(wanted: Any, linears: list[str]) -> bool:
    """Whether targets name all these Linears of an expert."""
    if isinstance(wanted, str) and wanted.lower() == "all-linear":
        return True
    forms = [f"model.layers.0.mlp.experts.0.{linear}" for linear in linears]
    names = wanted if isinstance(wanted, str) else {str(name).rpartition(".")[2] for name in wanted or ()}
    return all(matches(names, form) is not None for form in forms)


@cache
def _stack() -> type:
    """The step that makes the factor of a parameter out of those of its experts' Linears, as `files.experts` does."""
    from transformers.core_model_loading import ConversionOps

    class Stack(ConversionOps):
        def __init__(self, factor: str) -> None:
            self.factor = factor

        def convert(self, input_dict: Any, source_patterns: Any, target_patterns: Any, **kwargs: Any) -> Any:
            experts = zip(*(input_dict[pattern] for pattern in source_patterns))
            if self.factor == "A":
                return {target_patterns[0]: torch.cat([torch.cat(linears) for linears in experts])}
            return {target_patterns[0]: stacked(experts)}

    return Stack


def convert_peft_config_for_transformers(peft_config: Any, model: nn.Module, conversions: list[Any] | None) -> None:
    """Nothing to do: configs are completed when the adapter is added."""


def convert_peft_adapter_state_dict_for_transformers(
    model: nn.Module, peft_config: Any, adapter_state_dict: Mapping[str, Tensor], adapter_name: str = "default"
) -> dict[str, Tensor]:
    """The same tensors: the codec reads every layout."""
    return dict(adapter_state_dict)
