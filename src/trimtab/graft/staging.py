"""An adapter being added: everything is built and checked here before the model changes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trimtab.core.method import Method, leaf_template
from trimtab.core.report import warn
from trimtab.core.site import Site, site_class
from trimtab.core.targets import matches, nearest
from trimtab.errors import ConfigError
from trimtab.graft.adapters import Adapter
from trimtab.graft.prompts import complete
from trimtab.graft.selection import companions, tied
from trimtab.graft.slots import holder
from trimtab.layer.adapted import AdaptedLayer
from trimtab.layer.copies import SavedBiases, SavedModule
from trimtab.layer.leaves import Leaves

if TYPE_CHECKING:
    from trimtab.graft.graft import Graft

HALF = (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


class Staged:
    """One adapter on its way into a model.

    Args:
        graft: the model's adapters.
        adapter: the new one, its targets chosen.
        autocast: adapters of half-precision layers are kept in fp32.
        meta: build tensors without storage, to be filled from a file.
    """

    def __init__(self, graft: Graft, adapter: Adapter, autocast: bool, meta: bool) -> None:
        self.graft, self.adapter, self.autocast, self.meta = graft, adapter, autocast, meta
        self.new: dict[str, AdaptedLayer] = {}  # layers that are adapted for the first time
        self.saved: dict[str, SavedModule] = {}  # modules that are trained whole for the first time

    def undo(self) -> None:
        """Leave no trace."""
        name = self.adapter.name
        for part in self.adapter.parts:
            part.detach(name)
        for leaves in self.graft.commons.values():
            leaves.remove(name)

    def _layer(self, key: str, param: str) -> AdaptedLayer:
        """The adapted layer of a module, or of a parameter of it (whose path is then `key`)."""
        path = key.removesuffix(f".{param}") if param else key
        if path in self.graft.saved:
            raise ConfigError(
                f"'{path}' is trained whole (`modules_to_save`) by another adapter: it cannot be adapted as well."
            )
        layer = self.graft.layers.get(key) or self.new.get(key)
        if layer is not None:
            return layer
        base = self.graft.modules[path]
        keys = [path, *(f"{path}.{name}" for name in base._parameters)]
        others = [x for k in keys if (x := self.graft.layers.get(k) or self.new.get(k))]
        if others:
            base = max(others, key=lambda x: len(x.prefix))
        layer = self.new[key] = AdaptedLayer(base, path, self.graft.board)
        layer.param = param
        return layer

    def layers(self) -> None:
        """Give each target's layer the adapter's method and its tensors, empty."""
        plans: dict[str, list[tuple[type[Method], Any, str]]] = {
            t.name: [(self.adapter.method, self.adapter.config.resolve(t.name), "")] for t in self.adapter.targets
        }
        for target in self.adapter.targets if self.adapter.method.tied else ():
            for path in tied(self.graft, target.name):
                plans.setdefault(path, plans[target.name])
        for path, companion in companions(self.graft, self.adapter.config).items():
            plans.setdefault(path, []).append(companion)
        params = {t.name: t.param for t in self.adapter.targets if t.param}
        for target in self.adapter.targets:
            for part in getattr(site_class(self.graft.modules[target.module], target.param or None), "parts", ()):
                plans[f"{target.name}.{part}"] = plans[target.name]
        homes: dict[int, AdaptedLayer] = {}
        for path, wanted in plans.items():
            layer = self._layer(path, params.get(path, ""))
            site = next(iter(layer.sites.values()), None) or self._site(layer, path)
            methods, leaves = [], []
            for cls, config, prefix in wanted:
                layer.factory = self._factory(site)
                one = cls(layer, site, self.adapter.name, config, self.graft.commons)
                tensors = one.build(site, config)
                templates = {
                    one.leaf(prefix + leaf_template(n)): _parameter(t, site, n in one.frozen)
                    for n, t in tensors.items()
                }
                if cls.tied:
                    one.home = homes.setdefault(id(layer.frozen._parameters["weight"]), layer)
                methods.append(one)
                leaves.append(templates if one.home is layer else {})
            layer.attach(self.adapter.name, methods, leaves)
            self.adapter.layers.append(layer)
        for name, tensor in self.adapter.method.share(
            self.adapter.config, [m.site for m in self.adapter.methods]
        ).items():
            first = self.adapter.methods[0]
            tensor = tensor.to(device=first.site.device, dtype=first.layer.factory["dtype"])
            self.graft.commons.setdefault(name, Leaves()).put(self.adapter.name, "", tensor)

    def _site(self, layer: AdaptedLayer, name: str) -> Site:
        """The site of a new layer, whose parameter no other layer may adapt."""
        cls = site_class(layer.frozen, layer.param or None)
        assert cls is not None
        site = cls(layer, name, layer.param)
        for other in (*self.graft.layers.values(), *self.new.values()):
            if other.path == layer.path and site.param in other.sites:
                raise ConfigError(
                    f"'{layer.path}.{site.param}' is adapted as a layer (`target_modules`) and by name "
                    "(`target_parameters`): name it in one of them only."
                )
        return site

    def _factory(self, site: Site) -> dict[str, Any]:
        stored = site.stored(site.param)  # a quantised layer's adapters are fp32: whole numbers cannot be trained
        dtype = torch.float32 if stored is None else stored.dtype
        return {
            "dtype": torch.float32 if (self.autocast and dtype in HALF) or not dtype.is_floating_point else dtype,
            "device": torch.device("meta") if self.meta else site.device,
        }

    def copies(self) -> None:
        """Copy the modules the adapter trains whole."""
        wanted = set(self.adapter.config.modules_to_save or ())
        found: set[str] = set()
        for path, module in self.graft.modules.items():
            why = matches(wanted, path)
            if why is None or isinstance(module, SavedModule | nn.ModuleList | nn.ModuleDict):
                continue
            found.add(why)
            if any(layer.path == path for layer in (*self.graft.layers.values(), *self.adapter.layers)):
                raise ConfigError(
                    f"'{path}' is adapted already: it cannot be trained whole (`modules_to_save`) as well."
                )
            wrapper = self.graft.saved.get(path)
            if wrapper is None:
                wrapper = self.saved[path] = SavedModule(module, path, self.graft.board)
            wrapper.attach(self.adapter.name)
            self.adapter.saved.append(wrapper)
        missed = wanted - found - set(getattr(self.adapter.config, "heads", ()))
        if missed:
            warn(
                f"`modules_to_save` {sorted(missed)} fit no module of the model."
                f"{nearest(missed, dict.fromkeys(self.graft.modules, ''))}"
            )

    def biases(self) -> None:
        """Take over the biases the adapter trains."""
        kind = getattr(self.adapter.config, "bias", "none")
        if kind == "none" or not isinstance(kind, str) or not hasattr(self.adapter.config, "bias"):
            return
        if any(a.biases for a in self.graft.adapters.values()):
            raise ConfigError(
                "Only 1 adapter with bias is supported. "
                "When using multiple adapters, set bias to 'none' for all adapters."
            )
        adapted = {layer.path for layer in self.adapter.layers}
        names = self.graft.modules if kind == "all" else adapted
        bases = {n: self.graft.modules[n] for n in names}
        whole = {*self.graft.saved, *(s.name for s in self.adapter.saved)}
        biased = {n: m for n, m in bases.items() if m._parameters.get("bias") is not None and not _under(n, whole)}
        self.adapter.biases = SavedBiases(biased)

    def start(self) -> None:
        """Give the tensors their starting values."""
        with torch.no_grad():
            for layer in self.adapter.layers:
                for method in layer.methods[self.adapter.name]:
                    if method.home is layer and (W := method.reset(method.options)) is not None:
                        layer.mutate(self.adapter.name, method.site, W)

    def materialise(self) -> None:
        """Give tensors that were built without storage theirs."""
        for layer in self.adapter.layers:
            for method in layer.methods[self.adapter.name]:
                for template in method._leaves.values() if method.home is layer else ():
                    where, name = holder(layer, template, self.adapter.name)
                    old = where._parameters.get(name)
                    if old is not None and old.device.type == "meta":
                        where._parameters[name] = nn.Parameter(torch.empty_like(old, device=method.site.device))

    def prompt(self) -> None:
        """Make the prompt, started as the config says."""
        config, model = self.adapter.config, self.graft.model
        complete(config, model, self.adapter.method.cached)  # type: ignore[attr-defined]
        prompt: Any = self.adapter.method()  # type: ignore[call-arg]
        prompt.build(config)
        with torch.no_grad():
            prompt.reset(config, model)
        self.adapter.prompt = prompt.to(model.get_input_embeddings().weight.device)  # type: ignore[operator]


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
