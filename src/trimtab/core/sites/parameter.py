"""Parameters that a config names because no layer of their own holds them: experts, routers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.site import Arguments, Site
from trimtab.errors import ConfigError, RouteError
from trimtab.formats import weights


class ParameterSite(Site):
    """A parameter W (out, in), or a stack of them (experts, out, in); as it lies, unless its module says otherwise.

    Factors of all experts are kept in one: A has the rows of one expert after another, (experts·r, in); the columns of
    B, (out, r·experts), are the experts' first ones, then their second ones ...
    """

    kind = "parameter"
    bias_param = ""
    fused, whole = False, True

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        """No layer is one by itself."""
        return False

    def __init__(self, owner: Any, name: str, param: str = "") -> None:
        layer = owner.frozen
        self.flipped = bool(getattr(layer, "is_transposed", False))
        weight = layer._parameters[param]
        if weight.ndim not in (2, 3):
            raise ConfigError(f"'{name}' has {weight.ndim} dimensions: parameters of two or three can be adapted.")
        self.batch = tuple(weight.shape[:-2])
        super().__init__(owner, name, param)

    def shape(self) -> tuple[int, int]:
        """(out, in) of each matrix."""
        out, into = self.layer._parameters[self.param].shape[-2:]  # type: ignore[union-attr]
        return (into, out) if self.flipped else (out, into)

    def matrix(self) -> Tensor:
        """The original weight (..., out, in)."""
        W = weights.read(self.layer, self.stored(self.param))
        return W.mT if self.flipped else W

    def apply(self, x: Tensor, M: Tensor) -> Tensor:
        """What goes into a parameter is known to its module only."""
        raise NotImplementedError(f"'{self.name}' is a parameter: an adapter can change it, but not what goes into it.")

    def down(self, r: int) -> tuple[int, ...]:
        """(experts·r, in)."""
        return (math.prod(self.batch) * r, self.fan_in)

    def up(self, r: int) -> tuple[int, ...]:
        """(out, r·experts)."""
        return (self.fan_out, r * math.prod(self.batch))

    def lower(self, A: Tensor) -> Tensor:
        """A (experts·r, in) as (experts, r, in)."""
        return A.unflatten(0, (*self.batch, -1)) if self.batch else A

    def upper(self, B: Tensor) -> Tensor:
        """B (out, r·experts) as (experts, out, r)."""
        return B.unflatten(1, (-1, *self.batch)).movedim(-1, 0) if self.batch else B

    def rows(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, torch.device]:
        """The length that all tensors of the call have in common.

        Raises:
            RouteError: they have none; or a stack of experts is given one tensor alone, in an order only it knows.
        """
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        if len({len(t) for t in tensors}) != 1 or (self.batch and len(tensors) == 1):
            raise RouteError(
                f"The module of '{self.name}' is called with tensors of shapes {[tuple(t.shape) for t in tensors]}: "
                "it cannot be known which of their rows belong to which adapter."
            )
        return len(tensors[0]), tensors[0].device

    def cut(self, args: tuple[Any, ...], kwargs: dict[str, Any], rows: Tensor) -> Arguments:
        """Every tensor of the call with these rows only."""
        some = lambda t: t[rows] if isinstance(t, Tensor) else t
        return tuple(map(some, args)), {k: some(v) for k, v in kwargs.items()}

    def join(self, parts: Any, order: Tensor) -> Any:
        """The outputs, each a tensor or a tuple of tensors, as one."""
        if isinstance(parts[0], tuple):
            return tuple(torch.cat(column)[order] for column in zip(*parts, strict=True))
        return torch.cat(list(parts))[order]
