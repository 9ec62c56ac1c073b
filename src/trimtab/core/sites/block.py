"""Whole blocks: an attention, a feed-forward part, a layer of a transformer. They have no matrix but hidden states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.site import Arguments, LinearSite, Site, site_class
from trimtab.errors import ConfigError, RouteError

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


class BlockSite(Site):
    """A module of several layers: what adapters edit is its input and its output (the first of several).

    Its widths are those of the first linear layer inside and of the last one.
    """

    kind = "block"
    weighs, bias_param = "", ""
    whole = True

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        """Any module with others inside that are called as one."""
        return bool(layer._modules) and not isinstance(layer, CONTAINERS)

    def shape(self) -> tuple[int, int]:
        """(out, in) of the hidden states."""
        inside = [(n, m) for n, m in self.layer.named_modules() if m is not self.layer]
        linear = [c(Stand(m), n) for n, m in inside if (c := site_class(m)) and issubclass(c, LinearSite)]
        if not linear:
            raise ConfigError(f"'{self.name}' has no linear layer inside that would tell how wide its output is.")
        return linear[-1].fan_out, linear[0].fan_in

    def stored(self, param: str) -> Tensor | None:
        """A parameter that tells the number format and the device: the first that is of floating point."""
        return next((p for p in self.layer.parameters() if p.is_floating_point()), None)

    @property
    def dtype(self) -> torch.dtype:
        """The number format of its hidden states."""
        own = self.stored("")
        return torch.get_default_dtype() if own is None else own.dtype

    def bias(self) -> None:
        """It has none."""

    def rows(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, torch.device]:
        """The rows of its hidden states."""
        x = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(x, Tensor) or x.ndim < 2:
            raise RouteError(f"'{self.name}' is called without hidden states: its rows cannot be told.")
        return x.shape[0], x.device

    def cut(self, args: tuple[Any, ...], kwargs: dict[str, Any], rows: Tensor) -> Arguments:
        """These rows of every tensor that has as many, in tuples too."""
        count = self.rows(args, kwargs)[0]

        def part(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(part(v) for v in value)
            if not isinstance(value, Tensor) or not value.ndim or value.shape[0] != count:
                if hasattr(value, "get_seq_length"):
                    raise RouteError(f"'{self.name}' is given a cache, whose rows cannot be cut: pass use_cache=False.")
                return value
            return value.index_select(0, rows)

        return tuple(part(a) for a in args), {k: part(v) for k, v in kwargs.items()}

    def join(self, parts: Any, order: Tensor) -> Any:
        """Outputs of groups of rows as one."""
        if isinstance(parts[0], tuple):
            return tuple(self.join(column, order) for column in zip(*parts, strict=True))
        return torch.cat(list(parts)).index_select(0, order) if isinstance(parts[0], Tensor) else parts[0]


class Stand:
    """What a site asks of the layer that stands around a frozen one, where there is none."""

    def __init__(self, layer: nn.Module) -> None:
        self.frozen = self.base_layer = layer
