"""The base's biases as one adapter trains them: its own parameters stand in for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from trimtab.formats import weights
from trimtab.layer.adapted import AdaptedLayer


class TrainedBiases(nn.Module):
    """Biases of the base that an adapter trains; a child of the model, so that it follows where the model goes.

    At an adapted layer the layer's own `Originals` keep the two versions apart. Elsewhere there is no forward of ours,
    so the adapter's parameter is in place while the adapter is in use, and the base's own otherwise.

    Args:
        adapter: whose they are.
        layers: path -> an adapted layer whose bias it trains.
        modules: path -> another module whose bias it trains.
    """

    def __init__(self, adapter: str, layers: Mapping[str, AdaptedLayer], modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.adapter = adapter
        self.own: dict[str, nn.Parameter] = {}
        self.pristine: dict[str, Any] = {}
        self.layers, self.others = dict(layers), dict(modules)
        for path, layer in layers.items():
            bias = layer.frozen._parameters["bias"]
            assert bias is not None
            self.pristine[path], self.own[path] = bias, nn.Parameter(bias.detach().clone())
            layer.originals.take(adapter, "bias", self.own[path])
            layer.changed()
        for path, module in modules.items():
            bias = module._parameters["bias"]
            assert bias is not None
            self.pristine[path], self.own[path] = bias, nn.Parameter(bias.detach().clone())

    def switch(self, on: bool) -> None:
        """Put the adapter's biases in place where no layer of ours chooses, or the base's own."""
        for path, module in self.others.items():
            module._parameters["bias"] = self.own[path] if on else self.pristine[path]

    def take_out(self, keep: bool = False) -> None:
        """Leave the base its own biases, or with `keep` the adapter's."""
        self.switch(keep)
        for layer in self.layers.values():
            if keep:
                layer.originals.keep(["bias"])
            elif layer.originals.takers.get("bias") == self.adapter:
                layer.originals.give_back(self.adapter)
            layer.changed()

    def trained(self) -> Iterator[nn.Parameter]:
        """The adapter's biases."""
        return iter(self.own.values())

    def _apply(self, fn: Any, recurse: bool = True) -> TrainedBiases:
        for path, module in self.others.items():  # those that are out of place; the others follow their module
            here = module._parameters["bias"]
            for bias in (self.own[path], self.pristine[path]):
                if bias is not here:
                    weights.moved(bias, fn)
        return self

    def extra_repr(self) -> str:
        """Whose they are, and how many."""
        return f"{self.adapter}: {len(self.own)}"
