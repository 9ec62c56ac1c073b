"""AdaptedLayer: a frozen layer and its adapters. The only forward, merge, unmerge and mixed batch of the library."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.method import Method
from trimtab.core.site import Site
from trimtab.errors import AdapterNameError, ReadOnlyWeight, RouteError
from trimtab.formats import offload, weights
from trimtab.layer.leaves import Leaves
from trimtab.layer.plan import BASE, Board
from trimtab.layer.switch import Switched
from trimtab.layer.views import View

Stack = list[Method]
NOT_OURS = ("_hf_hook", "_old_forward")  # what accelerate hangs on the frozen layer


class AdaptedLayer(Switched):
    """A frozen layer (`base_layer`) with any number of adapters of any methods.

    What it computes follows the board's current route: nothing, one or several adapters stacked (the first of `active`
    innermost), or a batch whose rows go to different adapters.
    """

    def __init__(self, base_layer: nn.Module, name: str, board: Board) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.path, self.param = name, ""  # of the layer in the base model, and of the parameter if a config names one
        self.name, self.board = name, board  # `name`: the path of this module, which others around it change
        self.sites: dict[str, Site] = {}
        self.methods: dict[str, tuple[Method, ...]] = {}
        self.containers: dict[str, Leaves] = {}  # by path below this layer
        self.merged_adapters: list[str] = []
        self.held: dict[str, Any] = {}  # the original parameters, while merged
        self.pristine: dict[str, Any] = {}  # the parameters before an initialisation changed them ...
        self.mutator: str | None = None  # ... for this adapter
        self.factory: dict[str, Any] = {}  # device and dtype of tensors being built

    @property
    def frozen(self) -> nn.Module:
        """The layer itself, below every other AdaptedLayer that adapts another parameter of it."""
        layer = self.base_layer
        while isinstance(layer, AdaptedLayer):
            layer = layer.base_layer
        return layer

    @property
    def prefix(self) -> str:
        """What stands before the names of the frozen layer's parameters, seen from `base_layer`."""
        return f"base_layer.{self.base_layer.prefix}" if isinstance(self.base_layer, AdaptedLayer) else ""

    # ------------------------------------------------------------------ forward
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's output under the current route."""
        board = self.board
        route = board.now()
        active, enabled = route.at(id(self))
        if not enabled:
            return self._original(*args, **kwargs)
        if route.rows is not None:
            return self._mixed(route, *args, **kwargs)
        stack = self._stack(active)
        if self.mutator is None or self.mutator in active or self.held:
            return self._run(stack, route.extras, *args, **kwargs)
        return self._apart(stack, *args, **kwargs)

    def _stack(self, names: Sequence[str]) -> Stack:
        """The methods of some adapters here, innermost first; merged ones are part of the base already."""
        methods, merged = self.methods, self.merged_adapters
        return [m for n in names if n in methods and n not in merged for m in methods[n]]

    def _run(self, stack: Stack, extras: Any, *args: Any, **kwargs: Any) -> Any:
        if not stack:
            return self.base_layer(*args, **kwargs)
        for method in stack:
            if not (method.fused and method.site.fused):
                return self._reparametrised(stack, *args, **kwargs)
        x, args, kwargs = first_input(args, kwargs)
        inputs = self._befores(stack, x)
        y = self.base_layer(inputs[0], *args, **kwargs)
        return self._afters(stack, y, inputs, extras)

    def _befores(self, stack: Stack, x: Tensor) -> list[Tensor]:
        """What the base layer is given, then what each method of the stack sees as its input, innermost first."""
        inputs = [x]
        for method in reversed(stack):
            inputs.append(method.before(inputs[-1]))
        inputs.reverse()
        if inputs[0].dtype != x.dtype:
            inputs[0] = inputs[0].to(x.dtype)
        return inputs

    @staticmethod
    def _afters(stack: Stack, y: Tensor, inputs: list[Tensor], extras: Any) -> Tensor:
        dtype = y.dtype
        for method, x in zip(stack, inputs[1:], strict=True):
            y = method.after(y, x, extras)
        return y if y.dtype == dtype else y.to(dtype)

    def _reparametrised(self, stack: Stack, *args: Any, **kwargs: Any) -> Any:
        """The layer run with the stack's weights: the spelling that every method has."""
        ((site, (W, b)),) = self._fold(self._below(stack)).items()
        return site.run(W, b, *args, **kwargs)

    def _below(self, stack: Stack) -> Stack:
        """The stack with those that are merged into what is to be changed, innermost first."""
        return [m for n in self.merged_adapters for m in self.methods[n]] + stack if self.held else stack

    def read(self, name: str) -> Any:
        """A parameter as the model must see it where it reads the layer's without calling it."""
        route = self.board.now()
        active, enabled = route.at(id(self))
        stack = self._stack(active) if enabled else []
        if enabled and route.rows is not None and not self.methods.keys().isdisjoint(route.rows.names):
            raise RouteError(f"'{self.name}' is read, not called: it cannot know which rows belong to which adapter.")
        alone = self.mutator is not None and self.mutator not in active and not self.held
        originals = {**self.held, **self.pristine} if not enabled else self.pristine if alone else {}
        own = {**offload.parameters(self.frozen), **originals}
        with self._parameters_of(self.pristine) if enabled and alone else contextlib.nullcontext():
            for site, (W, b) in self._fold(self._below(stack) if stack else []).items():
                own.update(site.named(W, b))
        return own[name]

    def _fold(self, stack: Stack) -> dict[Site, tuple[Tensor, Tensor | None]]:
        """The weights (in fp32 at least) and biases that a stack makes of the originals."""
        folded: dict[Site, tuple[Tensor, Tensor | None]] = {}
        for method in stack:
            site = method.site
            if site not in folded:
                W = site.matrix()
                folded[site] = (W if W.dtype == torch.float64 else W.float(), site.bias())
            W, b = folded[site]
            folded[site] = (method.weight(W), method.bias(b))
        return folded

    def _mixed(self, route: Any, *args: Any, **kwargs: Any) -> Any:
        """Rows go to adapters by the plan: one base product for all rows whose methods are fused."""
        if self.merged_adapters:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        site = next(iter(self.sites.values()))
        groups, order = route.rows.split(*site.rows(args, kwargs))
        stacks = [self._stack((name,)) for name, _ in groups]
        if not any(stacks) and self.mutator is None:
            return self.base_layer(*args, **kwargs)
        if not site.fused:
            return site.join([self._alone(n, *site.cut(args, kwargs, rows)) for n, rows in groups], order)
        x, args, kwargs = first_input(args, kwargs)
        fused = [
            all(m.fused for m in s) and self.mutator in (None, name)
            for s, (name, _) in zip(stacks, groups, strict=True)
        ]
        xs = [x[rows] for _, rows in groups]
        inputs = [self._befores(s, part) if f else [part] for s, part, f in zip(stacks, xs, fused, strict=True)]
        base: dict[int, Tensor] = {}
        shared = [i for i, f in enumerate(fused) if f]
        if shared:
            y = self.base_layer(torch.cat([inputs[i][0] for i in shared]), *args, **kwargs)
            base = dict(zip(shared, y.split([len(xs[i]) for i in shared]), strict=True))
        parts = []
        for i, (name, rows) in enumerate(groups):
            extras = {k: v[rows.to(v.device)] if isinstance(v, Tensor) else v for k, v in route.extras.items()}
            if i in base:
                parts.append(self._afters(stacks[i], base[i], inputs[i], extras))
            elif self.mutator not in (None, name):
                parts.append(self._apart(stacks[i], xs[i], *args, **kwargs))
            else:
                parts.append(self._run(stacks[i], extras, xs[i], *args, **kwargs))
        return torch.cat(parts)[order]

    def _alone(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The output for rows of one adapter, here and in every layer inside."""
        board = self.board
        route = replace(board.route, active=() if name == BASE else (name,), rows=None, overrides={})
        with board.using(route, restored=board.restored):
            return self(*args, **kwargs)

    def _original(self, *args: Any, **kwargs: Any) -> Any:
        """The untouched base, bit by bit, even while adapters are merged into it."""
        if not self.held and not self.pristine:
            return self.base_layer(*args, **kwargs)
        with self._parameters_of({**self.held, **self.pristine}):
            return self.base_layer(*args, **kwargs)

    def _apart(self, stack: Stack, *args: Any, **kwargs: Any) -> Any:
        """A stack on the pristine base, where another adapter's initialisation has changed it."""
        with self._parameters_of(self.pristine):
            return self._run(stack, {}, *args, **kwargs)

    @contextlib.contextmanager
    def _parameters_of(self, parameters: dict[str, Any]) -> Iterator[None]:
        """The base layer with other parameter objects, inside the block."""
        layer = self.frozen
        own, held = {k: v for k, v in offload.parameters(layer).items() if k in parameters}, self.held
        weights.install(layer, parameters)
        self.held = {}
        try:
            yield
        finally:
            weights.install(layer, own)
            self.held = held

    # ------------------------------------------------------------------ merging
    @property
    def merged(self) -> bool:
        """Whether any adapter is merged into the base layer."""
        return bool(self.merged_adapters)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None, keep: bool = True) -> None:
        """Fold adapters into the base layer's parameters; the originals are held, so `unmerge` is exact.

        Args:
            safe_merge: raise, with nothing changed, when the result is not finite.
            adapter_names: which (the active ones by default); those that are not here or merged already are skipped.
            keep: hold the originals; False frees them (for export).

        Raises:
            ValueError: a method that has no single weight, or with `safe_merge` a result that is not finite.
        """
        names = self.active_adapters if adapter_names is None else adapter_names
        new = [n for n in names if n in self.methods and n not in self.merged_adapters]
        if not new:
            return
        for method in (m for n in new for m in self.methods[n]):
            if not method.mergeable:
                raise ReadOnlyWeight(f"{type(method).__name__} cannot be merged: it has no single weight.")
        wanted = [*self.merged_adapters, *new]
        alone = bool(self.pristine) and self.mutator not in wanted
        with self._parameters_of(self.pristine) if alone else contextlib.nullcontext():
            folded = self._fold([m for n in wanted for m in self.methods[n]])
        if safe_merge:
            for W, b in folded.values():
                if not torch.isfinite(W).all() or (b is not None and not torch.isfinite(b).all()):
                    raise ValueError(f"NaNs detected in the merged weights. The adapter {new} seems to be broken")
        own = offload.parameters(self.frozen)
        held = self.held or {k: own.get(k) for site in folded for k in site.params if k in own}
        for site, (W, b) in folded.items():
            site.write(W, b)
        self.held = held if keep else {}
        self.merged_adapters = wanted

    def unmerge(self) -> None:
        """Put the original parameter objects back."""
        if self.merged_adapters and not self.held:
            raise ReadOnlyWeight(f"Layer '{self.name}' was merged with keep=False: its original weight is gone.")
        weights.install(self.frozen, self.held)
        self.held, self.merged_adapters = {}, []

    def restore(self) -> nn.Module:
        """The base layer as it was before any adapter came."""
        if self.held:
            self.unmerge()
        weights.install(self.frozen, self.pristine)
        return self.frozen

    def mutate(self, adapter: str, site: Site, W: Tensor) -> None:
        """Give the base layer the weight that an adapter's initialisation leaves of it, and keep the pristine one."""
        if self.mutator is not None:
            raise ValueError(
                f"Layer '{self.name}': adapter '{self.mutator}' has changed the base's weights at its start; a second "
                f"such adapter ('{adapter}') needs a base of its own."
            )
        self.pristine = {site.param: offload.parameters(self.frozen)[site.param]}
        site.write(W, None)
        self.mutator = adapter

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What the adapter adds to the layer's weight, in the layer's own layout."""
        ((site, (W, _)),) = self._fold(list(self.methods[adapter])).items()
        return site.store(W - site.matrix().to(W.dtype))

    # ------------------------------------------------------------------ adapters
    def attach(self, adapter: str, methods: Sequence[Method], tensors: Sequence[dict[str, Tensor]]) -> None:
        """Take the adapter's methods and their tensors by leaf template."""
        self.methods[adapter] = tuple(methods)
        for method, leaves in zip(methods, tensors, strict=True):
            for template, tensor in leaves.items():
                container, _, rest = template.partition(".{}")
                if container not in self.containers:
                    self.containers[container] = Leaves.at(self, container)
                self.containers[container].put(adapter, rest.removeprefix("."), tensor)
            self.sites.setdefault(method.site.param, method.site)

    def detach(self, adapter: str) -> None:
        """Forget an adapter."""
        if adapter in self.merged_adapters:
            raise ValueError(f"Adapter '{adapter}' is merged into the base: call unmerge_adapter() first.")
        if self.mutator == adapter:
            weights.install(self.frozen, self.pristine)
            self.pristine, self.mutator = {}, None
        self.methods.pop(adapter, None)
        for leaves in self.leaves():
            leaves.remove(adapter)

    def leaves(self) -> list[Leaves]:
        """The containers of this layer's tensors."""
        return list(self.containers.values())

    def tensor(self, template: str, adapter: str) -> Tensor:
        """An adapter's tensor by its leaf template."""
        container, _, rest = template.partition(".{}")
        return self.containers[container].get(adapter, rest.removeprefix("."))

    @property
    def adapters(self) -> list[str]:
        """The adapters that are here."""
        return list(self.methods)

    def adapter_parameters(self, adapter: str) -> Iterator[tuple[Any, nn.Parameter]]:
        """(method, parameter) for each trainable tensor of an adapter here."""
        for method in self.methods.get(adapter, ()):
            if method.home is not self:
                continue
            for alias, template in method._leaves.items():
                tensor = self.tensor(template, adapter)
                if isinstance(tensor, nn.Parameter) and alias not in method.frozen:
                    yield method, tensor

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Make adapters trainable or frozen."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            for _, parameter in self.adapter_parameters(name):
                parameter.requires_grad_(requires_grad)

    # ------------------------------------------------------------------ this layer by itself
    def unpark(self, adapter: str) -> None:
        """Bring an adapter that was parked back into the module tree."""
        for leaves in self.leaves():
            leaves.unpark(adapter)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter of this layer; if it was in use, the first remaining one takes its place."""
        self.detach(adapter_name)
        active = [n for n in self.active_adapters if n != adapter_name]
        if len(active) != len(self.active_adapters):
            self.set_adapter(active or list(self.methods)[:1])

    def get_base_layer(self) -> nn.Module:
        """The frozen layer."""
        return self.frozen

    def _scaled(self, change: Callable[[Any], float], names: Sequence[str]) -> None:
        for method in (m for n in names for m in self.methods.get(n, ()) if "scaling" in m.views):
            method.scaling = change(method)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set an adapter's scale to `scale` times its own."""
        self._scaled(lambda m: float(scale * m.unit), (adapter,))

    def scale_layer(self, scale: float) -> None:
        """Multiply the scale of the active adapters."""
        self._scaled(lambda m: float(m.scaling * scale), self.active_adapters)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scale of the active adapters, or without an argument set it back to their own."""
        self._scaled(lambda m: float(m.unit if scale is None else m.scaling / scale), self.active_adapters)

    # ------------------------------------------------------------------ as a module
    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or name in NOT_OURS or "base_layer" not in self.__dict__.get("_modules", {}):
                raise
        if any(name in site.reads for site in self.__dict__.get("sites", {}).values()):
            return self.read(name)
        for methods in self.__dict__.get("methods", {}).values():
            if any(name in m.views for m in methods):
                return View(self, name)
        return getattr(self.base_layer, name)

    def _apply(self, fn: Any, recurse: bool = True) -> AdaptedLayer:
        for kept in (self.held, self.pristine):
            for parameter in kept.values():
                if parameter is not None:
                    weights.moved(parameter, fn)
        super()._apply(fn, recurse)
        return self

    def extra_repr(self) -> str:
        """The adapters and their methods."""
        return ", ".join(f"{n}: {' + '.join(type(m).__name__ for m in ms)}" for n, ms in self.methods.items())


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Split a layer's arguments into (its input, the rest), however the input was passed."""
    if args:
        return args[0], args[1:], kwargs
    name = next(iter(kwargs))
    return kwargs[name], (), {k: v for k, v in kwargs.items() if k != name}


def require_known(names: Sequence[str], known: Sequence[str] | dict[str, Any]) -> None:
    """Raise `AdapterNameError` for names that no adapter has."""
    unknown = [n for n in dict.fromkeys(names) if n not in known and n != BASE]
    if unknown:
        raise AdapterNameError(f"Adapter {', '.join(map(str, unknown))} not found. Known: {list(known)}.")
