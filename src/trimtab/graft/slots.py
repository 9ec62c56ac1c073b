"""The tensors of an adapter by name: where each lives in the model, and its keys in memory and on disk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from trimtab.core.model_method import PROMPT, Mixture, PromptMethod
from trimtab.files.codec import EMBEDDINGS, HEAD, Prompt, Slot, copy_keys, leaf_keys, shared_keys
from trimtab.formats import offload
from trimtab.graft.adapters import Adapter
from trimtab.graft.base import Base
from trimtab.graft.nesting import chains, place
from trimtab.layer.copies import SavedModule
from trimtab.layer.leaves import Leaves


def slots(base: Base, commons: Mapping[str, Leaves], adapter: Adapter, live: bool = False) -> list[Slot]:
    """Every tensor of an adapter that is in the module tree: its keys (without prefix), and where it lives.

    With `live`, without those at layers that others have taken out of the model.
    """
    found: list[Slot] = []
    layers, saved = adapter.layers, adapter.saved
    if live:
        there = set(map(id, base.parts))
        homes = {id(m.home) for x in layers if id(x) in there for m in x.methods[adapter.name]}
        layers = [x for x in layers if id(x) in there or id(x) in homes]
        saved = [x for x in saved if id(x) in there]
    nested = any(layer.name != layer.path for layer in layers)
    alone = chains(layers, adapter.name) if nested else {}
    for layer in layers:
        own = place(layer, alone) if nested else layer.name
        for method in layer.methods[adapter.name]:
            echo = method.home is not layer
            if echo and not (method.echoes and isinstance(method, adapter.method)):
                continue
            for leaf, template in method.templates.items():
                memory, disk = leaf_keys(layer.name, template, adapter.name)
                if echo:
                    keeper = next(m for m in method.home.methods[adapter.name] if type(m) is type(method))
                    source = keeper.templates[method.source(leaf)]
                    memory = leaf_keys(method.home.name, source, adapter.name)[0]
                disk = disk if own == layer.name else leaf_keys(own, template, adapter.name)[1]
                where, name = method.place_of(leaf)
                declared = method.declared[leaf]
                slot = Slot(memory, disk, where, name, optional=not declared.file, method=method, leaf=leaf)
                slot.state, slot.echo = declared.state, echo
                found.append(slot)
    for name, shared in adapter.layout.shared.items():
        container, _, rest = name.partition(".")
        holder: Any = commons[container]._modules[adapter.name] if rest else commons[container]
        key = rest or adapter.name
        store = holder._parameters if key in holder._parameters else holder._buffers
        memory, disk = shared_keys(name, adapter.name)
        found.append(Slot(memory, disk, store, key, optional=not shared.file, shared=True))
    for path, foreign in adapter.foreign.items():
        for template, where, name in foreign.tensors(adapter.name):
            found.append(Slot(*leaf_keys(path, template, adapter.name), where, name))
    found += _copies(adapter, saved)
    if adapter.biases is not None:
        names = {x.path: x.name for x in (*base.layers.values(), *layers)}
        for path in adapter.biases.own:
            key = f"{names[path]}.base_layer.bias" if path in names else f"{path}.bias"
            found.append(Slot(key, key, adapter.biases.own, path))
    if isinstance(adapter.prompt, Mixture):
        for key in adapter.prompt.state_dict():
            path, _, name = key.rpartition(".")
            whole = f"{adapter.prompt.place}.{key}"
            found.append(Slot(whole, whole, adapter.prompt.get_submodule(path), name, shared=True))
    if isinstance(adapter.prompt, PromptMethod):
        for key in adapter.prompt.saved():
            memory = f"prompt_encoder.{adapter.name}{'' if key == PROMPT else f'.{key}'}"
            found.append(Slot(memory, key, Prompt(adapter.prompt), key, bare=True))
    return found


def _copies(adapter: Adapter, saved: Iterable[SavedModule]) -> Iterator[Slot]:
    """The tensors of what an adapter trains whole."""
    kept: set[int] = set()  # parameters that come again in tied copies
    for wrapper in saved:
        module = wrapper.modules_to_save[adapter.name]
        own = {key: id(p) for key, p in module.named_parameters(remove_duplicate=False)}
        for key in module.state_dict():
            path, _, name = key.rpartition(".")
            memory, disk = copy_keys(wrapper.name, key, adapter.name)
            slot = Slot(memory, disk, module.get_submodule(path), name, shared=adapter.prompt is not None)
            slot.echo = own.get(key) in kept
            yield slot
        kept |= {*own.values()}


def embeddings(base: Base, adapter: Adapter, reading: bool = False) -> list[Slot]:
    """The base weights of the model's embeddings, which are saved along when they are adapted or resized.

    With `reading`, under every key that a file may have them by: PEFT's depends on what other adapters were there.
    """
    forms = ("weight", "base_layer.weight", "token_adapter.base_layer.weight")
    found = []
    for path, module in base.embeddings():
        if isinstance(module, SavedModule) or path in {wrapper.name for wrapper in adapter.saved}:
            continue  # the key is the copy's, not the base's
        frozen = base.modules[path]
        if frozen._parameters.get("weight") is None:
            continue
        memory = f"{path}.{forms[frozen is not module]}"
        leaves = [
            t for x in adapter.layers if x.path == path for m in x.methods[adapter.name] for t in m.templates.values()
        ]
        own = forms[0 if not leaves else 2 if all(t.startswith("token_adapter.") for t in leaves) else 1]
        disks = [f"{path}.{form}" for form in (forms if reading else (own,))]
        around = base.layers.get(path)
        # What is saved is the base's own weight, never one that something is merged into.
        holder: Any = frozen
        if around is not None and "weight" in around.originals.held:
            holder = {"weight": offload.value(frozen, "weight", around.originals.held["weight"], original=True)}
        found += [Slot(memory, disk, holder, "weight", optional=True) for disk in disks]
    return found


def targets_embeddings(base: Base, adapter: Adapter) -> bool:
    """Whether the adapter adapts one of the embeddings that PEFT then saves along: not where tokens are trained."""
    config = adapter.config
    wanted = getattr(config, "target_modules", None) or ()  # in a regular expression as text
    tied = getattr(config, "ensure_weight_tying", False) and base.head is not None and base.tied(base.head)
    # With ensure_weight_tying PEFT has the embedding's path in the place of its head's name.
    names = EMBEDDINGS if isinstance(wanted, str) or not tied else [n for n in EMBEDDINGS if n != HEAD]
    if not any(name in wanted for name in names) or getattr(config, "trainable_token_indices", None):
        return False
    return not adapter.method.partial  # a prompt, which has no such fact, has no targets either
