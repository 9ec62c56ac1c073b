"""Putting adapters into a model and taking them out: match, build, check, swap in. Nothing changes until all is checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.method import INPUT_EMBEDDING, Method, PromptMethod, leaf_template
from trimtab.core.site import Site, site_class
from trimtab.core.targets import (
    CONDENSE_FROM,
    Target,
    condense,
    inside,
    matches,
    nearest,
    select,
    select_parameters,
    unused_patterns,
)
from trimtab.errors import AdapterNameError, ConfigError, NoMatchingPeftModuleError, PeftWarning
from trimtab.files.codec import EMBEDDINGS, Prompt, Slot, copy_keys, leaf_keys
from trimtab.files.experts import FORMER, rewrite
from trimtab.files.store import check_name
from trimtab.methods import default_targets, load, method_class
from trimtab.model.copies import SavedBiases, SavedModule
from trimtab.model.layer import AdaptedLayer
from trimtab.model.nesting import Detours, chains, place
from trimtab.model.leaves import Leaves
from trimtab.model.prompts import complete
from trimtab.model.reconcile import reconcile
from trimtab.core.report import warn
from trimtab.model.route import BASE, Board, unwatch_checkpointing, watch_checkpointing

RESIDENTS = 8  # adapters that stay in the module tree although they are neither active, trainable nor merged
HALF = (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass
class Adapter:
    """What the model knows of one adapter."""

    name: str
    config: Any
    method: type[Method]
    targets: list[Target] = field(default_factory=list)
    layers: list[AdaptedLayer] = field(default_factory=list)
    prompt: PromptMethod | None = None
    saved: list[SavedModule] = field(default_factory=list)
    biases: SavedBiases | None = None
    trainable: bool = False
    parked: bool = False

    @property
    def methods(self) -> list[Method]:
        """The adapter's own method at each of its sites."""
        return [m for layer in self.layers for m in layer.methods[self.name] if isinstance(m, self.method)]


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
        self.users: dict[str, list[tuple[nn.Module, str]]] = {}  # path -> every (parent, attribute) that holds the module
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
        if issubclass(method, PromptMethod):
            adapter.prompt = self._prompt(method, config)
        else:
            adapter.targets = self.select(config, method, strict)
        new: dict[str, AdaptedLayer] = {}
        saved: dict[str, SavedModule] = {}
        free = [] if self.adapters else [p for p in self.model.parameters() if p.requires_grad]
        try:
            for parameter in free:
                parameter.requires_grad_(False)
            if adapter.prompt is None:
                self._build(adapter, method, new, autocast, meta=tensors is not None)
                self._rename(new)
            self._copy_modules(adapter, saved)
            self._copy_biases(adapter)
            if not adapter.layers and not adapter.saved and adapter.prompt is None:
                raise NoMatchingPeftModuleError("The config selects nothing to train: name `target_modules` or `modules_to_save`.")
            if tensors is not None:
                own = self.slots(adapter)
                slots = [*own, *self.embeddings(adapter, reading=True)]
                values = tensors(slots)
                lacking = any(s.on_disk() not in values for s in own)
                if lacking or method.mutates(adapter.config):  # what the file does not say starts as it would anew
                    self._materialise(adapter)
                    self._start(adapter)
                for slot in slots:
                    if slot.on_disk() in values:
                        slot.put(values[slot.on_disk()])
            else:
                self._start(adapter)
        except BaseException:
            for layer in adapter.layers:
                layer.detach(name)
            for module in adapter.saved:
                module.detach(name)
            for leaves in self.commons.values():
                leaves.remove(name)
            for parameter in free:
                parameter.requires_grad_(True)
            self._rename({})
            raise
        for key, layer in new.items():
            self._swap(layer.path, layer)
            self.layers[key] = layer
            self.detours.take(layer.path, self.modules, self.model)
        for path, wrapper in saved.items():
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

    def select(self, config: Any, method: type[Method], strict: bool) -> list[Target]:
        """The modules the config adapts; completes its `target_modules` as it will be saved."""
        if not hasattr(config, "target_modules"):
            raise ConfigError(f"{type(config).__name__} does not adapt layers.")
        model_type = getattr(getattr(self.model, "config", None), "model_type", None)
        named = bool(getattr(config, "target_parameters", None))
        default = default_targets(config, model_type)
        if config.target_modules is None and named and (model_type in FORMER or default is None):
            config.target_modules = set()
        if config.target_modules is None:
            if default == INPUT_EMBEDDING:
                default = [self._path(self.model.get_input_embeddings())]  # type: ignore[operator]
            if default is None and not config.modules_to_save:
                raise ConfigError(
                    "Please specify `target_modules` or `target_parameters`in `peft_config`: there is no default for "
                    f"models of type {model_type!r}."
                )
            config.target_modules = default if isinstance(default, str) else set(default or ())
        for field_name, table in getattr(method, "defaults", {}).items():
            if getattr(config, field_name) is None:
                if model_type not in table:
                    raise ConfigError(f"Please specify `{field_name}` in `peft_config`: there is no default for models of type {model_type!r}.")
                setattr(config, field_name, set(table[model_type]))
        kinds = {n: self.kind(m) for n, m in self.modules.items()}
        head = self._head()
        linear = [n for n, m in self.modules.items() if kinds[n] == "linear" and m is not head and callable_linear(m)]
        if done := rewrite(config, model_type, self.modules, linear):
            warn(done)
        if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
            config.target_modules = {n for n in linear if not inside(config.modules_to_save, n)}
        targets = self._parts(select(kinds, config, strict=strict))
        if getattr(config, "target_parameters", None):
            names = [f"{n}.{p}" for n, m in self.modules.items() for p, v in m._parameters.items() if v is not None]
            targets += select_parameters(names, config.target_parameters, strict)
            if not targets:
                raise NoMatchingPeftModuleError(
                    "No `target_modules` passed but also no `target_parameters` found. Please check the values for "
                    f"these arguments.{nearest(config.target_parameters, names)}"
                )
        for target in targets:
            if target.kind not in method.kinds:
                module = self.modules[target.module]
                raise ConfigError(
                    f"Target module {module} is not supported by {method.__name__} ('{target.name}'). Currently, only "
                    f"layers of these kinds are: {', '.join(sorted(method.kinds))}."
                )
        if isinstance(config.target_modules, set) and len(config.target_modules) >= CONDENSE_FROM:
            wanted = config.target_modules
            short = condense(wanted, (n for n in self.modules if matches(wanted, n) is None))
            if len(short) < len(config.target_modules):
                config.target_modules = short
        if flipped := [site_class(self.modules[t.name]).flipped for t in targets if t.kind == "linear"]:  # type: ignore[union-attr]
            if getattr(config, "fan_in_fan_out", False) and not any(flipped):
                warn("`fan_in_fan_out` is True, but the weights of the layers adapted lie (out, in): it is False here.")
            if hasattr(config, "fan_in_fan_out"):
                config.fan_in_fan_out = flipped[-1]  # how PEFT notes it
        names = [t.name for t in targets]
        for field_name in config.patterns:
            if unused := unused_patterns(getattr(config, field_name, {}) or {}, names):
                warn(f"`{field_name}` keys {unused} fit none of the adapted modules.{nearest(unused, kinds)}")
        return targets

    def _prompt(self, method: type[PromptMethod], config: Any) -> PromptMethod:
        """The prompt of an adapter, started as the config says."""
        complete(config, self.model, method.cached)
        prompt = method()
        prompt.build(config)
        with torch.no_grad():
            prompt.reset(config, self.model)
        embeddings = self.model.get_input_embeddings()  # type: ignore[operator]
        return prompt.to(embeddings.weight.device)

    @staticmethod
    def kind(module: nn.Module) -> str | None:
        """The kind of site a module is."""
        cls = site_class(module)
        return cls.kind if cls else None

    def _head(self) -> nn.Module | None:
        head = getattr(self.model, "get_output_embeddings", None)
        return head() if head is not None else None

    def _parts(self, targets: list[Target]) -> list[Target]:
        """Without the layers that are adapted along with the one they are part of."""
        found = {t.name: site_class(self.modules[t.name]) for t in targets}
        part = lambda path: (whole := found.get(path.rpartition(".")[0])) and path.rpartition(".")[2] in whole.parts
        return [t for t in targets if not part(t.name)]

    def _rename(self, new: Mapping[str, AdaptedLayer]) -> None:
        """Tell the layers their paths, which change when others come to stand around them."""
        layers = [*self.layers.values(), *new.values()]
        around = chains(layers)
        for layer in layers:
            layer.name = place(layer, around)

    def _layer(self, key: str, param: str, new: dict[str, AdaptedLayer]) -> AdaptedLayer:
        """The adapted layer of a module, or of a parameter of it (whose path is then `key`)."""
        path = key.removesuffix(f".{param}") if param else key
        if path in self.saved:
            raise ConfigError(f"'{path}' is trained whole (`modules_to_save`) by another adapter: it cannot be adapted as well.")
        layer = self.layers.get(key) or new.get(key)
        if layer is not None:
            return layer
        base = self.modules[path]
        keys = [path, *(f"{path}.{name}" for name in base._parameters)]
        others = [x for k in keys if (x := self.layers.get(k) or new.get(k))]
        if others:
            base = max(others, key=lambda x: len(x.prefix))
        layer = new[key] = AdaptedLayer(base, path, self.board)
        layer.param = param
        return layer

    def _build(self, adapter: Adapter, method: type[Method], new: dict[str, AdaptedLayer], autocast: bool, meta: bool) -> None:
        """Give each target's layer the adapter's method and its tensors, empty."""
        plans: dict[str, list[tuple[type[Method], Any, str]]] = {
            t.name: [(method, adapter.config.resolve(t.name), "")] for t in adapter.targets
        }
        for target in adapter.targets if method.tied else ():
            for path in self._tied(target.name):
                plans.setdefault(path, plans[target.name])
        for path, config in self._tokens(adapter.config).items():
            plans.setdefault(path, []).append((load("trainable_tokens", "TrainableTokens"), config, "token_adapter."))
        params = {t.name: t.param for t in adapter.targets if t.param}
        for target in adapter.targets:
            for part in getattr(site_class(self.modules[target.module], target.param or None), "parts", ()):
                plans[f"{target.name}.{part}"] = plans[target.name]
        homes: dict[int, AdaptedLayer] = {}
        for path, wanted in plans.items():
            layer = self._layer(path, params.get(path, ""), new)
            methods, leaves = [], []
            for cls, config, prefix in wanted:
                site = next(iter(layer.sites.values()), None) or self._site(layer, path, new)
                layer.factory = self._factory(site, autocast, meta)
                one = cls(layer, site, adapter.name, config, self.commons)
                tensors = one.build(site, config)
                templates = {one.leaf(prefix + leaf_template(n)): _parameter(t, site, n in one.frozen) for n, t in tensors.items()}
                if cls.tied:
                    one.home = homes.setdefault(id(layer.frozen._parameters["weight"]), layer)
                methods.append(one)
                leaves.append(templates if one.home is layer else {})
            layer.attach(adapter.name, methods, leaves)
            adapter.layers.append(layer)
        for name, tensor in method.share(adapter.config, [m.site for m in adapter.methods]).items():
            first = adapter.methods[0]
            tensor = tensor.to(device=first.site.device, dtype=first.layer.factory["dtype"])
            self.commons.setdefault(name, Leaves()).put(adapter.name, "", tensor)

    def _site(self, layer: AdaptedLayer, name: str, new: Mapping[str, AdaptedLayer]) -> Site:
        """The site of a new layer, whose parameter no other layer may adapt."""
        cls = site_class(layer.frozen, layer.param or None)
        assert cls is not None
        site = cls(layer, name, layer.param)
        for other in (*self.layers.values(), *new.values()):
            if other.path == layer.path and site.param in other.sites:
                raise ConfigError(
                    f"'{layer.path}.{site.param}' is adapted as a layer (`target_modules`) and by name "
                    "(`target_parameters`): name it in one of them only."
                )
        return site

    @staticmethod
    def _factory(site: Site, autocast: bool, meta: bool) -> dict[str, Any]:
        stored = site.stored(site.param)  # a quantised layer's adapters are fp32: whole numbers cannot be trained
        dtype = torch.float32 if stored is None else stored.dtype
        return {
            "dtype": torch.float32 if (autocast and dtype in HALF) or not dtype.is_floating_point else dtype,
            "device": torch.device("meta") if meta else site.device,
        }

    def _tokens(self, config: Any) -> dict[str, Any]:
        """Embedding path -> config of its trainable tokens, for adapters that train some beside their own change."""
        wanted = getattr(config, "trainable_token_indices", None)
        if not wanted:
            return {}
        if isinstance(wanted, list):
            wanted = {self._path(self.model.get_input_embeddings()): wanted}  # type: ignore[operator]
        cls = load("trainable_tokens", "TrainableTokensConfig")
        found: dict[str, Any] = {}
        for key, tokens in wanted.items():
            paths = [n for n in self.modules if matches({key}, n)]
            if not paths:
                raise NoMatchingPeftModuleError(f"`trainable_token_indices` names '{key}', which is no module.{nearest([key], self.modules)}")
            for path in paths:
                for name in [path, *self._tied(path)]:
                    found[name] = cls(token_indices=list(tokens))
        return found

    def _tied(self, path: str) -> list[str]:
        """The other modules that hold the same weight."""
        return [n for names in self.ties if path in names for n in names if n != path]

    def _path(self, module: nn.Module) -> str:
        module = getattr(module, "base_layer", module)
        return next(n for n, m in self.modules.items() if m is module)

    def _copy_modules(self, adapter: Adapter, saved: dict[str, SavedModule]) -> None:
        """Copy the modules the adapter trains whole."""
        wanted = set(adapter.config.modules_to_save or ())
        found: set[str] = set()
        for path, module in self.modules.items():
            why = matches(wanted, path)
            if why is None or isinstance(module, SavedModule | nn.ModuleList | nn.ModuleDict):
                continue
            found.add(why)
            if any(layer.path == path for layer in (*self.layers.values(), *adapter.layers)):
                raise ConfigError(f"'{path}' is adapted already: it cannot be trained whole (`modules_to_save`) as well.")
            wrapper = self.saved.get(path)
            if wrapper is None:
                wrapper = saved[path] = SavedModule(module, path, self.board)
            wrapper.attach(adapter.name)
            adapter.saved.append(wrapper)
        missed = wanted - found - set(getattr(adapter.config, "heads", ()))
        if missed:
            warn(f"`modules_to_save` {sorted(missed)} fit no module of the model.{nearest(missed, dict.fromkeys(self.modules, ''))}")

    def _copy_biases(self, adapter: Adapter) -> None:
        """Take over the biases the adapter trains."""
        kind = getattr(adapter.config, "bias", "none")
        if kind == "none" or not isinstance(kind, str) or not hasattr(adapter.config, "bias"):
            return
        if any(a.biases for a in self.adapters.values()):
            raise ConfigError("Only 1 adapter with bias is supported. When using multiple adapters, set bias to 'none' for all adapters.")
        adapted = {layer.path for layer in adapter.layers}
        names = self.modules if kind == "all" else adapted
        bases = {n: self.modules[n] for n in names}
        whole = {*self.saved, *(s.name for s in adapter.saved)}
        biased = {n: m for n, m in bases.items() if m._parameters.get("bias") is not None and not _under(n, whole)}
        adapter.biases = SavedBiases(biased)

    def _start(self, adapter: Adapter) -> None:
        """Give the tensors their starting values."""
        with torch.no_grad():
            for layer in adapter.layers:
                for method in layer.methods[adapter.name]:
                    if method.home is layer and (W := method.reset(method.options)) is not None:
                        layer.mutate(adapter.name, method.site, W)

    @staticmethod
    def _materialise(adapter: Adapter) -> None:
        """Give tensors that were built without storage theirs."""
        for layer in adapter.layers:
            for method in layer.methods[adapter.name]:
                for template in method._leaves.values() if method.home is layer else ():
                    holder, name = _holder(layer, template, adapter.name)
                    old = holder._parameters.get(name)
                    if old is not None and old.device.type == "meta":
                        holder._parameters[name] = nn.Parameter(torch.empty_like(old, device=method.site.device))

    def _swap(self, path: str, new: nn.Module) -> None:
        """Put a module where the one of that path stands, at every place that holds it."""
        for parent, attribute in self.users[path]:
            parent._modules[attribute] = new

    # ------------------------------------------------------------------ tensors by name
    def slots(self, adapter: Adapter) -> list[Slot]:
        """Every tensor of an adapter: its key in memory and on disk (without prefix), and where it lives."""
        slots: list[Slot] = []
        alone = chains(adapter.layers, adapter.name)
        for layer in adapter.layers:
            own = place(layer, alone)
            for method in layer.methods[adapter.name]:
                if method.home is not layer:
                    continue
                for leaf, template in method._leaves.items():
                    memory, disk = leaf_keys(layer.name, template, adapter.name)
                    disk = disk if own == layer.name else leaf_keys(own, template, adapter.name)[1]
                    holder, name = _holder(layer, template, adapter.name)
                    stored = method.stored(adapter.config, template)
                    slots.append(Slot(memory, disk, holder, name, optional=not stored, method=method, leaf=leaf))
        for name, leaves in self.commons.items():
            if adapter.name in leaves:
                stored = adapter.method.stored(adapter.config, name)
                slots.append(Slot(f"{name}.{adapter.name}", name, leaves, adapter.name, optional=not stored, shared=True))
        for wrapper in adapter.saved:
            module = wrapper.modules_to_save[adapter.name]
            for key in module.state_dict():
                path, _, name = key.rpartition(".")
                memory, disk = copy_keys(wrapper.name, key, adapter.name)
                slot = Slot(memory, disk, module.get_submodule(path), name, shared=adapter.prompt is not None)
                slots.append(slot)
        if adapter.biases is not None:
            names = {x.path: x.name for x in (*self.layers.values(), *adapter.layers)}
            for path in adapter.biases.own:
                key = f"{names[path]}.base_layer.bias" if path in names else f"{path}.bias"
                slots.append(Slot(key, key, adapter.biases.own, path))
        if adapter.prompt is not None:
            slots.append(Slot(f"prompt_encoder.{adapter.name}", "prompt_embeddings", Prompt(adapter.prompt), "", bare=True))
        return slots

    def embeddings(self, adapter: Adapter, reading: bool = False) -> list[Slot]:
        """The base weights of the model's embeddings, which are saved along when they are adapted or resized.

        With `reading`, under every key that a file may have them by: PEFT's depends on what other adapters were there.
        """
        forms = ("weight", "base_layer.weight", "token_adapter.base_layer.weight")
        found = []
        for getter in ("get_input_embeddings", "get_output_embeddings"):
            module = getattr(self.model, getter, lambda: None)()
            if module is None or isinstance(module, SavedModule):
                continue
            base = getattr(module, "base_layer", module)
            path = self._path(base)
            if path in {wrapper.name for wrapper in adapter.saved}:  # the key is the copy's, not the base's
                continue
            if base._parameters.get("weight") is None:
                continue
            memory = f"{path}.{forms[base is not module]}"
            leaves = [t for x in adapter.layers if x.path == path for m in x.methods[adapter.name] for t in m._leaves.values()]
            own = forms[0 if not leaves else 2 if all(t.startswith("token_adapter.") for t in leaves) else 1]
            disks = [f"{path}.{form}" for form in (forms if reading else (own,))]
            found += [Slot(memory, disk, base, "weight", optional=True) for disk in disks]
        return found

    def targets_embeddings(self, adapter: Adapter) -> bool:
        """Whether the adapter adapts one of the embeddings that PEFT then saves along."""
        wanted = getattr(adapter.config, "target_modules", None) or ()  # in a regular expression as text
        return any(name in wanted for name in EMBEDDINGS)

    # ------------------------------------------------------------------ states
    def set_active(self, names: Sequence[str], trainable: bool | None = True) -> None:
        """Use these adapters, innermost first, and make them the trainable ones (None: leave that as it is)."""
        for name in names:
            self.require(name)
        before = self.board.route.active
        self.board.set(active=tuple(names))
        if trainable is not None:
            for name in [n for n, a in self.adapters.items() if a.trainable and n not in names] if trainable else before:
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
        for part in (*adapter.layers, *adapter.saved):
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
            needed = name in route.active or adapter.trainable or any(name in x.merged_adapters for x in adapter.layers[:1])
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
    def merge(self, names: Sequence[str] | None, safe: bool, keep: bool = True, progress: Callable[[Any], Any] = iter) -> None:
        """Fold adapters into the base (the active ones by default): all layers or, on an error, none."""
        chosen = list(self.board.route.active if names is None else names)
        for name in chosen:
            self.require(name)
        done: list[AdaptedLayer] = []
        merged = list(self.merged)
        if merged and not set(chosen) - set(merged):
            warn(f"Adapters {chosen} are merged already; nothing was done.")
            return
        try:
            for layer in progress(list(self.layers.values())):
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
        self._untie(chosen)

    @property
    def merged(self) -> list[str]:
        """The adapters that are merged into the base."""
        return list(dict.fromkeys(n for layer in self.layers.values() for n in layer.merged_adapters))

    def _untie(self, names: Sequence[str]) -> None:
        """After a merge: layers that shared a weight may hold different ones now. Say so, and correct the config."""
        for owners in self.ties:
            changed = {p for p in owners if p in self.layers and self.layers[p].merged_adapters}
            if not changed:
                continue
            weights = {p: self.modules[p]._parameters["weight"] for p in owners}
            first = next(iter(weights.values()))
            if all(torch.equal(first, w) for w in weights.values()):  # one delta for both: they stay tied
                for path in owners:
                    self.modules[path]._parameters["weight"] = first
                continue
            config = getattr(self.model, "config", None)
            if config is not None and getattr(config, "tie_word_embeddings", False):
                config.tie_word_embeddings = False
                self.untied = True
            warn(
                f"{owners} share one weight, and adapters {list(names)} change it differently at each: after the merge "
                "each has its own copy, and `tie_word_embeddings` of the model's config is False."
            )

    def unmerge(self) -> None:
        """Put the base's original weights back."""
        if not self.merged:
            warn("Already unmerged, nothing to do.")
        for layer in self.layers.values():
            layer.unmerge()
        if self.untied:
            self.model.config.tie_word_embeddings = True  # type: ignore[union-attr]
            self.untied = False

    def delete(self, name: str) -> None:
        """Forget an adapter; layers that have none left become the plain modules they were."""
        adapter = self.require(name)
        if name in self.merged:
            raise ValueError(f"Adapter '{name}' is merged into the base: call unmerge_adapter() first.")
        if adapter.biases is not None:
            adapter.biases.switch(False)
            self.biased.remove(name)
        for part in (*adapter.layers, *adapter.saved):
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
        for attribute in ("_trimtab", "peft_config"):
            self.model.__dict__.pop(attribute, None)
        return self.model


def callable_linear(module: nn.Module) -> bool:
    """Whether a Linear is one that "all-linear" means: it is called, and gives its product (routers give more)."""
    cls: Any = site_class(module)
    return not cls.reads and "router" not in type(module).__name__.lower()


def _under(name: str, paths: set[str]) -> bool:
    """Whether the module `name` is one of `paths` or lies below one."""
    segments = name.split(".")
    return any(".".join(segments[: i + 1]) in paths for i in range(len(segments)))


def _parameter(tensor: Tensor, site: Site, frozen: bool) -> Tensor:
    """A built tensor as what is stored: floating-point tensors are trained."""
    if isinstance(tensor, nn.Parameter) or not tensor.is_floating_point():
        return tensor
    parameter = nn.Parameter(tensor, requires_grad=not frozen)
    if tensor.device.type == "meta":
        parameter.target_device = site.device  # type: ignore[attr-defined]
    return parameter


def _holder(layer: AdaptedLayer, template: str, adapter: str) -> tuple[Any, str]:
    """Where a leaf's tensor is registered: (module, name)."""
    container, _, rest = template.partition(".{}")
    leaves: Any = layer.containers[container]
    if rest:
        return leaves[adapter], rest.removeprefix(".")
    return (leaves.parked if adapter in leaves.parked else leaves), adapter


def find_graft(model: nn.Module) -> Graft | None:
    """The graft of a model, or None."""
    return model.__dict__.get("_trimtab")
