"""Which adapters are in the module tree: those in use, and the few last used.

Of the others, those used last keep their modules beside the tree, so that they come back at once; the rest are numbers
and a layout.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import nn

from trimtab.core.model_method import Mixture
from trimtab.graft import steps
from trimtab.graft.adapters import Adapter, Layout, install, tensors_of
from trimtab.layer.adapted import AdaptedLayer
from trimtab.layer.leaves import Leaves

LIMIT = 8  # adapters that stay in the module tree although they are neither active, trainable nor merged
ASIDE = 64  # adapters that keep their modules when they leave the tree: about 3 KB a site


class Residents:
    """The adapters of one model, and which of them are in its module tree.

    Attributes:
        adapters: by name.
        commons: name -> {adapter: tensor} of what adapters keep once for all their sites.
        order: the adapters in the module tree, those used longest ago first.
        aside: the adapters whose modules are beside it, those taken out longest ago first.
        kept: parked adapter -> its parameters that others hold (an optimiser), by their place in its layout.
    """

    def __init__(self) -> None:
        self.adapters: dict[str, Adapter] = {}
        self.commons: dict[str, Leaves] = {}
        self.order: dict[str, None] = {}
        self.aside: dict[str, None] = {}
        self.kept: dict[str, dict[int, weakref.ref[Any]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "kept": {}}  # what others hold is of this model, not of a copy

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        steps.watch()  # a model that comes from elsewhere may have adapters that act on steps

    def used(self, names: Iterable[str]) -> None:
        """Note that adapters are used now."""
        for name in names:
            method: Any = self.adapters[name].method
            if steps.acts(method):
                steps.watch()
            self.order.pop(name, None)
            self.order[name] = None

    def bring(self, names: Iterable[str]) -> None:
        """Put adapters into the module tree, where they are not."""
        for name in names:
            adapter = self.adapters.get(name)
            if adapter is None:
                continue
            if adapter.aside is not None:
                self._put_back(adapter)
            elif adapter.flat is not None:
                tensors, adapter.flat = adapter.layout.cut(adapter.flat), None
                install(adapter, tensors, self.commons, self.kept.pop(name, {}))
                adapter.settings = {}
            self.used([name])

    def together(self, names: Iterable[str], trained: bool = False) -> list[str]:
        """Adapters, and those that they work among; with `trained`, only where these are trained along with them."""
        found = list(names)
        for adapter in [self.adapters[n] for n in found if n in self.adapters]:
            if isinstance(adapter.prompt, Mixture) and (not trained or adapter.method.trains(adapter.config)):  # type: ignore[attr-defined]
                found += adapter.method.among(adapter.config)  # type: ignore[attr-defined]
        return found

    def settle(self, needed: Iterable[str]) -> None:
        """Park all but the adapters that are needed and the few last used."""
        kept = {*needed}
        self.bring(name for name in kept if self.adapters[name].parked)
        free = [n for n in self.order if n not in kept and _can_leave(self.adapters[n])]
        for name in free[: max(0, len(free) - LIMIT)]:
            self.park(self.adapters[name])

    def park(self, adapter: Adapter) -> None:
        """Take an adapter out of the module tree, as it is; the one that was taken out longest ago becomes data."""
        name, layout = adapter.name, adapter.layout
        if not layout.stores:
            containers = [s for leaves in self.commons.values() for s in leaves.stores]
            stores = [*containers, *(s for layer in layout.layers for s in layer.stores)]
            layout.stores.extend(s for s in stores if name in s)
        adapter.aside = [store.pop(name, None) for store in layout.stores]
        self.order.pop(name, None)
        self.aside[name] = None
        while len(self.aside) > ASIDE:
            self._pack(self.adapters[next(iter(self.aside))])

    def _put_back(self, adapter: Adapter) -> None:
        name = adapter.name
        for store, value in zip(adapter.layout.stores, adapter.aside or (), strict=True):
            if value is not None:
                store[name] = value
        adapter.aside = None
        del self.aside[name]

    def _pack(self, adapter: Adapter) -> None:
        """Make data of a parked adapter: its numbers stay, as they are, and parameters that others hold."""
        self._put_back(adapter)
        tensors = tensors_of(adapter, self.commons)
        adapter.flat, adapter.trained = adapter.layout.packed(tensors), None
        kept = {i: weakref.ref(t) for i, t in enumerate(tensors) if isinstance(t, nn.Parameter)}
        del tensors
        adapter.settings = _settings(adapter)
        for layer in adapter.layers:
            layer.detach(adapter.name)
        for leaves in self.commons.values():
            leaves.remove(adapter.name)
        if held := {i: ref for i, ref in kept.items() if ref() is not None}:
            self.kept[adapter.name] = held

    def forget(self, name: str, known: dict[str, Layout]) -> None:
        """Take an adapter's tensors out for good; of `known` layouts that no adapter has, only the last ones stay."""
        adapter = self.adapters.pop(name)
        self.kept.pop(name, None)
        self.aside.pop(name, None)
        for layer in adapter.layers:
            layer.detach(name)
        for part in adapter.beside:
            part.detach(name)
        for leaves in self.commons.values():
            leaves.remove(name)
        self.order.pop(name, None)
        if len(known) > LIMIT:
            used = set(map(id, self.layouts()))
            unused = [key for key, layout in known.items() if id(layout) not in used]
            for key in unused[: max(0, len(unused) - LIMIT)]:
                del known[key]

    def parked_at(self, layer: AdaptedLayer, leaves: Leaves | None = None) -> list[str]:
        """The parked adapters that have something at a layer, or in a container of it."""
        container = next((n for n, c in layer.containers.items() if c is leaves), None)
        there = {id(layout) for layout in self.layouts() if _stands(layout, layer, container)}
        return [a.name for a in self.adapters.values() if a.parked and id(a.layout) in there]

    def layouts(self) -> list[Layout]:
        """The layouts that adapters have, each once, however many share one."""
        return list({id(a.layout): a.layout for a in self.adapters.values()}.values())

    def parts(self) -> set[int]:
        """The identities of all that adapters have in the module tree of the base."""
        layers = {id(layer) for layout in self.layouts() for layer in layout.layers}
        return layers | {id(part) for a in self.adapters.values() for part in a.beside}

    def convert(self, layer: AdaptedLayer, fn: Any) -> None:
        """Convert (`.to()` ...) the numbers of the parked adapters whose first layer is this one."""
        for adapter in self.adapters.values():
            if not adapter.parked or adapter.layout.places[0].layer is not layer:
                continue
            if adapter.aside is not None:
                self._pack(adapter)
            assert adapter.flat is not None
            adapter.flat = {
                kind: [fn(t) for t in flat] if isinstance(flat, list) else fn(flat)
                for kind, flat in adapter.flat.items()
            }


def _stands(layout: Layout, layer: AdaptedLayer, container: str | None) -> bool:
    places = [p for p in layout.places if p.layer is layer]
    if container is None:
        return bool(places)
    return any(
        p.method.templates[leaf].partition(".{}")[0] == container for p in places for leaf in (*p.leaves, *p.borrowed)
    )


def _can_leave(adapter: Adapter) -> bool:
    return bool(adapter.layout.places) and not adapter.beside


def _settings(adapter: Adapter) -> dict[tuple[int, str], Any]:
    """What was set by hand on an adapter's methods."""
    found = {}
    seen: dict[AdaptedLayer, int] = {}
    for i, place in enumerate(adapter.layout.places):
        at = seen.get(place.layer, 0)
        method = place.layer.methods[adapter.name][at]
        seen[place.layer] = at + 1
        for attribute in type(method).views:
            if (value := method.__dict__.get(attribute)) != place.method.__dict__.get(attribute):
                found[i, attribute] = value
    return found
