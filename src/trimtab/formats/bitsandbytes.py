"""bitsandbytes: NF4, FP4 and LLM.int8().

On processors with AVX512-BF16 its 4-bit layers repack their weight at the first forward in evaluation mode. From then
on their product has no gradient, in training mode neither, and their scales are rounded to bf16 for good. `pin` keeps
a layer from it as long as an adapter may need its gradient.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.formats.plain import Format, made_by

REPACKS = "support_avx512bf16_for_cpu"  # the attribute of a Linear4bit
PINS = "_trimtab_pins"  # how many models' adapters keep a layer from repacking


def repacked(state: Any) -> bool:
    """Whether the scales are those of a repacked weight."""
    return getattr(state, "packing_format_for_cpu", False)


def unpacked(packed: Tensor, state: Any) -> tuple[Tensor, Any]:
    """A repacked weight as it was, and its scales, which are bf16 numbers now; those given stay as they are."""
    from bitsandbytes import functional as F

    back = copy.copy(state)
    back.original_nested = False  # quantised again, the scales would be rounded again
    packed, back = F._convert_weight_packed_for_cpu_inverse(packed, back)
    back.absmax = state.absmax.T.reshape(-1).float()  # which the library's way back leaves transposed
    return packed, back


def pin(layer: Any) -> None:
    """Keep a layer from repacking its weight, which is unpacked, until it is unpinned as often."""
    own = layer.__dict__
    if REPACKS not in own:
        return
    if own[REPACKS]:
        own[REPACKS], own[PINS] = False, 0
    if PINS in own:
        own[PINS] += 1
    weight = layer.weight
    if repacked(state := Bnb4bit.state(layer, weight)):
        weight.data, state = unpacked(weight.data, state)
        layer.quant_state = weight.quant_state = state


def unpin(layer: Any) -> None:
    """Take back one pin; without any, the layer does as its library has it."""
    own = layer.__dict__
    if PINS not in own:
        return
    own[PINS] -= 1
    if not own[PINS]:
        del own[PINS]
        own[REPACKS] = True


class Bnb4bit(Format):
    """bitsandbytes' NF4 and FP4: packed pairs of values and a `quant_state`."""

    @staticmethod
    def state(layer: Any, weight: Any) -> Any:
        """The scales: on the parameter, or on the layer where an engine (FSDP) has made the parameter a plain one."""
        return getattr(weight, "quant_state", None) or getattr(layer, "quant_state", None)

    def fits(self, layer: nn.Module, weight: Any) -> bool:
        return made_by("bitsandbytes", layer, weight) and weight.ndim == 2 and self.state(layer, weight) is not None

    def shape(self, layer: nn.Module, weight: Any) -> tuple[int, ...]:
        return tuple(self.state(layer, weight).shape)

    def read(self, layer: nn.Module, weight: Any) -> Tensor:
        from bitsandbytes import functional as F

        packed, state = weight.detach().data, self.state(layer, weight)
        if repacked(state):
            packed, state = unpacked(packed, state)
        numbers: Tensor = F.dequantize_4bit(packed, state)
        return numbers

    def make(self, layer: nn.Module, old: Any, value: Tensor) -> nn.Parameter:
        from bitsandbytes.nn import Params4bit

        state = self.state(layer, old)
        new = Params4bit(
            value.float().cpu(),  # older versions quantise on the way from the CPU only
            requires_grad=False,
            blocksize=state.blocksize,
            compress_statistics=getattr(old, "compress_statistics", state.nested),
            quant_type=state.quant_type,
            quant_storage=getattr(old, "quant_storage", old.dtype),
        ).to(old.device)
        new.quant_state.dtype = state.dtype
        return new

    def dtype(self, layer: nn.Module, weight: Any) -> torch.dtype | None:
        return getattr(layer, "compute_dtype", None)

    def enter(self, layer: Any, weight: Any) -> None:
        if hasattr(layer, "quant_state"):
            layer.quant_state = self.state(layer, weight)
            weight.module = layer


class Bnb8bit(Format):
    """bitsandbytes' LLM.int8(): whole numbers and a scale a row, which the first forward moves to `layer.state`."""

    def fits(self, layer: nn.Module, weight: Any) -> bool:
        return weight.dtype == torch.int8 and made_by("bitsandbytes", layer, weight)

    def read(self, layer: Any, weight: Any) -> Tensor:
        scale = getattr(weight, "SCB", None)
        if scale is None:
            scale = layer.state.SCB
        return weight.detach().data.float() * (scale.detach().float() / 127)[:, None]

    def make(self, layer: nn.Module, old: Any, value: Tensor) -> nn.Parameter:
        from bitsandbytes.nn import Int8Params

        return Int8Params(value.cpu(), requires_grad=False, has_fp16_weights=False).to(old.device)

    def dtype(self, layer: nn.Module, weight: Any) -> torch.dtype | None:
        return None

    def leave(self, layer: Any, weight: Any) -> None:
        state = getattr(layer, "state", None)
        if state is not None and state.SCB is not None:
            weight.CB, weight.SCB = weight.data, state.SCB
            state.CB = state.SCB = None

    def enter(self, layer: Any, weight: Any) -> None:
        state = getattr(layer, "state", None)
        if state is not None:  # the next forward takes CB and SCB from the parameter again
            state.CB = state.SCB = None


class BnbUnpacked(Format):
    """A bitsandbytes layer that keeps its weight in floating point (`has_fp16_weights`) or is not quantised yet."""

    def fits(self, layer: nn.Module, weight: Any) -> bool:
        return type(weight) is not nn.Parameter and made_by("bitsandbytes", weight)

    def make(self, layer: nn.Module, old: Any, value: Tensor) -> nn.Parameter:
        new = copy.copy(old) if type(old).__name__ == "Params4bit" else copy.deepcopy(old)
        new.data = value.to(device=old.device, dtype=old.dtype)
        parameter: nn.Parameter = new
        return parameter
