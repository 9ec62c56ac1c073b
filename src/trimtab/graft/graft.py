"""Putting adapters into a model and taking them out: check, stage, fill, commit; nothing changes before."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.model_method import ModelMethod, PromptMethod
from trimtab.core.report import warn
from trimtab.errors import AdapterNameError, NoMatchingPeftModuleError
from trimtab.files.codec import Slot, fill
from trimtab.files.store import check_name
from trimtab.formats import weights
from trimtab.graft import merging, prompts, slots
from trimtab.graft.adapters import Adapter, Layout, complete, install, require_gradients
from trimtab.graft.base import Base
from trimtab.graft.nesting import Detours, Named, rename
from trimtab.graft.residents import Residents
from trimtab.graft.selection import Pick
from trimtab.graft.staging import Stage, start
from trimtab.layer.adapted import AdaptedLayer
from trimtab.layer.leaves import Leaves
from trimtab.layer.plan import BASE, Board, listed
from trimtab.methods import method_class

Fill = Callable[[list[Slot]], Mapping[str, Tensor]]


class Graft:
    """All adapters of one model. It hangs on the model as `_trimtab`, so that every way to add one finds it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.board = Board()
        self.residents = self.board.residents = Residents()
        self.configs: dict[str, Any] = {}  # adapter -> its config: what users read as `peft_config`
        self.prompts = nn.ModuleDict()
        self.layouts: dict[str, Layout] = {}
        self.detours = Detours()
        self.untied = False  # a merge gave tied layers weights of their own
        self.named: Named = []  # the layers as they were when they were told their names
        self.base = Base(model)
        weights.pin(model)

    @staticmethod
    def of(model: nn.Module) -> Graft:
        """The model's graft, made at first."""
        graft: Graft | None = model.__dict__.get("_trimtab")
        if graft is not None and not graft.look():
            weights.unpin(model)
            graft = None
        if graft is None:
            graft = model.__dict__["_trimtab"] = Graft(model)
        return graft

    # ------------------------------------------------------------------ what is there
    @property
    def adapters(self) -> dict[str, Adapter]:
        """The adapters by name."""
        return self.residents.adapters

    @property
    def commons(self) -> dict[str, Leaves]:
        """Name -> {adapter: tensor} of what adapters keep once for all their sites."""
        return self.residents.commons

    @property
    def layers(self) -> dict[str, AdaptedLayer]:
        """The adapted layers by path, or path of a parameter."""
        return self.base.layers

    @property
    def saved(self) -> dict[str, Any]:
        """The modules that adapters train whole, by path."""
        return self.base.saved

    def require(self, name: str) -> Adapter:
        """The adapter of that name, or an error that lists the ones there are."""
        if name in self.adapters:
            return self.adapters[name]
        raise AdapterNameError(f"Adapter {name} not found. Known: {list(self.adapters)}.")

    def look(self) -> bool:
        """Read the model anew, and forget adapters that others have deleted layer by layer.

        Returns:
            Whether anything of ours is still in the model.
        """
        before, self.base = self.base, Base(self.model)
        if (before.modules, before.ties) != (self.base.modules, self.base.ties):
            self.layouts.clear()  # a config may select others now
        live = set(map(id, self.base.parts))
        lost = any(id(x) not in live for x in before.parts)
        stand = {id(x) for x in self.residents.layouts() if any(id(layer) in live for layer in x.layers)}
        for name, adapter in list(self.adapters.items()):
            parts = [] if adapter.parked else adapter.parts
            held = (name in (x.methods if isinstance(x, AdaptedLayer) else x.adapters) for x in parts if id(x) in live)
            here = id(adapter.layout) in stand if adapter.parked else any(held)
            if not here and adapter.prompt is None:
                self._forget(adapter)
        return not lost or bool(live or self.adapters)

    # ------------------------------------------------------------------ adding
    def add(
        self,
        name: str,
        config: Any,
        tensors: Fill | None = None,
        autocast: bool = True,
        trainable: bool | None = None,
        strict: bool = False,
        meta: bool = False,
        looked: bool = False,
        pick: Pick | None = None,
    ) -> Adapter:
        """Add an adapter.

        Args:
            name: its name.
            config: its config; a copy of it is kept, completed from the model.
            tensors: given the adapter's slots, check and return {key on disk: value} to start from; None: start as the
                config says.
            autocast: adapters of half-precision layers are kept in fp32.
            trainable: whether it starts trainable; by default unless the config says `inference_mode`.
            strict: targets that fit nothing are errors even when others fit.
            meta: build the tensors without storage; a state dict is loaded into them later.
            looked: the model was read just now, and is as it was.
            pick: see `choose`.
        """
        self._check_name(name)
        config = config.copy()
        config.check()
        method: Any = method_class(config)
        method.admit(config, [a.config for a in self.adapters.values() if a.method is method])
        if not looked:
            self.look()
        stage = Stage(self.base, self.board)
        free = [] if self.adapters else [p for p in self.model.parameters() if p.requires_grad]
        trainable = not config.inference_mode if trainable is None else trainable
        prompt: Any = None
        try:
            for parameter in free:
                parameter.requires_grad_(False)
            if issubclass(method, ModelMethod):
                layout, prompt = Layout(config, []), prompts.started(method, config, self.model, self.adapters)
            else:
                layout = stage.layout(config, method, autocast, strict, self.layouts, pick)
            adapter = Adapter(name, config, method, layout, prompt=prompt, trainable=trainable)
            self.residents.adapters[name] = adapter
            self._build(stage, adapter, tensors, meta, autocast)
        except BaseException:
            if name in self.adapters:
                self._forget(self.adapters[name])
            for parameter in free:
                parameter.requires_grad_(True)
            self._bare()
            raise
        self._commit(stage, adapter)
        return adapter

    def _check_name(self, name: str) -> None:
        check_name(name)
        if name in self.adapters:
            raise AdapterNameError(f"Adapter with name '{name}' already exists.")
        if name == BASE:
            raise AdapterNameError(f"'{BASE}' stands for no adapter in a mixed batch: it cannot name one.")
        if hasattr(Leaves, name) or name in Leaves().__dict__:
            raise AdapterNameError(
                f"An adapter cannot be called '{name}': its tensors are attributes of modules, which have one of that "
                "name already."
            )

    def _build(self, stage: Stage, adapter: Adapter, tensors: Fill | None, meta: bool, autocast: bool) -> None:
        """Put the adapter's tensors where they belong, and give them their values."""
        for name in adapter.layout.shared:
            self.commons.setdefault(name.partition(".")[0], Leaves())
        install(adapter, adapter.layout.buffers(torch.device("meta") if meta else None), self.commons)
        self.residents.used([adapter.name])
        self._rename(stage.new)
        stage.beside(adapter, self.adapters, autocast)
        if not adapter.parts and adapter.prompt is None:
            raise NoMatchingPeftModuleError(
                "The config selects nothing to train: name `target_modules` or `modules_to_save`."
            )
        if tensors is None:
            if not meta:
                start(adapter, self.commons, self.model)
            return
        own = slots.slots(self.base, self.commons, adapter)
        wanted = [*own, *slots.embeddings(self.base, adapter, reading=True)]
        values = tensors(wanted)
        if not meta and (any(s.on_disk() not in values for s in own) or adapter.method.mutates(adapter.config)):
            start(adapter, self.commons, self.model)  # what the file does not say starts as it would anew
        fill(wanted, values, checked=True)
        complete(adapter)

    def _commit(self, stage: Stage, adapter: Adapter) -> None:
        """Swap in what was staged."""
        for layer in stage.new.values():
            self.base.swap(layer.path, layer)
            self.detours.take(layer.path, self.base.modules, self.model)
        for path, wrapper in (*stage.saved.items(), *stage.foreign.items()):
            self.base.swap(path, wrapper)
        self.base.note(stage.new, stage.saved, stage.foreign)
        name = adapter.name
        if isinstance(adapter.prompt, PromptMethod):
            self.prompts[name] = adapter.prompt
        if adapter.biases is not None:
            self.model._modules["trimtab_biases"] = adapter.biases
        self.configs[name] = adapter.config
        self.set_trainable(name, adapter.trainable)
        self.settle()

    def _rename(self, new: Mapping[str, AdaptedLayer]) -> None:
        """Tell the layers their paths, which change when others come to stand around them."""
        self.named = rename([*self.base.layers.values(), *new.values()], self.named)

    # ------------------------------------------------------------------ tensors by name
    def slots(self, adapter: Adapter) -> list[Slot]:
        """Every tensor of an adapter; see `slots.slots`."""
        self.residents.bring([adapter.name])
        return slots.slots(self.base, self.commons, adapter, live=True)

    def embeddings(self, adapter: Adapter, reading: bool = False) -> list[Slot]:
        """The base weights of the model's embeddings; see `slots.embeddings`."""
        self.residents.bring([adapter.name])
        return slots.embeddings(self.base, adapter, reading)

    # ------------------------------------------------------------------ states
    def set_active(self, names: Sequence[str], trainable: bool | None = True) -> None:
        """Use these adapters, innermost first, and make them the trainable ones (None: leave that as it is)."""
        for name in names:
            self.require(name)
        before = self.board.route.active
        self.residents.bring(names)
        self.board.set(active=tuple(names))
        if trainable is not None:
            others = [n for n, a in self.adapters.items() if a.trainable and n not in names] if trainable else before
            for name in [n for n in others if n in self.adapters]:
                self.set_trainable(name, False)
            for name in names:
                self.set_trainable(name, trainable)
        self._place_biases()
        self.settle()

    def set_enabled(self, enabled: bool) -> None:
        """Switch all adapters on or off."""
        self.board.set(enabled=enabled)
        self._place_biases()

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Inside the block the model is the plain base model, in this thread."""
        try:
            with self.board.off():
                self._place_biases()
                yield
        finally:
            self._place_biases()

    def set_trainable(self, name: str, trainable: bool) -> None:
        """Make an adapter trainable or frozen, active or not."""
        adapter = self.require(name)
        if adapter.parked and not trainable:
            adapter.trainable = False
            return
        self.residents.bring([name])
        adapter.trainable = trainable
        require_gradients(adapter, self.commons, trainable)
        for other in self.residents.together([name], trained=True)[1:]:
            self.set_trainable(other, trainable)

    def _place_biases(self) -> None:
        route = self.board.route_here(quiet=True)
        for adapter in self.biased():
            assert adapter.biases is not None
            adapter.biases.switch(route.enabled and adapter.name in route.active)

    def biased(self) -> list[Adapter]:
        """The adapters that train biases of the base."""
        found = self.model._modules.get("trimtab_biases")
        return [self.adapters[found.adapter]] if found is not None else []  # type: ignore[index,list-item]

    def settle(self, recent: Sequence[str] = ()) -> None:
        """Keep in the module tree the adapters in use, `recent` ones and the few last used; park the others."""
        trained = [name for name, a in self.adapters.items() if a.trainable]
        takers = [t for x in self.base.layers.values() if (own := x.originals.takers) for t in own.values()]
        with self.board.moving:
            used = [*self.residents.together(self.board.used()), *recent, *(a.name for a in self.biased())]
            needed = dict.fromkeys([*self.merged, *takers, *trained, *used])
            self.residents.settle(n for n in needed if n in self.adapters)

    # ------------------------------------------------------------------ merging and taking out
    def merge(
        self, names: Sequence[str] | None, safe: bool, keep: bool = True, progress: merging.Progress = iter
    ) -> None:
        """Fold adapters into the base (the active ones by default): all layers or, on an error, none."""
        self.look()
        chosen = listed(self.board.route.active if names is None else names)
        self.residents.bring(a.name for a in map(self.require, chosen) if merging.changes_layers(a))
        self.untied = merging.merge(self.base, chosen, safe, keep, progress) or self.untied

    def unmerge(self) -> None:
        """Put the base's original weights back."""
        if not self.merged:
            warn("Already unmerged. Nothing to do.")
        for layer in self.base.adapted:
            layer.unmerge()
        if self.untied:
            self.model.config.tie_word_embeddings = True  # type: ignore[union-attr]
            self.untied = False

    @property
    def merged(self) -> list[str]:
        """The adapters that are merged into the base."""
        return merging.merged_adapters(self.base)

    def delete(self, name: str) -> None:
        """Forget an adapter; layers that have none left become the plain modules they were."""
        adapter = self.require(name)
        if name in self.merged:
            raise ValueError(
                f"Cannot delete adapter(s) ['{name}'] while they are merged. Please unmerge them first: "
                "call unmerge_adapter()."
            )
        self._forget(adapter)
        for part in (*self.base.adapted, *adapter.saved):
            part.left(name, inference_mode=not adapter.trainable)
        self._bare()
        active = [n for n in self.board.route.active if n != name]
        if len(active) != len(self.board.route.active):
            if not active and self.adapters:
                active = [min(self.adapters)]
                warn(f"Adapter {name} was active which is now deleted. Setting active adapter to {active[0]}.")
            self.set_active(active, trainable=adapter.trainable)

    def _forget(self, adapter: Adapter) -> None:
        """Take all that an adapter has out of the model."""
        name = adapter.name
        if adapter.biases is not None:
            adapter.biases.take_out()
            if self.model._modules.get("trimtab_biases") is adapter.biases:
                del self.model._modules["trimtab_biases"]
        for layer in adapter.layers:
            layer.originals.give_back(name)
        if name in self.prompts:
            del self.prompts[name]
        self.residents.forget(name, self.layouts)
        self.configs.pop(name, None)

    def _bare(self) -> None:
        """Layers and modules that have nothing of any adapter left give way to the base's own."""
        self.base.bare(self.residents.parts())
        if not self.base.layers:
            self.detours.restore(self.model)
        self._rename({})

    def unload(self, merge: bool = False, pristine: bool = False) -> nn.Module:
        """Take every adapter out: the model has its own module objects back; with `merge`, the merged weights too.

        Args:
            pristine: undo what adapters' starts (PiSSA ...) did to the base's weights; else it stays, as in PEFT.
        """
        self.look()
        for adapter in self.adapters.values():
            if adapter.biases is not None:
                adapter.biases.take_out(keep=merge and adapter.name in self.board.route.active)
        self.model._modules.pop("trimtab_biases", None)
        if merge:
            merging.settle(self.base)
        for layer in self.base.layers.values():
            if not merge and layer.originals.held:
                layer.unmerge()
            for taker in set(layer.originals.takers.values()) if pristine and not merge else ():
                layer.originals.give_back(taker)
        for layer in self.base.layers.values():
            self.base.swap(layer.path, layer.frozen)
        self.detours.restore(self.model)
        for path, wrapper in self.base.saved.items():
            self.base.swap(path, wrapper.chosen() if merge else wrapper.original_module)
        self.base.without_foreign(merge)
        weights.unpin(self.model)
        for attribute in ("_trimtab", "peft_config", "_hf_peft_config_loaded"):
            self.model.__dict__.pop(attribute, None)
        return self.model


def find_graft(model: nn.Module) -> Graft | None:
    """The graft of a model, or None."""
    return model.__dict__.get("_trimtab")


def grafted(model: nn.Module) -> Graft | None:
    """The graft of a model or of what is inside."""
    return next(filter(None, map(find_graft, model.modules())), None)
