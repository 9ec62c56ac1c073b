"""X-LoRA's layers as peft has them: forwards of adapted layers that take the weights of their adapters by argument."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.as_peft.classes import BASES
from trimtab.layer.adapted import AdaptedLayer
from trimtab.methods.xlora import kept

__all__ = ["XLoraConv2dLayer", "XLoraEmbeddingLayer", "XLoraLinearLayer", "convert_layers_to_xlora"]


class XLoraLayer:
    """The forward of a layer of several LoRA adapters, called 0, 1 ..., under weights of them.

    Args:
        model: its attribute `disabled` says that the layer is to be the base's.
        target: the adapted layer; `target_forward`: its own forward.
        layer_number: which of the weights' layers it is.
    """

    def __init__(
        self, model: nn.Module, target: AdaptedLayer, target_forward: Callable[..., Any], layer_number: int, config: Any
    ) -> None:
        self.model, self.target_forward, self.target = model, target_forward, target
        self.layer_number, self.config = layer_number, config

    @staticmethod
    def apply_scalings_to_x(x: Tensor, scalings_layer: Tensor, adapter: int) -> Tensor:
        """x (rows, tokens, ...) times an adapter's weights, of weights (rows, tokens, adapters)."""
        return x * scalings_layer[..., adapter, None]

    def get_maybe_topk_scalings(self, scalings: Tensor) -> Tensor:
        """Of weights (rows, tokens, layers, adapters) the layer's own, those of the adapters that are kept."""
        return kept(scalings[:, :, self.layer_number], self.config)

    def shaped(self, strength: Tensor) -> Tensor:
        """An adapter's weights (rows, tokens) as they multiply what is (rows, tokens, r)."""
        return strength[..., None]

    def forward(self, x: Tensor, *args: Any, scalings: Tensor | None = None, **kwargs: Any) -> Any:
        """The layer's output; `scalings` (rows, tokens, layers, adapters), None: as without X-LoRA.

        Raises:
            ValueError: an adapter of another formula than LoRA's.
        """
        board = self.target.board
        if getattr(self.model, "disabled", False):
            with board.off():
                return self.target_forward(x, *args, **kwargs)
        if scalings is None:
            return self.target_forward(x, *args, **kwargs)
        names, known = self.target.active_adapters, list(self.config.adapters)
        methods = [m for name in names for m in self.target.methods[name]]
        if not all(type(m).weighed and not m.biased for m in methods):
            raise ValueError("X-LoRA weighs plain LoRA adapters: no variants of it, and no other methods.")
        weights = self.get_maybe_topk_scalings(scalings) * self.config.global_scaling_weight
        strengths = {f"{name}.strength": self.shaped(weights[..., known.index(name)]) for name in names}
        with board.using(call=replace(board.route_here().call, extras=strengths)):
            return self.target_forward(x, *args, **kwargs)


class XLoraLinearLayer(XLoraLayer):
    """Of a linear layer."""


class XLoraEmbeddingLayer(XLoraLayer):
    """Of an embedding."""


class XLoraConv2dLayer(XLoraLayer):
    """Of a convolution, which sees no tokens: the weights have one for each row."""

    def shaped(self, strength: Tensor) -> Tensor:
        """An adapter's weights (rows, 1) as they multiply what is (rows, r, height, width)."""
        if strength.shape[1] != 1:
            raise ValueError(f"A convolution takes one weight for each row, and there are {strength.shape[1]}.")
        return strength[..., None, None]


LAYERS = {"Linear": XLoraLinearLayer, "Embedding": XLoraEmbeddingLayer, "Conv2d": XLoraConv2dLayer}


def convert_layers_to_xlora(base: nn.Module, xloramodel: nn.Module, config: Any) -> tuple[int, torch.device | None]:
    """Give the adapted layers of a model forwards that take `scalings`; (how many, the device of the last)."""
    count, device = 0, None
    for layer in list(base.modules()):
        if not isinstance(layer, AdaptedLayer):
            continue
        kind = next((own for name, own in LAYERS.items() if isinstance(layer.frozen, BASES[name]())), None)
        if kind is not None and layer.methods:
            layer.forward = kind(xloramodel, layer, layer.forward, count, config).forward  # type: ignore[method-assign]
            device = next((p.device for leaves in layer.containers.values() for p in leaves.parameters()), device)
            count += 1
    return count, device
