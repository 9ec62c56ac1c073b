"""Number formats: how to read the weight of a layer as plain numbers, and how to write it back.

A format is one class and one line in `FORMATS`; the first that fits a parameter serves it. No quantisation library is
imported here unless the layer or its weight comes from it, so none is needed for plain models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from trimtab.errors import ReadOnlyWeight
from trimtab.formats import bitsandbytes, offload
from trimtab.formats.bitsandbytes import Bnb4bit, Bnb8bit, BnbUnpacked
from trimtab.formats.opaque import Opaque, packed_linear
from trimtab.formats.plain import FLOATS, Format, device
from trimtab.formats.torchao import Subclass

__all__ = [
    "FORMATS", "compute_dtype", "device", "format_of", "install", "moved", "needs_own", "packed_linear", "pin", "plain",
    "quantised", "read", "run_dtype", "shape", "unpin", "write",
]  # fmt: skip

PLAIN, OPAQUE = Format(), Opaque()
FORMATS: list[Format] = [Bnb4bit(), Bnb8bit(), BnbUnpacked(), Subclass(), OPAQUE, PLAIN]


def format_of(layer: nn.Module, weight: Any) -> Format:
    """The format of a parameter of a layer."""
    if type(weight) is nn.Parameter and weight.dtype in FLOATS and type(layer).__module__.startswith("torch."):
        return PLAIN
    return OPAQUE if weight is None else next(f for f in FORMATS if f.fits(layer, weight))


def quantised(layer: nn.Module, param: str = "weight") -> bool:
    """Whether a parameter is kept in anything but plain numbers."""
    weight = getattr(layer, param, None)
    return packed_linear(layer) if weight is None else format_of(layer, weight) is not PLAIN


def shape(layer: nn.Module, param: str) -> tuple[int, int]:
    """The two-dimensional shape of a parameter in plain numbers, as stored."""
    weight = getattr(layer, param, None)
    first, *rest = format_of(layer, weight).shape(layer, weight)
    return int(first), int(torch.Size(rest).numel())


def read(layer: nn.Module, weight: Tensor | None) -> Tensor:
    """The parameter as a plain floating-point tensor, detached. It may be one that the layer held before a merge."""
    return format_of(layer, weight).read(layer, weight)


def write(layer: nn.Module, param: str, value: Tensor) -> None:
    """Give the layer a new parameter object holding `value` in the old one's number format.

    Raises:
        ReadOnlyWeight: the format cannot be written.
    """
    old = offload.value(layer, param, getattr(layer, param, None))
    install(layer, {param: format_of(layer, old).make(layer, old, value.detach())})


def install(layer: nn.Module, parameters: Mapping[str, Any]) -> None:
    """Exchange parameter objects: the one way in and out, since some formats keep a part of the weight in the layer.

    Raises:
        ReadOnlyWeight: one is computed from other parameters.
    """
    changed = {k: v for k, v in parameters.items() if layer._parameters.get(k) is not v}
    for name in changed:
        needs_own(layer, name)
    for name in changed:
        if (old := layer._parameters.get(name)) is not None:
            format_of(layer, old).leave(layer, old)
    layer._parameters.update(changed)
    for new in changed.values():
        if new is not None:
            format_of(layer, new).enter(layer, new)
    offload.install(layer, changed)


def needs_own(layer: nn.Module, param: str) -> None:
    """See that a parameter is the layer's own: where it is computed from others, a new object would be ignored.

    Raises:
        ReadOnlyWeight: it is computed (torch's parametrisations, weight norm).
    """
    if param in layer._parameters or param in layer._buffers or not isinstance(getattr(layer, param, None), Tensor):
        return
    raise ReadOnlyWeight(
        f"The {param} of a {type(layer).__name__} is computed from others in every forward, so nothing can be merged "
        "into it. Keep the adapter unmerged, or let the layer have it as a parameter before the adapter comes: "
        "torch.nn.utils.parametrize.remove_parametrizations, torch.nn.utils.remove_weight_norm."
    )


def pin(model: nn.Module) -> None:
    """Keep every layer of a model from holding its weight another way (`bitsandbytes.pin`), so that gradients pass."""
    for layer in model.modules():
        bitsandbytes.pin(layer)


def unpin(model: nn.Module) -> None:
    """Undo one `pin` of a model: its layers hold their weights as their libraries have it."""
    for layer in model.modules():
        bitsandbytes.unpin(layer)


def moved(parameter: Any, fn: Callable[[Any], Any]) -> None:
    """Apply a conversion of nn.Module (`to`, `half` ...) to a parameter that no module holds, in place."""
    new = fn(parameter)
    if is_traceable_wrapper_subclass(parameter) or not torch._has_compatible_shallow_copy_type(parameter, new):
        torch.utils.swap_tensors(parameter, nn.Parameter(new, requires_grad=parameter.requires_grad))
        return
    parameter.data = new.data
    for name in ("CB", "SCB"):
        if getattr(parameter, name, None) is not None:
            setattr(parameter, name, parameter.data if name == "CB" else getattr(parameter, name).to(new.device))


def compute_dtype(layer: nn.Module, param: str) -> torch.dtype:
    """The number format the layer computes in (fp32 where it follows its input)."""
    weight = getattr(layer, param, None)
    return format_of(layer, weight).dtype(layer, weight) or torch.float32


def run_dtype(layer: nn.Module, param: str, x: Tensor) -> torch.dtype:
    """The number format in which the layer treats the input `x`."""
    found = format_of(layer, getattr(layer, param, None)).dtype(layer, getattr(layer, param, None))
    return found or (x.dtype if x.is_floating_point() else torch.float32)


def plain(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """The module with a plain layer in place of every quantised Linear and Embedding in it (or of itself).

    Args:
        dtype: of the new weights; by default what each layer computes in.
    """
    made: dict[int, nn.Module] = {}

    def replaced(child: Any) -> nn.Module:
        known = isinstance(child, nn.Linear | nn.Embedding) or packed_linear(child)
        if known and id(child) not in made and quantised(child):
            made[id(child)] = _plain_layer(child, dtype or compute_dtype(child, "weight"))
        return made.get(id(child), child)

    for parent in list(module.modules()):
        for name, child in parent.named_children():
            parent._modules[name] = replaced(child)
    return replaced(module)


def _plain_layer(layer: Any, dtype: torch.dtype) -> nn.Module:
    W, bias = read(layer, getattr(layer, "weight", None)).to(dtype), getattr(layer, "bias", None)
    if isinstance(layer, nn.Embedding):
        rows, width = W.shape
        new: Any = nn.Embedding(rows, width, padding_idx=layer.padding_idx, device="meta")
    else:
        new = nn.Linear(W.shape[1], W.shape[0], bias=False, device="meta")
        new.bias = None if bias is None else nn.Parameter(bias.detach().to(dtype, copy=True), requires_grad=False)
    new.weight = nn.Parameter(W, requires_grad=False)
    made: nn.Module = new.train(layer.training)
    return made
