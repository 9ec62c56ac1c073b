"""Tensor subclasses: torchao's, and what else can say its plain numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from trimtab.formats.plain import Format, read_only


def _int8_tensor(old: Any, value: Tensor) -> Tensor:
    from torchao.quantization import PerGroup, PerRow, PerTensor
    from torchao.quantization.quant_primitives import MappingType

    block, shape = tuple(old.block_size), tuple(old.shape)
    per = PerTensor() if block == shape else PerRow() if block[-1] == shape[-1] else PerGroup(block[-1])
    shifted = old.zero_point is not None and bool((old.zero_point != 0).any())
    new: Tensor = type(old).from_hp(
        value,
        per,
        MappingType.ASYMMETRIC if shifted else MappingType.SYMMETRIC,
        act_quant_kwargs=old.act_quant_kwargs,
        act_quant_scale=old.act_quant_scale,
        act_quant_zero_point=old.act_quant_zero_point,
        reduce_range=old.reduce_range,
    )
    return new


def _intx_tensor(old: Any, value: Tensor) -> Tensor:
    from torchao.quantization.quant_primitives import MappingType

    new: Tensor = type(old).from_hp(
        value,
        tuple(old.block_size),
        old.target_dtype,
        mapping_type=MappingType.ASYMMETRIC if bool((old.zero_point != 0).any()) else MappingType.SYMMETRIC,
        activation_quantization=old.activation_quantization,
    )
    return new


class Subclass(Format):
    """A tensor subclass that can say its plain numbers (`dequantize`): torchao's, optimum-quanto's.

    `writers` has one line a class that can also be written.
    """

    writers: Mapping[str, Callable[[Any, Tensor], Tensor]] = {
        "Int8Tensor": _int8_tensor,
        "IntxUnpackedToInt8Tensor": _intx_tensor,
    }

    def fits(self, layer: nn.Module, weight: Any) -> bool:
        return type(weight) is not nn.Parameter and type(weight).dequantize is not Tensor.dequantize

    def read(self, layer: nn.Module, weight: Any) -> Tensor:
        if getattr(weight, "act_pre_scale", None) is not None:
            raise read_only(layer, weight, "scales its input as well, so its numbers are not its weight")
        numbers: Tensor = weight.detach().dequantize()
        return numbers

    def make(self, layer: nn.Module, old: Any, value: Tensor) -> nn.Parameter:
        writer = self.writers.get(type(old).__name__)
        if writer is None:
            raise read_only(layer, old)
        return nn.Parameter(writer(old, value.to(device=old.device, dtype=old.dtype)), requires_grad=False)
