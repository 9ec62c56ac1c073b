"""What an adapter of a model changes, layer by layer, whatever its method: W, W' and dW = W' - W by the formulas."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from trimtab.graft.nesting import chains, place
from trimtab.rank.adapter_file import AdapterFile
from trimtab.shell.state import adapter_tensors, locate_graft


@dataclass(frozen=True, eq=False)
class Change:
    """One adapted weight of one layer.

    Attributes:
        path: of the module, or of the parameter where a config names one.
        place: the path by which its keys on disk start.
        site: the frozen layer as a matrix.
        methods: the formulas of the adapter there, innermost first.
    """

    path: str
    place: str
    site: Any
    methods: tuple[Any, ...]

    def base(self) -> Tensor:
        """W (..., out, in) in fp64: a small dW must not drown in the rounding of W."""
        return self.site.matrix().detach().double()  # type: ignore[no-any-return]

    def adapted(self, W: Tensor) -> Tensor:
        """W' of a W."""
        for method in self.methods:
            W = method.weight(W)
        return W.detach()

    def delta(self) -> Tensor:
        """dW (..., out, in) in fp64."""
        W = self.base()
        return self.adapted(W) - W

    def bias_delta(self) -> Tensor | None:
        """What is added to the bias (out,), or None where it stays."""
        before = self.site.bias()
        after = before
        for method in self.methods:
            after = method.bias(after)
        if after is before or after is None:
            return None
        change = (after if before is None else after - before).detach()
        return change if change.any() else None


def changes(model: nn.Module, adapter_name: str) -> Iterator[Change]:
    """Every weight that an adapter changes, in the model's order."""
    adapter = locate_graft(model)[0].require(adapter_name)
    alone = chains(adapter.layers, adapter_name)
    for layer in adapter.layers:
        by_site: dict[Any, list[Any]] = {}
        for method in layer.methods[adapter_name]:
            by_site.setdefault(method.site, []).append(method)
        for site, methods in by_site.items():
            path = f"{layer.path}.{site.param}" if site.kind == "parameter" else layer.path
            yield Change(path, place(layer, alone), site, tuple(methods))


def read_model(model: nn.Module, adapter_name: str) -> AdapterFile:
    """An adapter of a model as its files would say it."""
    graft = locate_graft(model)[0]
    tensors = adapter_tensors(graft, adapter_name, False, state=None)
    return AdapterFile.of(graft.require(adapter_name).config, tensors, f"adapter '{adapter_name}'")
