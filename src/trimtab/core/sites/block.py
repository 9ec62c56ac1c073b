"""Whole blocks: an attention, a feed-forward part, a layer of a transformer. They have no matrix but hidden states."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.site import Arguments, LinearSite, Site, site_class
from trimtab.errors import ConfigError, RouteError

# Arguments of transformers' blocks that have a row for each of the batch's, where they have as many.
BY_ROW = ("attention_mask", "encoder_attention_mask", "position_ids")
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
        """These rows of every tensor that has as many, in tuples too.

        Raises:
            RouteError: a cache, or a table whose first axis may be rows or tokens, where there are as many of both.
        """
        x: Any = args[0] if args else next(iter(kwargs.values()))
        count, square = len(x), x.ndim == 3 and x.shape[1] == len(x)
        names = inspect.signature(self.layer.forward).parameters if square else ()

        def part(value: Any, name: str = "") -> Any:
            if isinstance(value, tuple):
                return tuple(part(v, name) for v in value)
            if not isinstance(value, Tensor) or not value.ndim or value.shape[0] != count:
                if hasattr(value, "get_seq_length"):
                    raise RouteError(f"'{self.name}' is given a cache, whose rows cannot be cut: pass use_cache=False.")
                return value
            if square and value.ndim < 3 and name not in BY_ROW:
                raise RouteError(
                    f"'{self.name}' is given {name or 'a table'} of shape {list(value.shape)} for {count} rows of "
                    f"{count} tokens: which of them its first axis is cannot be known. Pad the rows by a token."
                )
            return value.index_select(0, rows)

        named = [*names, *[""] * len(args)]
        return tuple(map(part, args, named)), {k: part(v, k) for k, v in kwargs.items()}

    def join(self, parts: Any, order: Tensor) -> Any:
        """Outputs of groups of rows as one; what a group has for all of its rows at once, each row gets.

        Raises:
            RouteError: what comes out does not have the rows that went in.
        """
        first = [p[0] if isinstance(p, tuple) else p for p in parts]
        if not all(isinstance(x, Tensor) for x in first):
            raise RouteError(f"'{self.name}' gives back no hidden states: the outputs of rows cannot be joined.")
        return self._joined(parts, [len(x) for x in first], order)

    def _joined(self, parts: Any, sizes: list[int], order: Tensor) -> Any:
        if isinstance(parts[0], tuple):
            return tuple(self._joined(column, sizes, order) for column in zip(*parts, strict=True))
        if not isinstance(parts[0], Tensor):
            return parts[0]
        if all(p.ndim and len(p) == 1 for p in parts):
            parts = [p.expand(n, *p.shape[1:]) for p, n in zip(parts, sizes, strict=True)]
        if sum(sizes) != len(order) or [p.shape[:1] for p in parts] != [(n,) for n in sizes]:
            shapes = [list(p.shape) for p in parts]
            raise RouteError(
                f"'{self.name}' gives back {shapes} for groups of {len(order)} rows: not theirs, row by row."
            )
        return torch.cat(list(parts)).index_select(0, order)


class Stand:
    """What a site asks of the layer that stands around a frozen one, where there is none."""

    def __init__(self, layer: nn.Module) -> None:
        self.frozen = self.base_layer = layer
