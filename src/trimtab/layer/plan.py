"""Who is active, on or off, and which rows go to which adapter: one immutable route a forward."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from trimtab.core.method import Call
from trimtab.errors import AdapterNameError, ArgumentError, RouteError
from trimtab.layer import checkpointing
from trimtab.layer.together import Last

BASE = "__base__"  # the row that wants no adapter
PLAIN = Call()


N = TypeVar("N")
Row = str | Sequence[str | tuple[str, float]]  # what a row of a mixed batch wants


def wanted(row: Row) -> tuple[tuple[str, float], ...]:
    """The adapters of a row, innermost first, each with its scale."""
    if isinstance(row, str):
        return () if row == BASE else ((row, 1.0),)
    pairs = [(item, 1.0) if isinstance(item, str) else item for item in row]
    if any(not (isinstance(p, tuple | list) and len(p) == 2 and isinstance(p[0], str)) for p in pairs):
        raise AdapterNameError(
            f"A row of `adapter_names` is a name, or a list of names or (name, scale) pairs, not {row!r}."
        )
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise AdapterNameError(f"A row of `adapter_names` names an adapter twice: {row!r}.")
    return tuple((name, float(scale)) for name, scale in pairs if name != BASE)


class Cut:
    """How the rows of one input go to the groups of a plan.

    Attributes:
        index: for each group, which entries of the axis are its.
        order: the permutation that puts the groups' entries, one after another, back in order.
        rows: the group of each row of the batch, where the first axis has every row's entries side by side; else None.
        owners: the same as a list.
        banks: what methods stack of their tensors for all rows; it holds as long as they find it does.
    """

    def __init__(
        self,
        owners: Sequence[int],
        groups: int,
        axis: int,
        flat: bool,
        device: torch.device,
        rows: Sequence[int] | None = None,
    ) -> None:
        self.axis, self.flat = axis, flat
        places: list[list[int]] = [[] for _ in range(groups)]
        for i, group in enumerate(owners):
            places[group].append(i)
        order = [i for rows in places for i in rows]
        self.sorted = order == list(range(len(order)))
        self.sizes = [len(rows) for rows in places]
        self.index = [torch.tensor(rows, dtype=torch.long, device=device) for rows in places]
        self.owners = None if rows is None else list(rows)
        self.rows = None if rows is None else torch.tensor(list(rows), dtype=torch.long, device=device)
        self.order = torch.tensor(order, dtype=torch.long, device=device).argsort()
        self.banks: dict[str, Any] = {}

    @property
    def pieces(self) -> Sequence[int] | None:
        """The group of each of the equal pieces, one after another, that a batch's rows are: as few as can be."""
        alike = self.sorted and len(set(self.sizes)) == 1
        return range(len(self.sizes)) if alike and self.owners is not None else self.owners

    def take(self, x: Tensor, group: int) -> Tensor:
        """The group's part of `x`."""
        return (x.flatten(0, -2) if self.flat else x).index_select(self.axis, self.index[group])

    def deal(self, x: Tensor) -> list[Tensor]:
        """The parts of all groups."""
        if self.sorted:
            return list((x.flatten(0, -2) if self.flat else x).split(self.sizes, self.axis))
        return [self.take(x, group) for group in range(len(self.index))]

    def join(self, parts: Sequence[Tensor], lead: Sequence[int]) -> Tensor:
        """The groups' outputs as one, in order; `lead` are the leading axes of what was cut."""
        whole = torch.cat(list(parts), self.axis)
        whole = whole if self.sorted else whole.index_select(self.axis, self.order)
        return whole.unflatten(0, tuple(lead)) if self.flat else whole


class Plan:
    """Which rows of a batch, or which tokens of a packed sequence, go to which adapters; made once a forward.

    Args:
        names: the adapter of each row ("__base__": none), or several, innermost first, each with its scale or by name.
        lengths: how many tokens each row has, where the rows lie one after another in one sequence (1, tokens).
        rows: other numbers of rows that layers may see for the same batch: a multiple for beams.
        tokens: lengths of the sequences, so that layers that see (rows · tokens, d) can be told apart.
        calls: what each row's group is handed, by name; a call without rows by default.
    """

    def __init__(
        self,
        names: Sequence[Row],
        lengths: Sequence[int] | None = None,
        rows: Sequence[int] = (),
        tokens: Sequence[int] = (),
        calls: Mapping[str, Call] | None = None,
        extras: Mapping[str, Any] | None = None,
    ) -> None:
        if lengths is not None and len(lengths) != len(names):
            raise ValueError(f"Every row needs a length, but there are {len(names)} and {len(lengths)}.")
        self.names = tuple(names)
        rows_ = [wanted(row) for row in names]
        self.groups = tuple(dict.fromkeys(rows_))  # what each group's rows want: (adapter, scale), innermost first
        number = {group: i for i, group in enumerate(self.groups)}
        self.owners = [number[row] for row in rows_]
        self.lengths = None if lengths is None else [int(n) for n in lengths]
        self.rows, self.tokens = {len(names), *rows}, {1, *tokens}
        extras, calls = extras or {}, calls or {}
        self.calls = [
            self._call(i, calls.get(group[0][0] if len(group) == 1 else ""), extras)
            for i, group in enumerate(self.groups)
        ]
        self._whole: dict[Any, Cut] = {}
        self._cuts: dict[Any, Cut] = {}

    @property
    def adapters(self) -> list[str]:
        """The adapters that any row wants."""
        return list(dict.fromkeys(name for group in self.groups for name, _ in group))

    def _call(self, group: int, given: Call | None, extras: Mapping[str, Any]) -> Call:
        mine = [i for i, owner in enumerate(self.owners) if owner == group]
        own = {
            k: v[torch.tensor(mine, device=v.device)] if isinstance(v, Tensor) and v.ndim else v
            for k, v in extras.items()
        }
        own |= {k: dict(v) for k, v in own.items() if isinstance(v, dict)}  # where a group's formulas note things
        lengths = None if self.lengths is None else tuple(self.lengths[i] for i in mine)
        call = given or PLAIN
        return replace(call, extras={**call.extras, **own}, lengths=lengths)

    def tell(self, shape: Sequence[int]) -> None:
        """Note a shape (rows, tokens ...) that the model is really called with."""
        if self.lengths is None and len(shape) and shape[0] % len(self.owners) == 0:
            self.rows.add(int(shape[0]))
            self.tokens.update(int(n) for n in shape[1:2])

    def part(self, inputs: Mapping[str, Any], group: int) -> dict[str, Any]:
        """The arguments of a call of the model, those tensors that have its rows cut to a group's."""
        tensors = [v for v in inputs.values() if isinstance(v, Tensor) and v.ndim > 1]
        if self.lengths is not None or not tensors or (rows := len(tensors[0])) % len(self.owners):
            return dict(inputs)
        index = self._each(rows // len(self.owners), 0, tensors[0].device).index[group]
        has = lambda v: isinstance(v, Tensor) and v.ndim and len(v) == rows
        return {k: v.index_select(0, index.to(v.device)) if has(v) else v for k, v in inputs.items()}

    def cut(self, lead: Sequence[int], device: torch.device, name: str = "") -> Cut:
        """How an input whose leading axes are `lead` is cut.

        Raises:
            RouteError: it cannot be known which of its rows belong to which adapter.
        """
        key = (tuple(lead), device)
        if key not in self._cuts:
            self._cuts[key] = self._made(tuple(int(n) for n in lead), device, name)
        return self._cuts[key]

    def _made(self, lead: tuple[int, ...], device: torch.device, name: str) -> Cut:
        groups, count = len(self.groups), len(self.owners)
        if self.lengths is not None:
            total = 1
            for n in lead:
                total *= n
            if total == sum(self.lengths):
                tokens = [g for g, n in zip(self.owners, self.lengths, strict=True) for _ in range(n)]
                return Cut(tokens, groups, 0, True, device)
        elif lead and (lead[0] in self.rows or (len(lead) == 1 and lead[0] in self._flattened())):
            return self._each(lead[0] // count, 0, device)
        elif len(lead) > 1 and lead[0] in self.tokens and lead[1] in self.rows:  # time first
            return self._each(lead[1] // count, 1, device)
        wanted = f"{sum(self.lengths)} tokens" if self.lengths is not None else f"{sorted(self.rows)} rows"
        raise RouteError(
            f"'{name}' sees an input whose leading axes are {list(lead)}, but the batch of `adapter_names` has "
            f"{wanted}{'' if self.lengths else f' of {sorted(self.tokens)} tokens'}: it cannot be known which part "
            "belongs to which adapter."
        )

    def _flattened(self) -> set[int]:
        return {r * t for r in self.rows for t in self.tokens}

    def _each(self, times: int, axis: int, device: torch.device) -> Cut:
        key = (times, axis, device)
        if key not in self._whole:
            entries = [g for g in self.owners for _ in range(times)]
            rows = self.owners if axis == 0 else None
            self._whole[key] = Cut(entries, len(self.groups), axis, False, device, rows)
        return self._whole[key]


@dataclass(frozen=True, eq=False)
class Route:
    """One forward's answer to "which adapters?".

    Attributes:
        active: the adapters in use, innermost first.
        enabled: False where the model is the plain base.
        plan: which rows go to which adapters, or None: all go to the active ones.
        call: what the formulas are handed outside mixed batches.
        epoch: when the model as a whole was last switched: a layer that was switched by itself since then differs.
            None inside blocks that switch everything off.
    """

    active: tuple[str, ...] = ()
    enabled: bool = True
    plan: Plan | None = None
    call: Call = field(default=PLAIN)
    epoch: int | None = 0

    def __reduce__(self) -> Any:  # a plan and a call are of one forward
        return (Route, (self.active, self.enabled, None, PLAIN, self.epoch))

    def at(self, own: tuple[int, tuple[str, ...], bool] | None) -> tuple[tuple[str, ...], bool]:
        """(active, enabled) for a layer whose own switch is `own` (epoch, active, enabled), or None."""
        if own is not None and own[0] == self.epoch:
            return own[1], own[2]
        return self.active, self.enabled


@dataclass
class Block:
    """A `with` block that routes one thread.

    Attributes:
        changes: the fields of the standing route that it changes; "route" fixes all of them.
        open: the caller's own code runs inside, which may start threads of its own.
        route: the route inside.
    """

    changes: dict[str, Any]
    open: bool
    route: Route
    repeats: bool = False


class Board:
    """The current route of one model: a standing one, and in front of it that of the block a thread is in."""

    def __init__(self) -> None:
        self.route = Route()
        self.current = self.route  # as last changed by any thread: what a compiled graph follows
        self.blocks: dict[int, list[Block]] = {}  # thread -> the blocks it is in, innermost last
        self.last: Route | None = None  # the route of the last forward outside a backward pass
        self.residents: Any = None  # what brings back adapters that were parked
        self.last_call = Last()  # of each thread
        self.moving = threading.RLock()  # held while adapters come into the module tree or leave it
        checkpointing.watch()
        checkpointing.boards.add(self)

    def __getstate__(self) -> dict[str, Any]:
        return {"route": self.route_here(quiet=True), "residents": self.residents}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self.route = self.current = replace(state["route"], plan=None, call=PLAIN, epoch=state["route"].epoch or 0)
        self.residents = state["residents"]

    # ------------------------------------------------------------------ changes
    def set(self, **changes: Any) -> None:
        """Change the standing route; layers that were switched by themselves follow again."""
        self.route = replace(self.route, epoch=(self.route.epoch or 0) + 1, **changes)
        for blocks in self.blocks.values():
            self._compose(blocks)
        mine = self.blocks.get(threading.get_ident())
        self.current = mine[-1].route if mine else self.route

    def _compose(self, blocks: list[Block]) -> None:
        route = self.route
        for block in blocks:
            block.route = route = block.changes.get("route") or replace(route, **block.changes)

    @contextlib.contextmanager
    def using(self, open: bool = False, repeats: bool = False, **changes: Any) -> Iterator[None]:
        """Change the route of this thread inside the block."""
        thread = threading.get_ident()
        blocks = self.blocks.setdefault(thread, [])
        block = Block(changes, open, self.route, repeats)
        blocks.append(block)
        self._compose(blocks)
        self.current = block.route
        try:
            yield
        finally:
            blocks.remove(block)
            if not blocks:
                self.blocks.pop(thread, None)
            self.current = blocks[-1].route if blocks else self.route

    def used(self) -> list[str]:
        """The adapters that routes in force name, those of other threads' blocks included."""
        with self.moving:
            routes = [self.route, *(block.route for blocks in list(self.blocks.values()) for block in list(blocks))]
        return [n for r in routes for n in (*r.active, *(r.plan.adapters if r.plan is not None else ()))]

    def repeating(self, route: Route) -> contextlib.AbstractContextManager[None]:
        """A block in which a forward is repeated under its own route."""
        return self.using(route=route, repeats=True)

    def forget(self) -> None:
        """This thread's forward is over: nothing that layers keep for each other outlives it."""
        if not torch.compiler.is_compiling():
            self.last_call.forget()

    def off(self) -> contextlib.AbstractContextManager[None]:
        """A block in which the model is the plain base."""
        return self.using(open=True, enabled=False, plan=None, epoch=None)

    def handing(self, extras: Mapping[str, Any]) -> contextlib.AbstractContextManager[None]:
        """A block in which formulas are handed what they must know of a forward; none where that is nothing."""
        if not extras:
            return contextlib.nullcontext()
        return self.using(call=replace(self.route_here(quiet=True).call, extras=extras))

    # ------------------------------------------------------------------ questions
    def route_here(self, quiet: bool = False) -> Route:
        """This thread's route.

        Raises:
            RouteError: another thread is inside a block of its caller's, and this one in none.
        """
        if torch.compiler.is_compiling():
            return self.current
        if not self.blocks:
            return self.route
        mine = self.blocks.get(threading.get_ident())
        if mine:
            return mine[-1].route
        if not quiet and any(block.open for blocks in list(self.blocks.values()) for block in list(blocks)):
            raise RouteError(
                "Another thread is inside `disable_adapter()` or `route()` of this model: whether that is meant for "
                "this thread, too, cannot be known. Open the block in the thread that calls the model, or pass "
                "`adapter_names` to the call."
            )
        return self.route

    def now(self) -> Route:
        """The route a layer's forward follows.

        Raises:
            RouteError: it cannot be known, or the forward is a recomputation inside a backward pass, by checkpointing
                that is not torch's own, and the route has changed since the forward it repeats.
        """
        if torch.compiler.is_compiling():
            return self.current
        route = self.route_here() if self.blocks else self.route
        if torch._C._current_graph_task_id() == -1:
            self.last = route
        elif self.last is not None and route is not self.last:
            self._check()
        return route

    def _check(self) -> None:
        mine = self.blocks.get(threading.get_ident())
        if not mine or not mine[-1].repeats:
            raise RouteError(
                "A layer is recomputed in the backward pass, but the active adapters have changed since its forward. "
                "Checkpointing other than torch's own must run its backward pass before `set_adapter`, "
                "`disable_adapter` or a mixed batch changes them."
            )


def listed(names: Sequence[N]) -> list[N]:
    """Names of adapters as a list; raises for one name, whose letters would be taken for names."""
    if isinstance(names, str):
        raise ArgumentError(f"adapter_names should be a list of strings, got {names!r}.")
    return list(names)


def require_known(names: Sequence[str], known: Sequence[str] | dict[str, Any]) -> None:
    """Raise `AdapterNameError` for names, in a mixed batch, that no adapter has."""
    unknown = [n for n in dict.fromkeys(names) if n not in known and n != BASE]
    if unknown:
        raise AdapterNameError(
            f"Trying to infer with non-existing adapter(s): {', '.join(map(str, unknown))}. Known: {list(known)}."
        )
