"""Several adapted layers around one module, and modules that look into the layers they hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from trimtab.graft import stack
from trimtab.layer.adapted import AdaptedLayer

Chains = dict[str, list[AdaptedLayer]]  # path of a module -> the layers around it, innermost first
Named = list[tuple[AdaptedLayer, str]]  # layers, and the paths of their modules


def chains(layers: Iterable[AdaptedLayer], adapter: str | None = None) -> Chains:
    """Who stands around which module; with `adapter`, as if it were the only one there.

    Alone, an adapter's layers nest in the order of the module's own parameters, as PEFT nests them.
    """
    found: Chains = {}
    for layer in layers:
        if adapter is None or adapter in layer.methods:
            found.setdefault(layer.path, []).append(layer)
    for several in found.values():
        if len(several) > 1:
            order = list(several[0].frozen._parameters)
            several.sort(key=lambda x: x.prefix if adapter is None else order.index(next(iter(x.sites))))
    return found


def place(layer: AdaptedLayer, around: Chains) -> str:
    """The path of an adapted layer among others: below each that stands around it comes a `base_layer`."""
    segments: list[str] = []
    path = ""
    for segment in layer.path.split("."):
        path = f"{path}.{segment}" if path else segment
        segments.append(segment)
        wrappers = around.get(path, [])
        outside = len(wrappers) - 1 - wrappers.index(layer) if path == layer.path else len(wrappers)
        segments += ["base_layer"] * outside
    return ".".join(segments)


def rename(layers: Sequence[AdaptedLayer], before: Named) -> Named:
    """Tell all adapted layers of a model their paths, which change when others come to stand around them.

    Args:
        before: what this gave last: where nothing has changed since, there is nothing to tell.
    """
    now = [(layer, layer.path) for layer in layers]
    if now != before:
        around = chains(layers)
        for layer in layers:
            layer.name = place(layer, around)
    return now


SHORT_WAYS = {nn.TransformerEncoderLayer: "activation_relu_or_gelu", nn.TransformerEncoder: "use_nested_tensor"}


class Detours:
    """PyTorch's Transformer encoder, in evaluation mode, runs one fused operation on the weights of the layers inside,
    past any adapter there. While there is one, it takes the way through its layers."""

    def __init__(self) -> None:
        self.undo: list[tuple[nn.Module, str, Any]] = []

    def take(self, path: str, modules: dict[str, nn.Module], root: nn.Module) -> None:
        """Close the short way of every encoder around `path`."""
        segments = path.split(".")
        for i in range(len(segments)):
            module = modules[".".join(segments[:i])] if i else root
            for cls, switch in SHORT_WAYS.items():
                if isinstance(module, cls) and module.__dict__.get(switch):
                    self.undo.append((module, switch, module.__dict__[switch]))
                    module.__dict__[switch] = 0

    def restore(self, root: nn.Module) -> None:
        """Open them again, and put back the layers of a model that was rebuilt."""
        for module, switch, before in self.undo:
            module.__dict__[switch] = before
        self.undo.clear()
        stack.restore(root)
