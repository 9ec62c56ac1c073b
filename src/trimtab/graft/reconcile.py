"""What other libraries do to a model's adapters by hand: delete them layer by layer, or put the plain layers back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimtab.layer.adapted import AdaptedLayer
from trimtab.layer.copies import SavedModule

if TYPE_CHECKING:
    from trimtab.graft.graft import Graft


def reconcile(graft: Graft) -> bool:
    """Forget adapters and layers that are gone; returns whether the graft is still one with its model."""
    lost = [key for key, layer in graft.layers.items() if not _stands(graft, layer.path)]
    for key in lost:
        del graft.layers[key]
    for path in [path for path in graft.saved if not _stands(graft, path)]:
        lost.append(path)
        del graft.saved[path]
    layers = {id(layer) for layer in (*graft.layers.values(), *graft.saved.values())} if lost else set()
    for name, adapter in list(graft.adapters.items()):
        if lost:
            adapter.layers = [layer for layer in adapter.layers if id(layer) in layers]
            adapter.saved = [wrapper for wrapper in adapter.saved if id(wrapper) in layers]
        if (adapter.layers and name in adapter.layers[0].methods) or adapter.prompt is not None:
            continue
        if not adapter.layers and adapter.saved and name in adapter.saved[0].modules_to_save:
            continue
        for wrapper in adapter.saved:
            wrapper.detach(name)
        if adapter.biases is not None:
            adapter.biases.switch(False)
        del graft.adapters[name]
    active = tuple(name for name in graft.board.route.active if name in graft.adapters)
    if active != graft.board.route.active:
        graft.board.set(active=active)
    return not lost or bool(graft.layers or graft.saved or graft.adapters)


def _stands(graft: Graft, path: str) -> bool:
    """Whether one of our modules is where it was put."""
    return any(isinstance(parent._modules.get(name), AdaptedLayer | SavedModule) for parent, name in graft.users[path])
