"""How an adapted layer computes a batch whose rows go to different adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trimtab.errors import RouteError
from trimtab.layer import groups
from trimtab.layer.merging import Merging
from trimtab.layer.plan import Plan, Route
from trimtab.layer.spelling import scaled, spelled

Step = Callable[..., Any]


def mixed_step(layer: Merging, route: Route, base: Step) -> Step:
    """The layer's step where rows go to adapters by the route's plan; `base` is the frozen layer's.

    Raises:
        ValueError: an adapter is merged, which rows of others would see.
        RouteError: a row scales an adapter of a layer that computes with other layers inside.
    """
    plan, originals = route.plan, layer.originals
    assert plan is not None
    if layer.merged_adapters:
        raise ValueError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
        )
    chosen = [tuple(name for name, _ in group) for group in plan.groups]
    stacks = [[scaled(m, s) for name, s in group for m in layer.stack((name,))] for group in plan.groups]
    own = [not originals.others(names) for names in chosen]
    if not any(stacks) and all(own):
        return base
    site: Any = next(iter(layer.sites.values()))
    if site.whole:
        if any(scale != 1 for group in plan.groups for name, scale in group if name in layer.methods):
            raise RouteError(f"'{layer.name}' computes with its adapters inside: a row cannot scale them.")
        return _nested(layer, plan, chosen, site)

    def alone(group: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with originals.instead(originals.others(chosen[group])):
            return spelled(stacks[group], (), base, plan.calls[group], args, kwargs)

    shared = groups.Mixed(plan, stacks, own, site, base, alone)
    return lambda *args, **kwargs: shared(args, kwargs)


def _nested(layer: Merging, plan: Plan, chosen: list[tuple[str, ...]], site: Any) -> Step:
    """Each group by itself, under a route of its own here and in every layer inside."""

    def part(group: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with layer.board.using(active=chosen[group], plan=None, call=plan.calls[group], epoch=None):
            return layer(*args, **kwargs)

    def step(*args: Any, **kwargs: Any) -> Any:
        count, device = site.rows(args, kwargs)
        cut = plan.cut((count,), device, layer.name)
        parts = [part(i, *site.cut(args, kwargs, rows)) for i, rows in enumerate(cut.index)]
        return site.join(parts, cut.order)

    return step
