"""Putting adapters into a model and taking them out: match, build, check, swap in; nothing changes before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from trimtab.core.method import PromptMethod
from trimtab.core.report import warn
from trimtab.errors import AdapterNameError, NoMatchingPeftModuleError
from trimtab.files.codec import Slot
from trimtab.files.store import check_name
from trimtab.graft import merging, slots
from trimtab.graft.adapters import Adapter
from trimtab.graft.nesting import Detours, chains, place
from trimtab.graft.reconcile import reconcile
from trimtab.graft.selection import choose
from trimtab.graft.staging import Staged
from trimtab.layer.adapted import AdaptedLayer
from trimtab.layer.copies import SavedModule
from trimtab.layer.leaves import Leaves
from trimtab.layer.plan import BASE, Board, unwatch_checkpointing, watch_checkpointing
from trimtab.methods import method_class

RESIDENTS = 8  # adapters that stay in the module tree although they are neither active, trainable nor merged


class Graft:
    """All adapters of one model. It hangs on the model as `_trimtab`, so that every way to add one finds it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.board = Board()
        self.adapters: dict[str, Adapter] = {}
        self.biased: list[str] = []  # those that train biases of the base
        self.layers: dict[str, AdaptedLayer] = {}
        self.saved: dict[str, SavedModule] = {}
        self.prompts = nn.ModuleDict()
        self.commons: dict[str, Leaves] = {}  # name -> {adapter: tensor} of what adapters keep once for all sites
        self.modules: dict[str, nn.Module] = {}
        self.users: dict[
            str, list[tuple[nn.Module, str]]
        ] = {}  # path -> every (parent, attribute) that holds the module
        self.ties: list[list[str]] = []  # the modules that hold one parameter between them
        paths = {id(module): name for name, module in model.named_modules()}
        owners: dict[int, list[str]] = {}
        for name, module in model.named_modules():
            if name:
                self.modules[name] = module
            for attribute, child in module._modules.items():
                if child is not None:
                    self.users.setdefault(paths[id(child)], []).append((module, attribute))
            for parameter in module._parameters.values():
                if parameter is not None:
                    owners.setdefault(id(parameter), []).append(name)
        self.ties = [names for names in owners.values() if len(names) > 1]
        self.detours = Detours()
        self.untied = False  # a merge gave tied layers weights of their own
        watch_checkpointing(model, self.board)

    @staticmethod
    def of(model: nn.Module) -> Graft:
        """The model's graft, made at first."""
        graft = model.__dict__.get("_trimtab")
        if graft is not None and not reconcile(graft):
            unwatch_checkpointing(model)
            graft = None
        if graft is None:
            graft = model.__dict__["_trimtab"] = Graft(model)
        return graft

    # ------------------------------------------------------------------ adding
    def add(
        self,
        name: str,
        config: Any,
        tensors: Callable[[list[Slot]], Mapping[str, Tensor]] | None = None,
        autocast: bool = True,
        trainable: bool | None = None,
        strict: bool = False,
    ) -> Adapter:
        """Add an adapter.

        Args:
            name: its name.
            config: its config; a copy of it is kept, completed from the model.
            tensors: given the adapter's slots (built without storage), check and return {key on disk: value} to start
                from; None: start as the config says.
            autocast: adapters of half-precision layers are kept in fp32.
            trainable: whether it starts trainable; by default unless the config says `inference_mode`.
            strict: targets that fit nothing are errors even when others fit.
        """
        check_name(name)
        if name in self.adapters:
            raise AdapterNameError(f"Adapter with name '{name}' already exists.")
        if name == BASE:
            raise AdapterNameError(f"'{BASE}' stands for no adapter in a mixed batch: it cannot name one.")
        config = config.copy()
        config.check()
        method = method_class(config)
        method.admit(config, [a.config for a in self.adapters.values() if a.method is method])
        adapter = Adapter(name, config, method, trainable=not config.inference_mode if trainable is None else trainable)
        staged = Staged(self, adapter, autocast, meta=tensors is not None)
        if issubclass(method, PromptMethod):
            staged.prompt()
        else:
            adapter.targets = choose(self, config, method, strict)
        free = [] if self.adapters else [p for p in self.model.parameters() if p.requires_grad]
        try:
            for parameter in free:
                parameter.requires_grad_(False)
            if adapter.prompt is None:
                staged.layers()
                self._rename(staged.new)
            staged.copies()
            staged.biases()
            if not adapter.layers and not adapter.saved and adapter.prompt is None:
                raise NoMatchingPeftModuleError(
                    "The config selects nothing to train: name `target_modules` or `modules_to_save`."
                )
            if tensors is not None:
                own = self.slots(adapter)
                wanted = [*own, *self.embeddings(adapter, reading=True)]
                values = tensors(wanted)
                lacking = any(s.on_disk() not in values for s in own)
                if lacking or method.mutates(adapter.config):  # what the file does not say starts as it would anew
                    staged.materialise()
                    staged.start()
                for slot in wanted:
                    if slot.on_disk() in values:
                        slot.put(values[slot.on_disk()])
            else:
                staged.start()
        except BaseException:
            staged.undo()
            for parameter in free:
                parameter.requires_grad_(True)
            self._rename({})
            raise
        for key, layer in staged.new.items():
            self._swap(layer.path, layer)
            self.layers[key] = layer
            self.detours.take(layer.path, self.modules, self.model)
        for path, wrapper in staged.saved.items():
            self._swap(path, wrapper)
            self.saved[path] = wrapper
        if adapter.prompt is not None:
            self.prompts[name] = adapter.prompt
        self.adapters[name] = adapter
        if adapter.biases is not None:
            self.biased.append(name)
        self.set_trainable(name, adapter.trainable)
        self.settle()
        return adapter

    def _rename(self, new: Mapping[str, AdaptedLayer]) -> None:
        """Tell the layers their paths, which change when others come to stand around them."""
        layers = [*self.layers.values(), *new.values()]
        around = chains(layers)
        for layer in layers:
            layer.name = place(layer, around)

    def _swap(self, path: str, new: nn.Module) -> None:
        """Put a module where the one of that path stands, at every place that holds it."""
        for parent, attribute in self.users[path]:
            parent._modules[attribute] = new

    # ------------------------------------------------------------------ tensors by name
    def slots(self, adapter: Adapter) -> list[Slot]:
        """Every tensor of an adapter; see `slots.slots`."""
        return slots.slots(self, adapter)

    def embeddings(self, adapter: Adapter, reading: bool = False) -> list[Slot]:
        """The base weights of the model's embeddings; see `slots.embeddings`."""
        return slots.embeddings(self, adapter, reading)

    # ------------------------------------------------------------------ states
    def set_active(self, names: Sequence[str], trainable: bool | None = True) -> None:
        """Use these adapters, innermost first, and make them the trainable ones (None: leave that as it is)."""
        for name in names:
            self.require(name)
        before = self.board.route.active
        self.board.set(active=tuple(names))
        if trainable is not None:
            for name in (
                [n for n, a in self.adapters.items() if a.trainable and n not in names] if trainable else before
            ):
                self.set_trainable(name, False)
            for name in names:
                self.set_trainable(name, trainable)
        self._place_biases()
        self.settle()

    def set_enabled(self, enabled: bool) -> None:
        """Switch all adapters on or off."""
        self.board.set(enabled=enabled)
        self._place_biases()

    def set_trainable(self, name: str, trainable: bool) -> None:
        """Make an adapter trainable or frozen, active or not."""
        adapter = self.require(name)
        adapter.trainable = trainable
        for part in adapter.parts:
            part.set_requires_grad(name, trainable)
        for parameter in adapter.biases.parameters() if adapter.biases else ():
            parameter.requires_grad_(trainable)
        if adapter.prompt is not None:
            adapter.prompt.requires_grad_(trainable)
        for leaves in self.commons.values():
            if name in leaves and isinstance(leaves[name], nn.Parameter):
                leaves[name].requires_grad_(trainable)

    def _place_biases(self) -> None:
        route = self.board.route
        for name in self.biased:
            biases = self.adapters[name].biases
            assert biases is not None
            biases.switch(route.enabled and name in route.active)

    def settle(self) -> None:
        """Keep in the module tree the adapters that are in use and the few last used; park the others."""
        route = self.board.route
        free = []
        for name, adapter in self.adapters.items():
            needed = (
                name in route.active or adapter.trainable or any(name in x.merged_adapters for x in adapter.layers[:1])
            )
            if needed and adapter.parked:
                self._move(adapter, "unpark")
            elif not needed and not adapter.parked and not adapter.saved:
                free.append(adapter)
        for adapter in free[: max(0, len(free) - RESIDENTS)]:
            self._move(adapter, "park")

    @staticmethod
    def _move(adapter: Adapter, how: str) -> None:
        for layer in adapter.layers:
            for leaves in layer.leaves():
                getattr(leaves, how)(adapter.name)
        adapter.parked = how == "park"

    def require(self, name: str) -> Adapter:
        """The adapter of that name, or an error that lists the ones there are."""
        if name not in self.adapters:
            raise AdapterNameError(f"Adapter {name} not found. Known: {list(self.adapters)}.")
        return self.adapters[name]

    # ------------------------------------------------------------------ merging and taking out
    def merge(
        self, names: Sequence[str] | None, safe: bool, keep: bool = True, progress: Callable[[Any], Any] = iter
    ) -> None:
        """Fold adapters into the base (the active ones by default): all layers or, on an error, none."""
        merging.merge(self, names, safe, keep, progress)

    def unmerge(self) -> None:
        """Put the base's original weights back."""
        merging.unmerge(self)

    @property
    def merged(self) -> list[str]:
        """The adapters that are merged into the base."""
        return merging.merged_adapters(self)

    def delete(self, name: str) -> None:
        """Forget an adapter; layers that have none left become the plain modules they were."""
        adapter = self.require(name)
        if name in self.merged:
            raise ValueError(
                f"Cannot delete adapter(s) ['{name}'] while they are merged. Please unmerge them first: "
                "call unmerge_adapter()."
            )
        if adapter.biases is not None:
            adapter.biases.switch(False)
            self.biased.remove(name)
        for part in adapter.parts:
            part.detach(name)
        for leaves in self.commons.values():
            leaves.remove(name)
        if adapter.prompt is not None:
            del self.prompts[name]
        del self.adapters[name]
        active = [n for n in self.board.route.active if n != name]
        if len(active) != len(self.board.route.active):
            if not active and self.adapters:
                active = [next(iter(self.adapters))]
                warn(f"Adapter {name} was active which is now deleted. Setting active adapter to {active[0]}.")
            self.set_active(active, trainable=adapter.trainable)

    def unload(self, merge: bool = False) -> nn.Module:
        """Take every adapter out: the model has its own module objects back; with `merge`, the merged weights too."""
        for adapter in self.adapters.values():
            if adapter.biases is not None:
                adapter.biases.switch(merge and adapter.name in self.board.route.active)
        for layer in self.layers.values():
            if not merge:
                layer.restore()
            self._swap(layer.path, layer.frozen)
        self.detours.restore()
        for path, wrapper in self.saved.items():
            self._swap(path, wrapper.chosen() if merge else wrapper.original_module)
        unwatch_checkpointing(self.model)
        for attribute in ("_trimtab", "peft_config", "_hf_peft_config_loaded"):
            self.model.__dict__.pop(attribute, None)
        return self.model


def find_graft(model: nn.Module) -> Graft | None:
    """The graft of a model, or None."""
    return model.__dict__.get("_trimtab")
