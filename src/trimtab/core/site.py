"""A frozen layer seen as a matrix W of shape (..., out, in), whatever its class, layout or number format.

A kind of layer is one class: how its weight lies in memory, and how the layer multiplies by a matrix.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from importlib import import_module
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from trimtab.core import kernels
from trimtab.formats import offload, weights

Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # of a layer's call


class Site:
    """One adapted parameter of one layer.

    Args:
        owner: the module that wraps the layer; its `base_layer` is read at each use, since engines swap it.
        name: the layer's path in the model.
        param: the parameter's name in the layer.
    """

    kind: ClassVar[str]
    weighs: ClassVar[str] = "weight"  # the parameter that is the matrix, unless another one is named ("": none is)
    bias_param: ClassVar[str] = "bias"  # the parameter that is added to its products ("": none)
    fused: ClassVar[bool] = True  # its input and output may be edited instead of its weight
    whole: ClassVar[bool] = False  # its rows lie in all of its arguments: it says how to cut a call, and join outputs
    reads: ClassVar[frozenset[str]] = frozenset()  # parameters that the model reads off the layer without calling it
    parts: ClassVar[tuple[str, ...]] = ()  # layers inside that are adapted whenever this one is
    batch: tuple[int, ...] = ()
    flipped = False  # the weight is stored (in, out)
    groups = 1  # of a convolution: each sees its own part of the input
    kernel: tuple[int, ...] = ()  # of a convolution

    def __init__(self, owner: Any, name: str, param: str = "") -> None:
        self.owner, self.name, self.param = owner, name, param or self.weighs
        self.fan_out, self.fan_in = self.shape()

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        """Whether `layer` is of this kind."""
        raise NotImplementedError

    @property
    def layer(self) -> nn.Module:
        """The frozen layer."""
        layer: nn.Module = self.owner.frozen
        return layer

    @property
    def params(self) -> tuple[str, ...]:
        """The parameters that adapters here may change."""
        return (self.param, self.bias_param) if self.bias_param else (self.param,)

    def stored(self, param: str) -> Tensor | None:
        """The layer's own parameter, as it was before any merge."""
        layer, originals = self.layer, self.owner.originals
        return offload.value(layer, param, originals.now(param), original=param in originals.held)

    @property
    def mesh(self) -> Any:
        """The processes among which the layer is cut, each of which has the whole adapter; None: it is not."""
        return None

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
        return self.stored(self.bias_param) if self.bias_param else None  # in the graph: an adapter may train it

    def store(self, W: Tensor) -> Tensor:
        """`W` (..., out, in) in the layer's own layout."""
        return (W.mT if self.flipped else W).contiguous()

    def write(self, W: Tensor, b: Tensor | None) -> None:
        """Give the layer new parameters in its own layout and number format, as new objects: the old ones stay whole.

        Raises:
            ReadOnlyWeight: the number format cannot be written.
        """
        weights.write(self.layer, self.param, self.store(W))
        if b is None:
            return
        if self.bias() is not None:
            weights.write(self.layer, self.bias_param, b)
        else:  # the adapter brings a bias of its own
            self.layer._parameters[self.bias_param] = nn.Parameter(b.to(self.dtype), requires_grad=False)

    def run(self, W: Tensor, b: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        """The layer's own computation with other parameters."""
        if weights.quantised(self.layer, self.param):  # whose own forward takes nothing but its own format
            x = args[0] if args else next(iter(kwargs.values()))
            dtype = weights.run_dtype(self.layer, self.param, x)
            y = self.apply(x.to(dtype) if x.is_floating_point() else x, W.to(dtype))
            y = y if b is None else y + self.spread(b.to(dtype))
            return y.to(x.dtype) if x.is_floating_point() else y
        new = {self.owner.prefix + name: value for name, value in self.named(W, b).items()}
        with offload.running(self.layer):
            return functional_call(self.owner.base_layer, new, args, kwargs)

    def named(self, W: Tensor, b: Tensor | None) -> dict[str, Tensor]:
        """W and b as the layer's own parameters, by name."""
        new = {self.param: self.store(W).to(self.dtype)}
        return new if b is None else new | {self.bias_param: b.to(self.dtype)}

    def apply(self, x: Tensor, M: Tensor) -> Tensor:
        """Multiply by M (k, in) the way the layer multiplies by W."""
        return F.linear(x, M)

    def mix(self, h: Tensor, M: Tensor) -> Tensor:
        """Multiply the feature axis of an output by M (k', k)."""
        return F.linear(h, M)

    def add(self, y: Tensor, h: Tensor, M: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """y + mix(h, M), with one rounding where the layer allows it; y scaled and shifted by vectors (out,) before."""
        return self.moved(y, scale, shift) + self.mix(h, M)

    def moved(self, y: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
        """scale·y + shift, for vectors (out,) or None."""
        y = y if scale is None else y * self.spread(scale)
        return y if shift is None else y + self.spread(shift)

    def widens(self, x: Tensor) -> bool:
        """Whether `apply` and `add` take factors in fp32 beside an `x` in half precision."""
        return False

    def spread(self, v: Tensor) -> Tensor:
        """A vector (out,) shaped to broadcast along the feature axis of an output."""
        return v

    def down(self, r: int) -> tuple[int, ...]:
        """The shape in which this kind keeps an M (r, in)."""
        return (r, self.fan_in)

    def up(self, r: int) -> tuple[int, ...]:
        """The shape in which this kind keeps an M (out, r)."""
        return (self.fan_out, r)

    def vector(self) -> tuple[int, ...]:
        """The shape in which this kind keeps a v (out,)."""
        return (*self.batch, self.fan_out)

    def dense(self, M: Tensor) -> Tensor:
        """A matrix (out, in/groups) of what each group sees as the matrix (out, in) it stands for."""
        return M

    def lower(self, A: Tensor) -> Tensor:
        """An M of the shape `down(r)` as the matrix (..., r, in) it is; a view where one can be."""
        return A

    def upper(self, B: Tensor) -> Tensor:
        """An M of the shape `up(r)` as the matrix (..., out, r) it is; a view where one can be."""
        return B

    def plain(self) -> tuple[Tensor, Tensor | None] | None:
        """The layer's own weight (as it lies) and bias, where nothing stands between them and its product.

        That is the ticket of a fused step (`Method.through`): None where the layer is hooked, kept elsewhere,
        quantised, or of a class with a forward of its own. Autocast is the step's to follow.
        """
        return None

    def lead(self, x: Tensor) -> tuple[int, ...]:
        """The leading axes of an input: those of rows and tokens, without the features."""
        return tuple(x.shape[:-1])

    @property
    def dtype(self) -> torch.dtype:
        """The number format the layer computes in."""
        return weights.compute_dtype(self.layer, self.param)

    @property
    def device(self) -> torch.device:
        """Where the layer's weight lives."""
        return weights.device(self.layer, self.stored(self.param))


def plain_linear(layer: Any) -> tuple[Tensor, Tensor | None] | None:
    """W and b of an nn.Linear itself, between which and its product nothing stands; else None."""
    if type(layer) is not nn.Linear or "forward" in layer.__dict__:
        return None
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return None
    parameters = layer._parameters
    W = parameters["weight"]
    return (W, parameters["bias"]) if type(W) is nn.Parameter and not W.is_meta else None


class LinearSite(Site):
    """nn.Linear and its subclasses: W (out, in)."""

    kind = "linear"

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        """Any nn.Linear, and the packed linear layers of quantisation libraries."""
        return isinstance(layer, nn.Linear) or weights.packed_linear(layer)

    def plain(self) -> tuple[Tensor, Tensor | None] | None:
        """W and b of an nn.Linear itself."""
        return plain_linear(self.owner._modules["base_layer"])

    def widens(self, x: Tensor) -> bool:
        """Half-precision activations and factors in fp32 are multiplied exactly (`kernels`), but under autocast."""
        return x.dtype in kernels.HALF and not torch.is_autocast_enabled(x.device.type)

    def apply(self, x: Tensor, M: Tensor) -> Tensor:
        """x Mᵀ."""
        return kernels.project(x, M) if x.dtype in kernels.HALF and M.dtype == torch.float32 else F.linear(x, M)

    def add(self, y: Tensor, h: Tensor, M: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """y + h Mᵀ (y scaled and shifted before), by one addmm where nothing in between can be seen."""
        if y.dtype in kernels.HALF and h.dtype == M.dtype == torch.float32:
            return kernels.add_product(y, h, M, scale, shift)
        y = self.moved(y, scale, shift)
        if y.dtype == h.dtype == M.dtype and y.is_contiguous() and y.ndim > 1:
            return torch.addmm(y.flatten(0, -2), h.flatten(0, -2), M.T).view_as(y)
        return y + F.linear(h, M)


class Conv1DSite(LinearSite):
    """The Conv1D layer of GPT-2, a linear layer whose weight is stored (in, out)."""

    flipped = True

    def plain(self) -> None:
        """It multiplies by a weight that lies the other way round."""

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

    def lead(self, x: Tensor) -> tuple[int, ...]:
        """All axes of the indices."""
        return tuple(x.shape)

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


class Sites(list[Site]):
    """The sites of one adapter in the model's order, and the model they are in."""

    def __init__(self, model: nn.Module, sites: Iterable[Site]) -> None:
        super().__init__(sites)
        self.model = model


# One line a kind of layer: the first that fits is it. Parameters without a layer of their own are named, not found.
SITES = [
    "sites.attention:ReadLinearSite",
    "sites.parallel:ParallelLinearSite",
    "site:LinearSite",
    "site:Conv1DSite",
    "site:EmbeddingSite",
    "sites.conv:ConvSite",
    "sites.attention:AttentionSite",
    "sites.vector:VectorSite",
    "sites.block:BlockSite",
]
NAMED = "sites.parameter:ParameterSite"


@cache
def _load(line: str) -> type[Site]:
    file, _, name = line.partition(":")
    cls: type[Site] = getattr(import_module(f"trimtab.core.{file}"), name)
    return cls


def site_class(layer: nn.Module, param: str | None = None) -> type[Site] | None:
    """The kind of site a layer is (or a parameter of it that a config names), or None where we know none."""
    if param is not None:
        return _load(NAMED)
    return next((cls for cls in map(_load, SITES) if cls.fits(layer)), None)
