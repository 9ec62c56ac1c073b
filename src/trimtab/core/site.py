"""A frozen layer seen as a matrix W of shape (..., out, in), whatever its class, layout or number format.

A kind of layer is one class: how its weight lies in memory, and how the layer multiplies by a matrix.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from trimtab.core import weights


class Site:
    """One adapted parameter of one layer.

    Args:
        owner: the module that wraps the layer; its `base_layer` is read at each use, since engines swap it.
        name: the layer's path in the model.
        param: the parameter's name in the layer.
    """

    kind: ClassVar[str]
    batch: tuple[int, ...] = ()
    flipped = False  # the weight is stored (in, out)

    def __init__(self, owner: Any, name: str, param: str = "weight") -> None:
        self.owner, self.name, self.param = owner, name, param
        self.fan_out, self.fan_in = self.shape()

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        """Whether `layer` is of this kind."""
        raise NotImplementedError

    @property
    def layer(self) -> nn.Module:
        """The frozen layer."""
        layer: nn.Module = self.owner.base_layer
        return layer

    def stored(self, param: str) -> Tensor | None:
        """The layer's own parameter, as it was before any merge."""
        held = self.owner.held
        return held[param] if param in held else getattr(self.layer, param, None)

    def shape(self) -> tuple[int, int]:
        """(out, in) of the matrix."""
        out, into = weights.shape(self.layer, self.param)
        return (into, out) if self.flipped else (out, into)

    def matrix(self) -> Tensor:
        """The original weight (..., out, in): what the layer held before any merge, dequantised."""
        W = weights.read(self.layer, self.stored(self.param))
        return W.mT if self.flipped else W

    def bias(self) -> Tensor | None:
        """The original bias (out,), or None."""
        b = self.stored("bias")
        return None if b is None else b.detach()

    def store(self, W: Tensor) -> Tensor:
        """`W` (..., out, in) in the layer's own layout."""
        return (W.mT if self.flipped else W).contiguous()

    def write(self, W: Tensor, b: Tensor | None) -> None:
        """Give the layer new parameters in its own layout and number format, as new objects: the old ones stay whole.

        Raises:
            ReadOnlyWeight: the number format cannot be written.
        """
        weights.write(self.layer, self.param, self.store(W))
        if b is not None and self.bias() is not None:
            weights.write(self.layer, "bias", b)

    def run(self, W: Tensor, b: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        """The layer's own computation with other parameters."""
        new = {self.param: self.store(W).to(self.dtype)} | ({} if b is None else {"bias": b.to(self.dtype)})
        return functional_call(self.layer, new, args, kwargs)

    def apply(self, x: Tensor, M: Tensor) -> Tensor:
        """Multiply by M (k, in) the way the layer multiplies by W."""
        return F.linear(x, M)

    def mix(self, h: Tensor, M: Tensor) -> Tensor:
        """Multiply the feature axis of an output by M (k', k)."""
        return F.linear(h, M)

    def add(self, y: Tensor, h: Tensor, M: Tensor) -> Tensor:
        """y + mix(h, M), with one rounding where the layer allows it."""
        return y + self.mix(h, M)

    def spread(self, v: Tensor) -> Tensor:
        """A vector (out,) shaped to broadcast along the feature axis of an output."""
        return v

    def down(self, r: int) -> tuple[int, ...]:
        """The shape in which this kind keeps an M (r, in)."""
        return (r, self.fan_in)

    def up(self, r: int) -> tuple[int, ...]:
        """The shape in which this kind keeps an M (out, r)."""
        return (self.fan_out, r)

    @property
    def dtype(self) -> torch.dtype:
        """The number format the layer computes in."""
        return weights.compute_dtype(self.layer, self.param)

    @property
    def device(self) -> torch.device:
        """Where the layer's weight lives."""
        weight = self.stored(self.param)
        assert weight is not None
        return weight.device


class LinearSite(Site):
    """nn.Linear and its subclasses: W (out, in)."""

    kind = "linear"

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        """Any nn.Linear."""
        return isinstance(layer, nn.Linear)

    def add(self, y: Tensor, h: Tensor, M: Tensor) -> Tensor:
        """y + h Mᵀ, by one addmm where nothing in between can be seen."""
        if y.dtype == h.dtype == M.dtype and y.is_contiguous() and y.ndim > 1:
            return torch.addmm(y.flatten(0, -2), h.flatten(0, -2), M.T).view_as(y)
        return y + F.linear(h, M)


class Conv1DSite(LinearSite):
    """The Conv1D layer of GPT-2, a linear layer whose weight is stored (in, out)."""

    flipped = True

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        """transformers' Conv1D, known by its name: this floor does not know transformers."""
        return type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")


class EmbeddingSite(Site):
    """nn.Embedding: W (dim, vocabulary), stored (vocabulary, dim); multiplying is looking up columns."""

    kind = "embedding"
    flipped = True

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        """Any nn.Embedding."""
        return isinstance(layer, nn.Embedding)

    def apply(self, x: Tensor, M: Tensor) -> Tensor:
        """Look up columns `x` of M (k, vocabulary), scaled as the layer scales its own (Gemma's embed_scale)."""
        layer = self.layer
        assert isinstance(layer, nn.Embedding)
        h = F.embedding(x, M.T, layer.padding_idx, layer.max_norm, layer.norm_type, layer.scale_grad_by_freq)
        return self.scaled(h)

    def scaled(self, h: Tensor) -> Tensor:
        """Looked-up rows as the layer's own output scales them (Gemma's embed_scale)."""
        scale = getattr(self.layer, "embed_scale", None)
        return h if scale is None else h * torch.as_tensor(scale, dtype=h.dtype, device=h.device)


SITES: list[type[Site]] = [LinearSite, Conv1DSite, EmbeddingSite]


def site_class(layer: nn.Module) -> type[Site] | None:
    """The kind of site a layer is, or None where we know none."""
    return next((cls for cls in SITES if cls.fits(layer)), None)
