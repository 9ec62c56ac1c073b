"""Folding adapters into the whole model: all layers or none, tied weights in mind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from trimtab.core.report import warn
from trimtab.errors import NotMergeable
from trimtab.graft import stack
from trimtab.graft.adapters import Adapter
from trimtab.graft.base import Base

Progress = Callable[[list[Any]], Iterable[Any]]


def changes_layers(adapter: Adapter) -> bool:
    """True; raises for an adapter of the model itself, of which no layer's weight says anything."""
    if adapter.prompt is not None:
        raise NotMergeable(f"{adapter.method.__name__} ('{adapter.name}') cannot be merged: it has no single weight.")
    return True


def merge(base: Base, chosen: Sequence[str], safe: bool, keep: bool = True, progress: Progress = iter) -> bool:
    """Fold adapters into the base: all layers or, on an error, none.

    Returns:
        Whether layers that shared a weight have different ones now.
    """
    merged = merged_adapters(base)
    if merged and not left(base, chosen):
        warn(
            f"All adapters are already merged, nothing to do. {list(chosen)} are merged already: unmerge_adapter() "
            "undoes it."
        )
        return False
    done: list[Any] = []
    foreign = [x for x in base.foreign.values() if not {*chosen}.isdisjoint(x.adapters)]  # first: they may refuse
    try:
        for layer in progress([*foreign, *base.layers.values()]):
            layer.merge(safe_merge=safe, adapter_names=chosen)  # which others replace layer by layer (ms-swift)
            done.append(layer)
    except BaseException:
        for layer in done:
            layer.unmerge()
            layer.merge(adapter_names=merged)
        raise
    untied = _untie(base, chosen)
    if not keep:
        settle(base)
    return untied


def settle(base: Base) -> None:
    """Make what is merged final: in the storage that was there, unless layers that shared it have different weights."""
    owners: dict[int, int] = {}
    for path, module in {"": base.model, **base.modules}.items():
        held = {k: v for layer in base.layers_at(path) for k, v in layer.originals.held.items()}
        for parameter in {**module._parameters, **held}.values():
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for layer in base.layers.values():
        if any(owners[id(p)] > 1 for p in layer.originals.held.values() if p is not None):
            layer.originals.settle()
        elif layer.originals.held:
            layer.settle()
    stack.part(base.model)


def merged_adapters(base: Base) -> list[str]:
    """The adapters that are merged into the base."""
    return list(dict.fromkeys(n for layer in base.adapted if (own := layer.merged_adapters) for n in own))


def left(base: Base, chosen: Sequence[str]) -> bool:
    """Whether one of these adapters is yet to be merged, somewhere: layers are also merged by themselves."""
    layers = base.adapted
    known = {name for layer in layers for name in layer.adapters}
    here = any(set(chosen) & set(x.adapters) - set(x.merged_adapters) for x in layers)
    return here or bool(set(chosen) - known)


def _untie(base: Base, names: Sequence[str]) -> bool:
    """After a merge: layers that shared a parameter may hold different ones now. Say so, and correct the config."""
    untied = False
    for owners, param in _shared(base):
        changed = {p for p in owners if any(layer.merged_adapters for layer in base.layers_at(p))}
        if not changed:
            continue
        now: dict[str, Any] = {p: base.modules[p]._parameters[param] for p in owners}
        # The object they had before, where one still has it: then the merge has changed nothing.
        first = next((now[p] for p in owners if p not in changed), next(iter(now.values())))
        if all(torch.equal(first, w) for w in now.values()):  # one delta for all: they stay tied
            for path in owners:
                base.modules[path]._parameters[param] = first
            continue
        repeated = stack.stack_of(base.model)
        if repeated is not None and all(p.startswith(f"{repeated.path}.") for p in owners):
            continue  # they share it only as long as no adapter is merged
        config = getattr(base.model, "config", None)
        if param == "weight" and config is not None and getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
            untied = True
        warn(
            f"{owners} share one {param}, and adapters {list(names)} change it differently at each: after the merge "
            "each has its own copy" + (", and `tie_word_embeddings` of the model's config is False." if untied else ".")
        )
    return untied


def _shared(base: Base) -> list[tuple[list[str], str]]:
    """(modules, parameter) of what modules hold between them under one name; it was one object before the merge."""
    found: dict[int, list[tuple[str, str]]] = {}
    for path in dict.fromkeys(n for names in base.ties for n in names):
        held = {k: v for layer in base.layers_at(path) for k, v in layer.originals.untouched().items()}
        module = base.modules[path] if path else base.model
        for name, parameter in {**module._parameters, **held}.items():
            if parameter is not None:
                found.setdefault(id(parameter), []).append((path, name))
    groups = [group for group in found.values() if len(group) > 1]
    return [([p for p, _ in group], group[0][1]) for group in groups if len({n for _, n in group}) == 1]
