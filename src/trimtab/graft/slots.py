"""The tensors of an adapter by name: where each lives in the model, and its keys in memory and on disk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trimtab.files.codec import EMBEDDINGS, Prompt, Slot, copy_keys, leaf_keys
from trimtab.graft.adapters import Adapter
from trimtab.graft.nesting import chains, place
from trimtab.graft.selection import path_of
from trimtab.layer.adapted import AdaptedLayer
from trimtab.layer.copies import SavedModule

if TYPE_CHECKING:
    from trimtab.graft.graft import Graft


def slots(graft: Graft, adapter: Adapter) -> list[Slot]:
    """Every tensor of an adapter: its key in memory and on disk (without prefix), and where it lives."""
    found: list[Slot] = []
    alone = chains(adapter.layers, adapter.name)
    for layer in adapter.layers:
        own = place(layer, alone)
        for method in layer.methods[adapter.name]:
            if method.home is not layer:
                continue
            for leaf, template in method._leaves.items():
                memory, disk = leaf_keys(layer.name, template, adapter.name)
                disk = disk if own == layer.name else leaf_keys(own, template, adapter.name)[1]
                where, name = holder(layer, template, adapter.name)
                stored = method.stored(adapter.config, template)
                found.append(Slot(memory, disk, where, name, optional=not stored, method=method, leaf=leaf))
    for name, leaves in graft.commons.items():
        if adapter.name in leaves:
            stored = adapter.method.stored(adapter.config, name)
            found.append(Slot(f"{name}.{adapter.name}", name, leaves, adapter.name, optional=not stored, shared=True))
    for wrapper in adapter.saved:
        module = wrapper.modules_to_save[adapter.name]
        for key in module.state_dict():
            path, _, name = key.rpartition(".")
            memory, disk = copy_keys(wrapper.name, key, adapter.name)
            slot = Slot(memory, disk, module.get_submodule(path), name, shared=adapter.prompt is not None)
            found.append(slot)
    if adapter.biases is not None:
        names = {x.path: x.name for x in (*graft.layers.values(), *adapter.layers)}
        for path in adapter.biases.own:
            key = f"{names[path]}.base_layer.bias" if path in names else f"{path}.bias"
            found.append(Slot(key, key, adapter.biases.own, path))
    if adapter.prompt is not None:
        found.append(Slot(f"prompt_encoder.{adapter.name}", "prompt_embeddings", Prompt(adapter.prompt), "", bare=True))
    return found


def embeddings(graft: Graft, adapter: Adapter, reading: bool = False) -> list[Slot]:
    """The base weights of the model's embeddings, which are saved along when they are adapted or resized.

    With `reading`, under every key that a file may have them by: PEFT's depends on what other adapters were there.
    """
    forms = ("weight", "base_layer.weight", "token_adapter.base_layer.weight")
    found = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        module = getattr(graft.model, getter, lambda: None)()
        if module is None or isinstance(module, SavedModule):
            continue
        base = getattr(module, "base_layer", module)
        path = path_of(graft, base)
        if path in {wrapper.name for wrapper in adapter.saved}:  # the key is the copy's, not the base's
            continue
        if base._parameters.get("weight") is None:
            continue
        memory = f"{path}.{forms[base is not module]}"
        leaves = [
            t for x in adapter.layers if x.path == path for m in x.methods[adapter.name] for t in m._leaves.values()
        ]
        own = forms[0 if not leaves else 2 if all(t.startswith("token_adapter.") for t in leaves) else 1]
        disks = [f"{path}.{form}" for form in (forms if reading else (own,))]
        found += [Slot(memory, disk, base, "weight", optional=True) for disk in disks]
    return found


def targets_embeddings(adapter: Adapter) -> bool:
    """Whether the adapter adapts one of the embeddings that PEFT then saves along."""
    wanted = getattr(adapter.config, "target_modules", None) or ()  # in a regular expression as text
    return any(name in wanted for name in EMBEDDINGS)


def holder(layer: AdaptedLayer, template: str, adapter: str) -> tuple[Any, str]:
    """Where a leaf's tensor is registered: (module, name)."""
    container, _, rest = template.partition(".{}")
    leaves: Any = layer.containers[container]
    if rest:
        return leaves[adapter], rest.removeprefix(".")
    return (leaves.parked if adapter in leaves.parked else leaves), adapter
