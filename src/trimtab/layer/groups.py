"""A mixed batch at one module: its rows dealt to groups, one base product for all that can share it, rows in order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import RouteError
from trimtab.layer.plan import Cut, Plan
from trimtab.layer.spelling import Edits, Stack, first_input, is_fused

Run = Callable[..., Any]


def mixed(
    plan: Plan,
    stacks: Sequence[Stack],
    own: Sequence[bool],
    site: Any,
    base: Run,
    alone: Callable[[int, tuple[Any, ...], dict[str, Any]], Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """The output of an adapted layer for a batch whose rows go to different adapters.

    Args:
        stacks: the methods of each group of the plan, of one site.
        own: for each group, whether it computes with the parameters that the base layer has at rest.
        base: the frozen layer.
        alone: the layer's output for the rows of one group, by itself.
    """
    x, args, kwargs = first_input(args, kwargs)
    lead = site.lead(x)
    cut = plan.cut(lead, x.device, site.name)
    shared = [o and all(is_fused(m) for m in stack) for o, stack in zip(own, stacks, strict=True)]
    edits = [Edits(stack) for stack in stacks]
    if all(shared) and all(e.plain for e in edits):  # one base product of the rows as they lie
        y = base(x, *args, **kwargs)
        at_once = _at_once(stacks, y, x, cut, plan)
        if at_once is not None:
            return at_once
        parts = [
            e.after(part, [mine] * (len(e.stack) + 1), call)
            for e, part, mine, call in zip(edits, cut.deal(y), cut.deal(x), plan.calls, strict=True)
        ]
        return cut.join(parts, lead)
    xs = cut.deal(x)
    inputs = [
        e.before(part, call) if s else [part] for e, part, call, s in zip(edits, xs, plan.calls, shared, strict=True)
    ]
    ys: dict[int, Tensor] = {}
    together = [i for i, s in enumerate(shared) if s]
    if together:
        y = base(torch.cat([inputs[i][0] for i in together], cut.axis), *args, **kwargs)
        ys = dict(zip(together, y.split([inputs[i][0].shape[cut.axis] for i in together], cut.axis), strict=True))
    parts = [
        edits[i].after(ys[i], inputs[i], plan.calls[i]) if i in ys else alone(i, (xs[i], *args), kwargs)
        for i in range(len(stacks))
    ]
    return cut.join(parts, lead)


def _at_once(stacks: Sequence[Stack], y: Tensor, x: Tensor, cut: Cut, plan: Plan) -> Tensor | None:
    """All groups' edits by the method's own `rows`, where each has at most one and all are of one class."""
    methods = [stack[0] if len(stack) == 1 else None for stack in stacks]
    classes = {type(m) for m in methods if m is not None}
    if any(len(stack) > 1 for stack in stacks) or len(classes) != 1:
        return None
    rows = classes.pop().rows
    return rows(methods, y, x, cut, plan.calls) if rows is not None else None


def dealt(plan: Plan, run: Sequence[Run], args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    """The output of a module that is one of several for each row: every tensor of the call that has the rows is cut.

    Args:
        run: what computes the rows of each group.

    Raises:
        RouteError: no argument has the batch's rows.
    """
    first = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.ndim), None)
    if first is None:
        raise RouteError(f"'{name}' is called without a tensor: its rows cannot be dealt to `adapter_names`.")
    lead = first.shape[:-1] if first.ndim > 1 else first.shape
    cut = plan.cut(lead, first.device, name)
    size = first.shape[cut.axis] if not cut.flat else None

    def part(value: Any, group: int) -> Any:
        if not isinstance(value, Tensor) or not value.ndim:
            return value
        if cut.flat:
            return cut.take(value, group) if value.shape[: len(lead)] == lead else value
        has = value.ndim > cut.axis and value.shape[cut.axis] == size
        return value.index_select(cut.axis, cut.index[group]) if has else value

    outputs = [r(*(part(a, i) for a in args), **{k: part(v, i) for k, v in kwargs.items()}) for i, r in enumerate(run)]
    return joined(outputs, cut, lead)


def joined(outputs: Sequence[Any], cut: Cut, lead: Sequence[int]) -> Any:
    """Outputs of groups (tensors, or tuples or mappings of them) as one."""
    first = outputs[0]
    if isinstance(first, Tensor):
        return cut.join(outputs, lead)
    if isinstance(first, Mapping):
        return type(first)(**{k: joined([o[k] for o in outputs], cut, lead) for k in first})
    if isinstance(first, tuple | list):
        return type(first)(joined(list(column), cut, lead) for column in zip(*outputs, strict=True))
    return first
