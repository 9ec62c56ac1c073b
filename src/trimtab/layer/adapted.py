"""AdaptedLayer: a frozen layer and its adapters. The only forward of the library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.kernels.dense import ONEDNN, frozen_linear
from trimtab.core.method import Method
from trimtab.core.site import Site, plain_linear
from trimtab.errors import RouteError
from trimtab.formats import offload
from trimtab.layer.leaves import Leaves, strangers
from trimtab.layer.merging import Merging
from trimtab.layer.mixed import Step, mixed_step
from trimtab.layer.originals import Originals
from trimtab.layer.plan import Board, Route
from trimtab.layer.spelling import Edits, Stack, fold, pick, spelled, surrounded
from trimtab.layer.together import Through
from trimtab.layer.views import View, shows

# Attributes that are no modules or tensors: nn.Module's own setattr costs more than all the rest of what is done to
# hundreds of layers when adapters come and go.
STATE = frozenset({"name", "path", "kept", "company", "alone", "shown", "merged_adapters", "own", "training"})


class AdaptedLayer(Merging):
    """A frozen layer (`base_layer`) with any number of adapters of any methods.

    What it computes follows the current route: nothing, one or several adapters stacked (the first of `active`
    innermost), or a batch whose rows go to different adapters.
    """

    def __init__(self, base_layer: nn.Module, name: str, board: Board) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.path, self.param = name, ""  # of the layer in the base model, and of the parameter if a config names one
        self.name, self.board = name, board  # `name`: the path of this module, which others around it change
        self.sites: dict[str, Site] = {}
        self.methods: dict[str, tuple[Method, ...]] = {}  # of the adapters that are in the module tree
        self.shown: Mapping[str, Any] = {}  # attributes that methods, here now or before, show: {name: what makes it}
        self.containers: dict[str, Leaves] = {}  # by path below this layer
        self.leaves_mode = [self.training]  # of all in them
        self.merged_adapters: list[str] = []
        self.originals = Originals(self)
        self.kept: tuple[Route, Step] | None = None  # how the last route was computed
        self.company: tuple[AdaptedLayer, ...] = ()  # the layers that are called with its input, right after it
        self.alone = False  # they did not come once

    @property
    def frozen(self) -> nn.Module:
        """The layer itself, below every other AdaptedLayer that adapts another parameter of it."""
        layer = self._modules["base_layer"]
        while isinstance(layer, AdaptedLayer):
            layer = layer._modules["base_layer"]
        return layer  # type: ignore[return-value]

    @property
    def prefix(self) -> str:
        """What stands before the names of the frozen layer's parameters, seen from `base_layer`."""
        return f"base_layer.{self.base_layer.prefix}" if isinstance(self.base_layer, AdaptedLayer) else ""

    # ------------------------------------------------------------------ forward
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's output under the current route."""
        if kwargs and (told := self.told(kwargs)):
            extras = {**self.board.route_here(quiet=True).call.extras, **{name: kwargs.pop(name) for name in told}}
            with self.board.handing(extras):
                return self.forward(*args, **kwargs)
        route = self.board.now()
        kept = self.kept
        return (kept[1] if kept is not None and kept[0] is route else self.step(route))(*args, **kwargs)

    def told(self, kwargs: Mapping[str, Any]) -> list[str]:
        """Which arguments of a call are for formulas here, not for the frozen layer."""
        words = {word for methods in self.methods.values() for method in methods for word in method.told}
        return [name for name in kwargs if name in words]

    def step(self, route: Route) -> Step:
        """How to compute under a route."""
        kept = self.kept
        if kept is not None and kept[0] is route:
            return kept[1]
        step = self._step(route)
        if not torch.compiler.is_compiling():
            self.kept = (route, step)
        return step

    def changed(self) -> None:
        """Adapters, merges or the base are others: how to compute is to be chosen anew."""
        self.__dict__.update(kept=None, company=(), alone=False)

    def join(self, other: AdaptedLayer) -> None:
        """Note that another layer was called with this one's input, right after it."""
        if not self.alone and other not in self.company:
            self.company = (*self.company, other)

    def part(self) -> None:
        """Note that one of them did not come: each computes by itself from now on."""
        self.company, self.alone = (), True

    def _step(self, route: Route) -> Step:
        """How to compute under a route: the choice that is kept until the route, the adapters or the base change."""
        active, enabled = route.at(self.own)
        if enabled and route.plan is not None:
            return mixed_step(self, route, self._base)
        instead = self.originals.others(active, enabled)
        step = self._plain(self.stack(active) if enabled else [], route)
        return partial(self._with, step, tuple(active), enabled) if instead else step

    def _with(self, step: Step, active: tuple[str, ...], enabled: bool, *args: Any, **kwargs: Any) -> Any:
        """A step on other parameters than those at rest."""
        with self.originals.instead(self.originals.others(active, enabled)):
            return step(*args, **kwargs)

    def stack(self, names: Sequence[str]) -> list[Method]:
        """The methods of some adapters here, innermost first; merged ones are part of the base already."""
        methods, merged = self.methods, self.merged_adapters
        return [m for n in names if n in methods and n not in merged for m in methods[n]]

    def below(self) -> list[Method]:
        """The methods that are merged into the layer, innermost first."""
        return [m for n in self.merged_adapters for m in self.methods[n]]

    def _plain(self, stack: Stack, route: Route) -> Step:
        """One stack for all rows."""
        how, call, base = pick(stack), route.call, self._base
        if how == "base":
            return base
        if how == "around":
            return partial(surrounded, stack, base, call)
        if how == "weight":
            return lambda *args, **kwargs: spelled(stack, self.below(), base, call, args, kwargs)
        edits = Edits(stack)

        def fused(*args: Any, **kwargs: Any) -> Any:
            if not args:  # the input was passed by name
                return spelled(stack, (), base, call, args, kwargs)
            inputs = edits.before(args[0], call)
            return edits.after(base(inputs[0], *args[1:], **kwargs), inputs, call)

        if how == "fused" or self.merged_adapters:
            return fused
        return Through(self, stack[0], call, fused)

    def _base(self, *args: Any, **kwargs: Any) -> Any:
        """The frozen layer, as it is at rest."""
        layer = self._modules["base_layer"]
        own = plain_linear(layer) if ONEDNN is not None and len(args) == 1 and not kwargs else None
        y = None if own is None else frozen_linear(args[0], *own)
        return layer(*args, **kwargs) if y is None else y  # type: ignore[misc]

    def read(self, name: str) -> Any:
        """A parameter as the model must see it where it reads the layer's without calling it."""
        route = self.board.now()
        active, enabled = route.at(self.own)
        if enabled and route.plan is not None and not self.methods.keys().isdisjoint(route.plan.adapters):
            raise RouteError(f"'{self.name}' is read, not called: it cannot know which rows belong to which adapter.")
        stack = self.stack(active) if enabled else []
        with self.originals.instead(self.originals.others(active, enabled)):
            own = offload.parameters(self.frozen)
            for site, (W, b) in fold([*self.below(), *stack] if stack else []).items():
                own = {**own, **site.named(W, b)}
        return own[name]

    # ------------------------------------------------------------------ adapters
    def attach(self, adapter: str, method: Method, tensors: dict[str, Tensor]) -> None:
        """Take a method of an adapter, and its tensors by leaf (none where another layer keeps them)."""
        for leaf, tensor in tensors.items():
            container, _, rest = method.templates[leaf].partition(".{}")
            if container not in self.containers:
                self.containers[container] = Leaves.at(self, container)
            method.register(leaf, self.containers[container].put(adapter, rest.removeprefix("."), tensor))
        self.methods[adapter] = (*self.methods.get(adapter, ()), method)
        self.sites.setdefault(method.site.param, method.site)
        shown = shows(method)
        if not shown.keys() <= self.shown.keys():
            views = {name: make for name, make in self.shown.items() if make is View}  # of other methods' own
            self.shown = {**self.shown, **shown, **views}
        self.changed()

    def detach(self, adapter: str) -> None:
        """Take an adapter's methods and tensors out of the module tree."""
        for store in self.stores:
            store.pop(adapter, None)
        self.changed()

    @property
    def stores(self) -> list[dict[str, Any]]:
        """Where what adapters have here is registered, by their names: their methods and their tensors."""
        return [self.methods, *(store for leaves in self.containers.values() for store in leaves.stores)]

    def parked(self, leaves: Leaves) -> list[str]:
        """The adapters that have a leaf in this container, and are not in the module tree."""
        residents = self.board.residents
        return residents.parked_at(self, leaves) if residents is not None else []

    # ------------------------------------------------------------------ as a module
    def __setattr__(self, name: str, value: Any) -> None:
        if name in STATE:
            self.__dict__[name] = value
            return
        if name == "base_layer":
            self.__dict__["kept"] = None
        elif isinstance(value, nn.Parameter) and name in self.frozen._parameters:  # weights are tied this way
            setattr(self.frozen, name, value)
            return
        super().__setattr__(name, value)

    def train(self, mode: bool = True) -> AdaptedLayer:
        """Training or evaluation mode."""
        self.base_layer.train(mode)
        self.training = self.leaves_mode[0] = mode
        for module in strangers(m for name, m in self._modules.items() if name != "base_layer"):
            module.train(mode)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "kept": None, "company": ()}

    def _apply(self, fn: Any, recurse: bool = True) -> AdaptedLayer:
        self.originals.apply(fn)
        if self.board.residents is not None:
            self.board.residents.convert(self, fn)
        super()._apply(fn, recurse)
        self.changed()
        return self
