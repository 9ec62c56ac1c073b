"""Folding adapters into the whole model: all layers or none, tied weights in mind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from trimtab.core.report import warn
from trimtab.layer.adapted import AdaptedLayer

if TYPE_CHECKING:
    from trimtab.graft.graft import Graft


def merge(
    graft: Graft, names: Sequence[str] | None, safe: bool, keep: bool = True, progress: Callable[[Any], Any] = iter
) -> None:
    """Fold adapters into the base (the active ones by default): all layers or, on an error, none."""
    chosen = list(graft.board.route.active if names is None else names)
    for name in chosen:
        graft.require(name)
    done: list[AdaptedLayer] = []
    merged = list(merged_adapters(graft))
    if merged and not set(chosen) - set(merged):
        warn(
            f"All adapters are already merged, nothing to do. {chosen} are merged already: unmerge_adapter() undoes it."
        )
        return
    try:
        for layer in progress(list(graft.layers.values())):
            layer.merge(safe_merge=safe, adapter_names=chosen, keep=True)
            done.append(layer)
    except BaseException:
        for layer in done:
            layer.unmerge()
            layer.merge(adapter_names=merged)
        raise
    if not keep:
        for layer in done:
            layer.held = {}
    _untie(graft, chosen)


def merged_adapters(graft: Graft) -> list[str]:
    """The adapters that are merged into the base."""
    return list(dict.fromkeys(n for layer in graft.layers.values() for n in layer.merged_adapters))


def _untie(graft: Graft, names: Sequence[str]) -> None:
    """After a merge: layers that shared a weight may hold different ones now. Say so, and correct the config."""
    for owners in graft.ties:
        changed = {p for p in owners if p in graft.layers and graft.layers[p].merged_adapters}
        if not changed:
            continue
        weights: dict[str, Any] = {p: graft.modules[p]._parameters["weight"] for p in owners}
        first = next(iter(weights.values()))
        if all(torch.equal(first, w) for w in weights.values()):  # one delta for both: they stay tied
            for path in owners:
                graft.modules[path]._parameters["weight"] = first
            continue
        config = getattr(graft.model, "config", None)
        if config is not None and getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
            graft.untied = True
        warn(
            f"{owners} share one weight, and adapters {list(names)} change it differently at each: after the merge "
            "each has its own copy, and `tie_word_embeddings` of the model's config is False."
        )


def unmerge(graft: Graft) -> None:
    """Put the base's original weights back."""
    if not merged_adapters(graft):
        warn("Already unmerged. Nothing to do.")
    for layer in graft.layers.values():
        layer.unmerge()
    if graft.untied:
        graft.model.config.tie_word_embeddings = True  # type: ignore[union-attr]
        graft.untied = False
