"""A mixed batch at one module: its rows dealt to groups, one base product for all that can share it, rows in order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.core.kernels.usual import recorded
from trimtab.errors import RouteError
from trimtab.layer.plan import Cut, Plan
from trimtab.layer.spelling import Edits, Stack, first_input, is_fused

Run = Callable[..., Any]


class Mixed:
    """How an adapted layer computes a batch whose rows go to different adapters: chosen once a plan.

    Args:
        stacks: the methods of each group of the plan, of one site.
        own: for each group, whether it computes with the parameters that the base layer has at rest.
        base: the frozen layer.
        alone: the layer's output for the rows of one group, by itself.
    """

    def __init__(
        self,
        plan: Plan,
        stacks: Sequence[Stack],
        own: Sequence[bool],
        site: Any,
        base: Run,
        alone: Callable[[int, tuple[Any, ...], dict[str, Any]], Any],
    ) -> None:
        self.plan, self.stacks, self.site, self.base, self.alone = plan, stacks, site, base, alone
        self.shared = [o and all(is_fused(m) for m in stack) for o, stack in zip(own, stacks, strict=True)]
        self.edits = [Edits(stack) for stack in stacks]
        self.at_rest = all(self.shared) and all(e.plain for e in self.edits)  # the base product of the rows as they lie
        classes = {type(m) for stack in stacks for m in stack}
        method = classes.pop() if len(classes) == 1 else None
        self.rows = None if method is None else method.rows
        self.whole = method.mixed if method is not None and self.at_rest else None

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The layer's output."""
        x, args, kwargs = first_input(args, kwargs)
        lead = self.site.lead(x)
        cut = self.plan.cut(lead, x.device, self.site.name)
        if self.whole is not None and torch.is_grad_enabled() and not (args or kwargs or recorded()):
            y = self.whole(self.stacks, x, cut, self.plan.calls)
            if y is not None:
                return y
        if self.at_rest:
            y = self.base(x, *args, **kwargs)
            at_once = self.rows(self.stacks, y, x, cut, self.plan.calls) if self.rows is not None else None
            return cut.join(self._after(cut.deal(y), cut.deal(x)), lead) if at_once is None else at_once
        return cut.join(self._apart(cut.deal(x), cut.axis, args, kwargs), lead)

    def _after(self, ys: Sequence[Tensor], xs: Sequence[Tensor]) -> list[Tensor]:
        """The base's outputs as the stacks edit them, none of which edits its input."""
        return [
            e.after(y, [x] * (len(e.stack) + 1), call)
            for e, y, x, call in zip(self.edits, ys, xs, self.plan.calls, strict=True)
        ]

    def _apart(self, xs: Sequence[Tensor], axis: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """The groups' outputs: one base product for those that can share it, one each for the others."""
        calls = self.plan.calls
        together = [i for i, s in enumerate(self.shared) if s]
        inputs = {i: self.edits[i].before(xs[i], calls[i]) for i in together}
        ys: dict[int, Tensor] = {}
        if together:
            y = self.base(torch.cat([inputs[i][0] for i in together], axis), *args, **kwargs)
            ys = dict(zip(together, y.split([inputs[i][0].shape[axis] for i in together], axis), strict=True))
        return [
            self.edits[i].after(ys[i], inputs[i], calls[i]) if i in ys else self.alone(i, (xs[i], *args), kwargs)
            for i in range(len(self.stacks))
        ]


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
