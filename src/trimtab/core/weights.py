"""Number formats: how to read the weight of a layer as plain numbers, and how to write it back."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def shape(layer: nn.Module, param: str) -> tuple[int, int]:
    """The two-dimensional shape of a parameter as stored."""
    weight = getattr(layer, param)
    return int(weight.shape[0]), int(weight[0].numel())


def read(layer: nn.Module, weight: Tensor | None) -> Tensor:
    """The parameter as a plain floating-point tensor, detached."""
    assert weight is not None
    return weight.detach()


def write(layer: nn.Module, param: str, value: Tensor) -> None:
    """Give the layer a new parameter object holding `value` in the old one's number format."""
    old = getattr(layer, param)
    new = value.detach().to(device=old.device, dtype=old.dtype)
    layer._parameters[param] = nn.Parameter(new, requires_grad=old.requires_grad)


def compute_dtype(layer: nn.Module, param: str) -> torch.dtype:
    """The number format the layer computes in."""
    dtype: torch.dtype = getattr(layer, param).dtype
    return dtype
