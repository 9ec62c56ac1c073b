"""When a fused step applies, and what numbers it computes in: questions that all of them ask."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def recorded() -> bool:
    """Whether operations are recorded or transformed by something that cannot see into an autograd function.

    Compilers, tracers, `torch.func` and forward-mode derivatives: these are given single operations.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return True
    return torch._C._get_tracing_state() is not None or forward_ad._current_level >= 0


def ordinary(t: Tensor) -> bool:
    """Whether a tensor is of no subclass that has ideas of its own (quantised, sharded)."""
    return type(t) is Tensor or type(t) is torch.nn.Parameter


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on where x is."""
    return torch.is_autocast_enabled(x.device.type)


def product_dtype(x: Tensor) -> torch.dtype:
    """The number format the base product has."""
    cast = autocasts(x) and x.is_floating_point() and x.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if cast else x.dtype
