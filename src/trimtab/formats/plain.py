"""Plain numbers: the format every other one is told apart from, and what all of them share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trimtab.errors import ReadOnlyWeight

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_LIBRARIES: dict[type, frozenset[str]] = {}  # a class -> where it and the classes below it come from


def made_by(library: str, *things: Any) -> bool:
    """Whether the class of one of these objects, or a class below it, comes from a library."""
    for cls in map(type, things):
        if cls not in _LIBRARIES:  # looked up once: a compiled forward comes by here
            _LIBRARIES[cls] = frozenset(c.__module__.partition(".")[0] for c in cls.__mro__)
        if library in _LIBRARIES[cls]:
            return True
    return False


def read_only(layer: nn.Module, weight: Tensor | None, why: str = "is read, not written") -> ReadOnlyWeight:
    """The error that names the class and the ways out."""
    kind = f"{type(layer).__module__}.{type(layer).__name__}"
    if weight is not None and type(weight) not in (Tensor, nn.Parameter):
        kind += f" ({type(weight).__name__})"
    return ReadOnlyWeight(
        f"The number format of a {kind} {why}. Either keep the adapter unmerged (save it and load it onto the "
        "same base), or merge it into plain numbers: call trimtab.dequantize(model) first, or load the adapter onto "
        "the original base in full precision."
    )


def device(layer: nn.Module, weight: Tensor | None) -> torch.device:
    """Where a weight lives, or the layer where it has none of that name."""
    if weight is not None:
        return weight.device
    tensors = (t for t in (*layer.parameters(), *layer.buffers()))
    return next((t.device for t in tensors), torch.device("cpu"))


class Format:
    """Plain numbers, and what every other format does unless it says otherwise."""

    def fits(self, layer: nn.Module, weight: Any) -> bool:
        """Whether this parameter of the layer is of this format."""
        return True

    def shape(self, layer: nn.Module, weight: Any) -> tuple[int, ...]:
        """The parameter's shape in plain numbers."""
        return tuple(weight.shape)

    def read(self, layer: nn.Module, weight: Any) -> Tensor:
        """The plain numbers, detached."""
        numbers: Tensor = weight.detach()
        return numbers

    def make(self, layer: nn.Module, old: Any, value: Tensor) -> nn.Parameter:
        """A new parameter that holds `value` as `old` held its own.

        Raises:
            ReadOnlyWeight: this format cannot be written.
        """
        return nn.Parameter(value.to(device=old.device, dtype=old.dtype), requires_grad=old.requires_grad)

    def dtype(self, layer: nn.Module, weight: Any) -> torch.dtype | None:
        """What the layer computes in; None: in whatever its input is."""
        found: torch.dtype = weight.dtype
        return found

    def leave(self, layer: Any, weight: Any) -> None:
        """Before a parameter is taken out: give it what the layer keeps of it."""

    def enter(self, layer: Any, weight: Any) -> None:
        """After a parameter was put in: give the layer what it keeps of it."""
