"""Modules adapted as a whole: a method surrounds their call (`Method.around`), whatever is inside."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.site import Site
from trimtab.errors import RouteError


class ModuleSite(Site):
    """A module that is no layer of a kind of its own: an attention, a block. It has no matrix."""

    kind = "module"
    fused, whole = False, True
    param = ""

    def __init__(self, owner: Any, name: str, param: str = "") -> None:
        self.owner, self.name = owner, name
        self.fan_in = self.fan_out = 0

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        """Anything with modules inside; only methods of such modules see it."""
        return next(layer.children(), None) is not None

    @property
    def params(self) -> tuple[str, ...]:
        """None: its adapters change no parameter."""
        return ()

    def stored(self, param: str) -> Tensor | None:
        """The first parameter inside: of the number format, and where, adapters are made."""
        return next((p for p in self.layer.parameters() if p.is_floating_point()), None)

    @property
    def dtype(self) -> torch.dtype:
        """The number format of what is inside."""
        first = self.stored("")
        return torch.get_default_dtype() if first is None else first.dtype

    @property
    def device(self) -> torch.device:
        """Where the first parameter inside is."""
        first = self.stored("")
        return torch.device("cpu") if first is None else first.device

    def rows(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, torch.device]:
        """Its arguments are its own: which axes are rows is not known."""
        raise RouteError(f"'{self.name}' is adapted as a whole module: it has no place in a mixed batch.")
