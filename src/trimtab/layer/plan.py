"""Who is active, on or off, and which rows go to which adapter: one immutable snapshot a forward."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import RouteError

BASE = "__base__"  # the row that wants no adapter


class Rows:
    """The plan of a mixed batch: which rows belong to which adapter, made once a forward.

    Where a module sees n rows for each one planned (beams, or (batch · tokens, d) inputs), the plan repeats by n.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._splits: dict[tuple[int, torch.device], tuple[list[tuple[str, Tensor]], Tensor]] = {}

    def split(self, size: int, device: torch.device) -> tuple[list[tuple[str, Tensor]], Tensor]:
        """For `size` rows: ([(adapter, its rows)], the permutation that puts the concatenated groups back in order)."""
        key = (size, device)
        if key not in self._splits:
            if not self.names or size % len(self.names):
                raise RouteError(
                    f"A layer sees {size} rows, which is no multiple of the {len(self.names)} `adapter_names` given: "
                    "it cannot be known which row belongs to which adapter."
                )
            each = size // len(self.names)
            groups: dict[str, list[int]] = {}
            for i, name in enumerate(self.names):
                groups.setdefault(name, []).extend(range(i * each, (i + 1) * each))
            order = torch.tensor([i for rows in groups.values() for i in rows], device=device)
            parts = [(name, torch.tensor(rows, device=device)) for name, rows in groups.items()]
            self._splits[key] = (parts, order.argsort())
        return self._splits[key]


@dataclass(frozen=True)
class Route:
    """One forward's answer to "which adapters?".

    Attributes:
        active: the adapters in use, innermost first.
        enabled: False inside `disable_adapter()`.
        rows: the plan of a mixed batch, or None.
        extras: per-row extras of a call that methods read (task ids, offsets).
        overrides: layer id -> (active, enabled), for layers that were switched by themselves.
    """

    active: tuple[str, ...] = ()
    enabled: bool = True
    rows: Rows | None = None
    extras: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    overrides: Mapping[int, tuple[tuple[str, ...], bool]] = field(default_factory=dict)

    def __reduce__(self) -> Any:  # a mapping proxy cannot be pickled, and a plan is of one forward
        return (Route, (self.active, self.enabled))

    def at(self, layer: int) -> tuple[tuple[str, ...], bool]:
        """(active, enabled) for one layer."""
        if self.overrides and layer in self.overrides:
            return self.overrides[layer]
        return self.active, self.enabled


class Board:
    """Holds the current route for all layers of one model. A plain object: a forward may be compiled in one graph."""

    def __init__(self) -> None:
        self.route = Route()
        self.last: Route | None = None  # the route of the last forward outside a backward pass
        self.restored = False  # a checkpoint's recomputation runs, with its own route put back

    def set(self, **changes: Any) -> None:
        """Change the standing route; layers that were switched by themselves follow again."""
        self.route = replace(self.route, overrides={}, **changes)

    def override(self, layer: int, active: tuple[str, ...], enabled: bool) -> None:
        """Switch one layer by itself."""
        self.route = replace(self.route, overrides={**self.route.overrides, layer: (active, enabled)})

    @contextlib.contextmanager
    def using(self, route: Route, restored: bool = False) -> Iterator[None]:
        """Use another route inside the block."""
        before = self.route, self.restored
        self.route, self.restored = route, restored
        try:
            yield
        finally:
            self.route, self.restored = before

    def now(self) -> Route:
        """The route a layer's forward follows.

        Raises:
            RouteError: the forward is a recomputation inside a backward pass, by a checkpointing function that is not
                transformers' own, and the route has changed since the forward it repeats.
        """
        if torch.compiler.is_compiling():
            return self.route
        if torch._C._current_graph_task_id() == -1:
            self.last = self.route
        elif not self.restored and self.last is not None and self.route is not self.last:
            raise RouteError(
                "A layer is recomputed in the backward pass, but the active adapters have changed since its forward. "
                "Checkpointing other than transformers' `gradient_checkpointing_enable()` must run its backward pass "
                "before `set_adapter`, `disable_adapter` or a mixed batch changes them."
            )
        return self.route


class Checkpointing:
    """A checkpointing function whose recomputation sees the route of the forward it repeats."""

    def __init__(self, function: Any, board: Board) -> None:
        self.function, self.board = function, board

    def __call__(self, run: Any, *args: Any, **kwargs: Any) -> Any:
        board, route = self.board, self.board.route

        def rerun(*a: Any, **k: Any) -> Any:
            with board.using(route, restored=True):
                return run(*a, **k)

        return self.function(rerun, *args, **kwargs)


class CheckpointSwitch:
    """Stands in for a model's `_set_gradient_checkpointing`, so that checkpointing switched on later is ours."""

    def __init__(self, model: Any, board: Board) -> None:
        self.model, self.board = model, board

    def __call__(self, enable: bool = True, gradient_checkpointing_func: Any = None, **kwargs: Any) -> None:
        if gradient_checkpointing_func is None:
            gradient_checkpointing_func = torch.utils.checkpoint.checkpoint
        function = Checkpointing(gradient_checkpointing_func, self.board)
        type(self.model)._set_gradient_checkpointing(self.model, enable, function, **kwargs)


def watch_checkpointing(model: Any, board: Board) -> None:
    """Make transformers' gradient checkpointing of `model`, on now or switched on later, keep the route."""
    if not hasattr(type(model), "_set_gradient_checkpointing"):
        return
    model.__dict__["_set_gradient_checkpointing"] = CheckpointSwitch(model, board)
    for module in model.modules():
        function = module.__dict__.get("_gradient_checkpointing_func")
        if function is not None:
            module._gradient_checkpointing_func = Checkpointing(getattr(function, "function", function), board)


def unwatch_checkpointing(model: Any) -> None:
    """Undo `watch_checkpointing`."""
    model.__dict__.pop("_set_gradient_checkpointing", None)
    for module in model.modules():
        function = module.__dict__.get("_gradient_checkpointing_func")
        if isinstance(function, Checkpointing):
            module._gradient_checkpointing_func = function.function
