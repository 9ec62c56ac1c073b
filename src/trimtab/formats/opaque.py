"""Packed layers that only their own library understands: GPTQ, AWQ, HQQ ..."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trimtab.formats.plain import FLOATS, Format, device, made_by, read_only

# (out, in) as the linear layers of quantisation libraries call them, and what such a layer keeps in place of a weight.
SIZES = [("out_features", "in_features"), ("outfeatures", "infeatures")]
PACKED = ("qweight", "W_q", "q_weight", "codes", "weight_packed")


class Opaque(Format):
    """A packed linear layer that only its own library understands (GPTQ, AWQ, HQQ, AQLM, EETQ, torchao's int4 ...).

    It is read as what it makes of the unit vectors, and never written.
    """

    def fits(self, layer: nn.Module, weight: Any) -> bool:
        if not weight.is_floating_point() or made_by("torchao", weight):
            return True
        scaled = any(hasattr(layer, name) for name in ("weight_scale", "weight_scale_inv", "scale_weight"))
        return weight.itemsize == 1 and scaled

    def shape(self, layer: nn.Module, weight: Any) -> tuple[int, ...]:
        for out, into in SIZES:
            if hasattr(layer, out) and hasattr(layer, into):
                return int(getattr(layer, out)), int(getattr(layer, into))
        raise read_only(layer, weight, "has no shape that we know")

    @torch.no_grad()
    def read(self, layer: nn.Module, weight: Any) -> Tensor:
        _, width = self.shape(layer, weight)
        units = torch.eye(width, dtype=self.dtype(layer, weight), device=device(layer, weight))
        bias = getattr(layer, "bias", None)
        try:
            y = layer(units)
        except Exception as e:
            raise read_only(layer, weight, f"cannot be read ({type(e).__name__}: {e})") from e
        numbers: Tensor = y if bias is None else y - bias
        return numbers.mT

    def make(self, layer: nn.Module, old: Any, value: Tensor) -> nn.Parameter:
        raise read_only(layer, old)

    def dtype(self, layer: nn.Module, weight: Any) -> torch.dtype | None:
        tensors = (weight, *layer.parameters(recurse=False), *layer.buffers(recurse=False))
        return next((t.dtype for t in tensors if t is not None and t.dtype in FLOATS), torch.float32)


def packed_linear(layer: nn.Module) -> bool:
    """Whether a layer is a linear one of a quantisation library that does not build on nn.Linear."""
    own = {**layer.__dict__, **layer._parameters, **layer._buffers}  # not what a wrapper passes through
    if not any(out in own and into in own for out, into in SIZES):
        return False
    weight = own.get("weight")
    return any(name in own for name in PACKED) or (isinstance(weight, Tensor) and not weight.is_floating_point())
