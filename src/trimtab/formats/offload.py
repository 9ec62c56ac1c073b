"""Weights that accelerate keeps elsewhere (on the CPU, on disk) between forwards: the layer's own are on `meta`.

A hook fetches them from a map just before the layer's forward and puts them away after it. What is merged into such a
layer stands in front of that map, so that the original stays where it is.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn


class Overlay(Mapping[str, Any]):
    """A map of weights with some of them replaced."""

    def __init__(self, below: Mapping[str, Any]) -> None:
        self.below = below
        self.own: dict[str, nn.Parameter] = {}

    def __getitem__(self, name: str) -> Any:
        return self.own[name].data if name in self.own else self.below[name]

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self.own, *self.below]))

    def __len__(self) -> int:
        return len(list(iter(self)))


def hook(layer: nn.Module) -> Any:
    """The hook that keeps the layer's weights elsewhere, or None."""
    found = layer.__dict__.get("_hf_hook")
    if found is None:
        return None
    hooks = getattr(found, "hooks", (found,))
    return next((h for h in hooks if getattr(h, "offload", False) and h.weights_map is not None), None)


def value(layer: nn.Module, name: str, stored: Any, original: bool = False) -> Any:
    """A parameter of the layer as it can be computed with: fetched, where `stored` is but its place.

    `original`: as it was before anything was merged.
    """
    if not isinstance(stored, Tensor) or not stored.is_meta or (found := hook(layer)) is None:
        return stored
    source = found.weights_map
    source = source.below if original and isinstance(source, Overlay) else source
    return nn.Parameter(source[name].to(found.execution_device), requires_grad=stored.requires_grad)


def parameters(layer: nn.Module) -> dict[str, Any]:
    """The layer's parameter objects, those that stand in front of its map among them."""
    found = hook(layer)
    own = found.weights_map.own if found is not None and isinstance(found.weights_map, Overlay) else {}
    return {**layer._parameters, **own}


def install(layer: nn.Module, changed: Mapping[str, Any]) -> None:
    """After parameters of the layer were exchanged: let its hook fetch the new ones, or the original ones again."""
    if (found := hook(layer)) is None:
        return
    over = found.weights_map if isinstance(found.weights_map, Overlay) else Overlay(found.weights_map)
    for name, new in changed.items():
        if new is None or new.is_meta:
            over.own.pop(name, None)
        else:
            over.own[name] = new if new.device.type == "cpu" else nn.Parameter(new.data.cpu(), requires_grad=False)
    found.weights_map = over if over.own else over.below


def copied(module: nn.Module) -> nn.Module:
    """A deep copy with all its weights there, whatever hooks keep those of the module."""
    hooks = {id(h): None for m in module.modules() if (h := m.__dict__.get("_hf_hook")) is not None}
    duplicate = copy.deepcopy(module, hooks)  # type: ignore[arg-type]  # a hook is copied as None
    for old, new in zip(module.modules(), duplicate.modules(), strict=True) if hooks else ():
        for name in ("_hf_hook", "_old_forward", "forward"):
            new.__dict__.pop(name, None)
        for name, parameter in old._parameters.items():
            if parameter is not None and parameter.is_meta:
                new._parameters[name] = nn.Parameter(value(old, name, parameter).detach().clone())
    return duplicate


@contextlib.contextmanager
def running(layer: nn.Module) -> Iterator[None]:
    """Inside the block all of the layer's weights are there, and its forward leaves them alone."""
    found = hook(layer)
    if found is None or layer.__dict__.get("forward") == layer._old_forward:
        yield
        return
    found.pre_forward(layer)
    hooked = layer.__dict__["forward"]
    layer.forward = layer._old_forward  # type: ignore[assignment]
    try:
        yield
    finally:
        layer.forward = hooked
        found.post_forward(layer, None)
