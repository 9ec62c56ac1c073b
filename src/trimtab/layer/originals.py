"""Which parameters of a frozen layer count: its own, what an adapter left of them, or what was merged into them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from trimtab.formats import offload, weights

SWAP = threading.RLock()  # one thread at a time computes with parameters other than those at rest


class Originals:
    """The versions of a frozen layer's parameters.

    A parameter is pristine until an adapter takes it over (`take`): its start changes a weight, or it trains a bias.
    Then the layer holds the adapter's version, and the pristine object is kept for everyone else. A merge installs new
    objects on top and holds the versions it was made from. At rest the layer has the last of the three.

    Args:
        owner: whose attribute `frozen` is the layer; it is read at each use, since engines swap layers.
    """

    def __init__(self, owner: Any) -> None:
        self.owner = owner
        self.pristine: dict[str, Any] = {}  # parameter -> its object before an adapter took it over
        self.takers: dict[str, str] = {}  # parameter -> that adapter
        self.held: dict[str, Any] = {}  # parameter -> its object before the merge, while merged
        self.merged: tuple[str, ...] = ()  # the adapters that are merged
        self.final = False  # merged without a way back

    @property
    def layer(self) -> nn.Module:
        """The frozen layer."""
        layer: nn.Module = self.owner.frozen
        return layer

    # ------------------------------------------------------------------ what counts
    def now(self, param: str) -> Any:
        """The parameter that formulas take for the original: what is installed, but for a merge."""
        if param in self.held:
            taker = self.takers.get(param)
            return self.pristine[param] if taker is not None and taker not in self.merged else self.held[param]
        layer = self.layer
        if param not in layer._parameters:
            return getattr(layer, param, None)
        return layer._parameters[param] if offload.hook(layer) is None else offload.parameters(layer)[param]

    def others(self, active: Collection[str], enabled: bool = True) -> dict[str, Any]:
        """The parameters to compute with instead of those at rest, where these adapters are active; mostly none."""
        if not enabled:
            return {**self.held, **self.pristine}
        return {} if self.held or not self.takers else self.strangers(active)

    def strangers(self, active: Collection[str]) -> dict[str, Any]:
        """The pristine objects of parameters that adapters other than these have taken over."""
        return {p: self.pristine[p] for p, taker in self.takers.items() if taker not in active}

    def untouched(self) -> dict[str, Any]:
        """The layer's parameters as they were before any adapter came."""
        return {**offload.parameters(self.layer), **self.held, **self.pristine}

    @contextlib.contextmanager
    def instead(self, parameters: Mapping[str, Any]) -> Iterator[None]:
        """Inside the block the layer has these parameter objects, and they count as its originals."""
        if not parameters:
            yield
            return
        with _locked():
            layer, held = self.layer, self.held
            own = {k: v for k, v in offload.parameters(layer).items() if k in parameters}
            weights.install(layer, parameters)
            self.held = {}
            try:
                yield
            finally:
                weights.install(layer, own)
                self.held = held

    # ------------------------------------------------------------------ changes
    def take(self, adapter: str, param: str, new: Any = None) -> None:
        """Note that `adapter` takes a parameter over; `new` is its version, or None where the layer is to be written.

        Raises:
            ValueError: another adapter has it.
            ReadOnlyWeight: it is computed from other parameters.
        """
        if (taker := self.takers.get(param)) is not None:
            raise ValueError(
                f"Adapter '{taker}' has changed the base's own {param} of '{self.owner.name}'; a second such adapter "
                f"('{adapter}') needs a base of its own."
            )
        weights.needs_own(self.layer, param)
        self.pristine[param] = offload.parameters(self.layer)[param]
        self.takers[param] = adapter
        if new is not None:
            weights.install(self.layer, {param: new})

    def give_back(self, adapter: str) -> None:
        """Put back what an adapter has taken over."""
        taken = [p for p, taker in self.takers.items() if taker == adapter]
        weights.install(self.layer, {p: self.pristine.pop(p) for p in taken})
        for param in taken:
            del self.takers[param]

    def keep(self, params: Collection[str]) -> None:
        """Make a version that an adapter left the layer's own: the pristine one is forgotten."""
        for param in params:
            self.pristine.pop(param, None)
            self.takers.pop(param, None)

    def hold(self, params: Collection[str], names: Collection[str]) -> None:
        """Hold the present objects of parameters, which a merge of the adapters `names` replaces next."""
        own = offload.parameters(self.layer)
        self.held = self.held or {p: own[p] for p in params if p in own}
        self.merged = tuple(names)

    def settle(self) -> None:
        """Forget what was held: the merge is final."""
        self.held, self.final = {}, True

    def restore(self) -> None:
        """Undo the merge."""
        weights.install(self.layer, self.held)
        self.held, self.merged, self.final = {}, (), False

    def apply(self, fn: Any) -> None:
        """Convert (`.to()` ...) the objects that are not in the layer now, in place."""
        for kept in {id(p): p for p in (*self.held.values(), *self.pristine.values()) if p is not None}.values():
            weights.moved(kept, fn)


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    if torch.compiler.is_compiling():  # a graph runs in the thread that calls it
        yield
        return
    with SWAP:
        yield
