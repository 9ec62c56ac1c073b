"""An adapter on its way into a model: everything is built and checked here before the model changes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from trimtab.core.method import Leaf, Method, leaf_template
from trimtab.core.report import warn
from trimtab.core.site import Site, Sites, site_class
from trimtab.core.targets import Target, matches, nearest
from trimtab.errors import ConfigError
from trimtab.graft.adapters import Adapter, Kind, Layout, Place, common
from trimtab.graft.base import Base
from trimtab.graft.foreign import foreign_layer
from trimtab.graft.selection import FOREIGN, TIED, Pick, choose, companions
from trimtab.graft.stack import replicate
from trimtab.layer.adapted import AdaptedLayer
from trimtab.layer.biases import TrainedBiases
from trimtab.layer.copies import SavedModule
from trimtab.layer.leaves import Leaves
from trimtab.layer.plan import Board

OWN_FIELDS = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "task_type", "auto_mapping")
HALF = (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
Wanted = tuple[type[Method], Any, str]  # a method, its config at the site, the prefix of its leaves


class Stage:
    """What an adapter brings, before it is swapped in.

    Attributes:
        new: layers that are adapted for the first time.
        saved: modules that are trained whole for the first time.
        foreign: layers that a user's class makes.
    """

    def __init__(self, base: Base, board: Board) -> None:
        self.base, self.board = base, board
        self.new: dict[str, AdaptedLayer] = {}
        self.saved: dict[str, SavedModule] = {}
        self.foreign: dict[str, Any] = {}

    # ------------------------------------------------------------------ layers
    def layout(
        self,
        config: Any,
        method: type[Method],
        autocast: bool,
        strict: bool,
        known: dict[str, Layout],
        pick: Pick | None = None,
    ) -> Layout:
        """The adapter's methods at its targets' layers, and the tensors they have there; completes the config.

        Args:
            known: by config, of adapters that were added before; a new one is put in.
            pick: see `choose`; what it takes is its own affair, so that no known layout stands for it.
        """
        replicate(self.base, config)
        if pick is not None or self.base.foreign or config.custom_modules:
            return self._laid_out(config, method, choose(self.base, config, method, strict, pick), autocast)
        key = json.dumps({**config.to_json(), **dict.fromkeys(OWN_FIELDS), "autocast": autocast}, default=str)
        found = known.get(key)
        if found is not None and self._stands(found, autocast):
            complete = found.config.copy()
            for field in {f.name for f in dataclasses.fields(config)} - config.runtime - set(OWN_FIELDS):
                setattr(config, field, getattr(complete, field))
            known[key] = known.pop(key)  # the last used is the last to go
            return found
        layout = self._laid_out(config, method, choose(self.base, config, method, strict), autocast)
        layout.config = config.copy()
        known[key] = layout
        return layout

    def _stands(self, layout: Layout, autocast: bool) -> bool:
        """Whether a layout's layers are still in the model, and in the number formats they had."""
        live = set(map(id, self.base.layers.values()))
        return bool(layout.places) and all(
            id(p.layer) in live and kind_of(p.method.site, autocast) == p.kind for p in layout.places
        )

    def _laid_out(self, config: Any, method: type[Method], targets: list[Target], autocast: bool) -> Layout:
        layout = Layout(config, targets)
        layout.foreign = [t.name for t in targets if t.kind == FOREIGN]
        targets = [t for t in targets if t.kind != FOREIGN]
        plans = self._plans(config, method, targets)
        params = {t.name: t.param for t in targets if t.param}
        sites = {path: self._site(path, params.get(path, "")) for path in plans}
        own = [sites[path] for path, wanted in plans.items() if any(cls is method for cls, _, _ in wanted)]
        layout.shared = method.share(config, Sites(self.base.model, own))
        homes: dict[tuple[int, int], int] = {}
        keepers, at = method.joint(config, own), []  # at: the place of each of `own`
        for path, wanted in plans.items():
            site = sites[path]
            layer: AdaptedLayer = site.owner
            kind = kind_of(site, autocast)
            for cls, options, prefix in wanted:
                leaves = cls.leaves(site, options, layout.shared)
                formula = cls(layer, site, "", options)
                borrowed: dict[str, int] = {}
                if cls is method:
                    formula.peers, formula.position = own, own.index(site)
                    at.append(len(layout.places))
                    kept = {leaf: at[by[formula.position]] for leaf, by in keepers.items()}
                    borrowed = {leaf: i for leaf, i in kept.items() if i != len(layout.places)}
                home = len(layout.places)
                if cls.tied:
                    shared = id(layer.frozen._parameters.get(site.param, layer))
                    home = homes.setdefault((shared, id(options)), home)
                formula.declared = leaves
                formula.templates = {name: leaf_template(prefix + leaf_template(name)) for name in leaves}
                formula.trained = tuple(name for name, leaf in leaves.items() if trains(leaf))
                own_leaves = {n: x for n, x in leaves.items() if n not in borrowed and home == len(layout.places)}
                layout.places.append(Place(layer, formula, own_leaves, kind, home, options is config, borrowed))
        if own:
            layout.shared_kind = kind_of(own[0], autocast)
        return layout

    def _plans(self, config: Any, method: type[Method], targets: list[Target]) -> dict[str, list[Wanted]]:
        """Path -> the methods there."""
        plans: dict[str, list[Wanted]] = {t.name: [(method, config.resolve(t.name), "")] for t in targets}
        for target in targets:
            for path in self.base.tied(target.name) if target.kind in method.tied else ():
                plans[path] = plans[target.name]
        beside = companions(self.base, config)
        if any(path in plans for path in beside):  # of tied modules the first keeps the tensors: as `beside` has it
            plans = {path: plans.get(path, []) for path in (*beside, *plans)}
        leads: dict[int, str] = {}  # companion's config -> the first module it is at, which the others are tied to
        for path, companion in beside.items():
            lead = leads.setdefault(id(companion[1]), path)
            own = plans.get(path, [])
            # What follows a tied layer is there before the adapter's own change, as that layer's weight is: as in PEFT.
            follows = path != lead and not any(cls is method for cls, _, _ in plans[lead])
            plans[path] = [companion, *own] if follows else [*own, companion]
        for target in targets:
            cls = site_class(self.base.modules[target.module], target.param or None)
            for part in getattr(cls, "parts", ()):
                plans[f"{target.name}.{part}"] = plans[target.name]
        return plans

    def _layer(self, key: str, param: str) -> AdaptedLayer:
        """The adapted layer of a module, or of a parameter of it (whose path is then `key`)."""
        path = key.removesuffix(f".{param}") if param else key
        if path in self.base.saved:
            raise ConfigError(
                f"'{path}' is trained whole (`modules_to_save`) by another adapter: it cannot be adapted as well."
            )
        if path in self.base.foreign:
            raise ConfigError(f"The layer at '{path}' is of a class of its own: only a LoRA can come to it.")
        layer = self.base.layers.get(key) or self.new.get(key)
        if layer is not None:
            return layer
        around = [*self.base.layers_at(path), *(x for x in self.new.values() if x.path == path)]
        below = max(around, key=lambda x: len(x.prefix), default=self.base.modules[path])
        layer = self.new[key] = AdaptedLayer(below, path, self.board)
        layer.param = param
        return layer

    def _site(self, key: str, param: str) -> Site:
        """The site of a layer, whose parameter no other layer may adapt."""
        layer = self._layer(key, param)
        if layer.sites:
            return next(iter(layer.sites.values()))
        cls = site_class(layer.frozen, layer.param or None)
        assert cls is not None
        site = cls(layer, key, layer.param)
        for other in (*self.base.layers.values(), *self.new.values()):
            if other.path == layer.path and site.param in other.sites:
                raise ConfigError(
                    f"'{layer.path}.{site.param}' is adapted as a layer (`target_modules`) and by name "
                    "(`target_parameters`): name it in one of them only."
                )
        layer.sites[site.param] = site
        return site

    # ------------------------------------------------------------------ what stands beside the layers
    def beside(self, adapter: Adapter, others: Mapping[str, Adapter], autocast: bool) -> None:
        """Stage what the adapter has beside its layers."""
        self.copies(adapter)
        self.biases(adapter, others)
        for path in adapter.layout.foreign:
            layer = foreign_layer(self.base, path, adapter, self.board, {*self.base.layers, *self.new})
            if path not in self.base.foreign:
                self.foreign[path] = layer
            if autocast:
                layer.widen(adapter.name)

    def copies(self, adapter: Adapter) -> None:
        """Copy the modules the adapter trains whole."""
        wanted = set(adapter.config.modules_to_save or ())
        if not wanted:
            return
        whole = {n: m for n, m in self.base.modules.items() if not isinstance(m, nn.ModuleList | nn.ModuleDict)}
        reasons = {n: why for n in whole if (why := matches(wanted, n)) is not None}
        ensured = getattr(adapter.config, "ensure_weight_tying", False)
        keepers = self._keepers(adapter.config, reasons) if ensured else {}
        chosen = {*reasons, *keepers, *keepers.values()}
        for path in (n for n in whole if n in chosen):
            adapted = {*adapter.layout.foreign, *self.base.foreign, *(layer.path for layer in adapter.layers)}
            if self.base.layers_at(path) or path in adapted:
                raise ConfigError(
                    f"'{path}' is adapted already: it cannot be trained whole (`modules_to_save`) as well."
                )
            if self.base.tied(path) and not ensured:
                warn(TIED.format([path]))
            wrapper = self.base.saved.get(path)
            if wrapper is None:
                wrapper = self.saved[path] = SavedModule(whole[path], path, self.board)
            wrapper.attach(adapter.name)
            adapter.saved.append(wrapper)
        here = {wrapper.name: wrapper for wrapper in adapter.saved}
        for path, keeper in keepers.items():
            here[path].tie(adapter.name, here[keeper])
        missed = wanted - set(reasons.values()) - set(getattr(adapter.config, "heads", ()))
        if missed:
            warn(
                f"`modules_to_save` {sorted(missed)} fit no module of the model."
                f"{nearest(missed, dict.fromkeys(self.base.modules, ''))}"
            )

    def _keepers(self, config: Any, named: Collection[str]) -> dict[str, str]:
        """{module tied to one that is trained whole: the one whose copy they all have}, that one itself left out.

        The config names the latter, as PEFT notes it.
        """
        found: dict[str, str] = {}
        for path in named:
            keeper, *others = [n for n in self.base.modules if n == path or n in self.base.tied(path)]
            found |= dict.fromkeys(others, keeper)
            if others:
                stay = [e for e in config.modules_to_save if not any(matches({e}, n) for n in others)]
                config.modules_to_save = list(dict.fromkeys([*stay, keeper]))
        return found

    def biases(self, adapter: Adapter, others: Mapping[str, Adapter]) -> None:
        """Take over the biases the adapter trains."""
        kind = getattr(adapter.config, "bias", "none")
        if kind == "none" or not isinstance(kind, str) or not hasattr(adapter.config, "bias"):
            return
        if kind != "all" and not kind.endswith("_only"):
            raise ConfigError(
                f"Requested bias: {kind!r}, is not implemented: it is 'none', 'all' or ends with '_only'."
            )
        if any(a.biases for a in others.values()):
            raise ConfigError(
                f"{adapter.method.__name__}Model supports only 1 adapter with bias. "
                "When using multiple adapters, set bias to 'none' for all adapters."
            )
        whole = {*self.base.saved, *self.saved}
        biased = {
            path: module
            for path, module in self.base.modules.items()
            if module._parameters.get("bias") is not None and not _under(path, whole)
        }
        around = {path: layer for layer in (*self.base.layers.values(), *adapter.layers) if (path := layer.path)}
        targeted = {layer.path for layer in adapter.layers}
        layers = {p: around[p] for p in biased if p in around and (kind == "all" or p in targeted)}
        modules = {p: m for p, m in biased.items() if p not in around and kind == "all"}
        adapter.biases = TrainedBiases(adapter.name, layers, modules)


@torch.no_grad()
def start(adapter: Adapter, commons: Mapping[str, Leaves], model: nn.Module) -> None:
    """Give an adapter's tensors their starting values."""
    if adapter.layout.shared:
        shared = {name: common(commons, name, adapter.name) for name in adapter.layout.shared}
        adapter.method.start_shared(adapter.config, Sites(model, (m.site for m in adapter.methods)), shared)
    for layer in adapter.layers:
        for method in layer.methods[adapter.name]:
            if method.home is layer and (W := method.reset(method.options)) is not None:
                layer.originals.take(adapter.name, method.site.param)
                method.site.write(W, None)
                layer.changed()
    if (mesh := next((m.site.mesh for m in adapter.methods if m.site.mesh is not None), None)) is not None:
        for method in adapter.methods:  # what was drawn is the first process's
            for leaf in method.declared if method.home is method.layer else ():
                torch.distributed.broadcast(method.tensor(leaf), int(mesh.mesh.flatten()[0]), mesh.get_group())


def kind_of(site: Site, autocast: bool) -> Kind:
    """Number format and device of adapters at a site: fp32 where 8 bits or half precision cannot be trained."""
    stored = site.stored(site.param)
    dtype = torch.float32 if stored is None else stored.dtype
    wide = (autocast and dtype in HALF) or not dtype.is_floating_point or dtype.itemsize == 1
    return torch.float32 if wide else dtype, site.device if stored is None else stored.device


def trains(leaf: Leaf) -> bool:
    """Whether a leaf is trained."""
    return leaf.train and not leaf.buffer and (leaf.dtype is None or leaf.dtype.is_floating_point)


def _under(name: str, paths: set[str]) -> bool:
    """Whether the module `name` is one of `paths` or lies below one."""
    segments = name.split(".")
    return any(".".join(segments[: i + 1]) in paths for i in range(len(segments)))
