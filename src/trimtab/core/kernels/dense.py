"""Dense products in fp32 by the library that forms them fastest, where that is not the one torch takes.

torch gives fp32 products on x86 to MKL, also on processors MKL was not made for. Measured on an AMD EPYC with AVX-512,
oneDNN, which torch ships, takes 0.80 to 0.95 of its time (bench/products.py): there it is asked, for what is large
enough. On an Intel Xeon it takes 1.05 to 1.2, and on an AMD EPYC without AVX-512 a step with it took 1.2 of the one
without: everywhere else, and for everything else, these are torch's own products.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.core.kernels.usual import autocasts, ordinary, recorded

LEAST = 1 << 20  # multiplications from which it pays: below, asking costs more than is saved


def _found() -> Any:
    """oneDNN's linear layer where it is known to be faster, or None."""
    capabilities: Any = getattr(torch.cpu, "get_capabilities", dict)()
    found = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
    known = "AMD" in str(capabilities.get("cpu_name")) and torch.backends.cpu.get_cpu_capability() == "AVX512"
    return found.default if found is not None and known else None


ONEDNN = _found()


def linear(x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
    """x·Wᵀ + b (n, out) of x (n, in), W (out, in), b (out,), outside autograd."""
    return _asked(x, W, b) if _pays(x, W) and (b is None or b.dtype == torch.float32) else F.linear(x, W, b)


def product(x: Tensor, M: Tensor) -> Tensor:
    """x·M (n, k) of x (n, m), M (m, k), outside autograd."""
    return linear(x, M.t())


def accumulate(y: Tensor, x: Tensor, M: Tensor) -> Tensor:
    """y (n, k) with x·M added in place."""
    return y.add_(_asked(x, M.t())) if _pays(x, M.t()) else y.addmm_(x, M)


def outer(x: Tensor, y: Tensor) -> Tensor:
    """xᵀ·y (m, r) of x (n, m), y (n, r), r few."""
    pays = x.numel() * y.shape[1] >= 4 * LEAST and _pays(y.t(), x.t())
    return _asked(y.t(), x.t()).t() if pays else torch.mm(x.t(), y)


def _asked(x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
    """x·Wᵀ + b by oneDNN."""
    y: Tensor = ONEDNN(x, W, b, "none", [], "")
    return y


def _pays(x: Tensor, W: Tensor) -> bool:
    """Whether oneDNN is to be asked for x·Wᵀ: plain matrices in fp32 on the processor, and many of them."""
    if ONEDNN is None or x.dtype != torch.float32 or W.dtype != torch.float32 or x.ndim != 2 or W.ndim != 2:
        return False
    if len(x) < 2 or len(x) * W.numel() < LEAST or not (x.is_cpu and W.is_cpu) or not torch._C._get_mkldnn_enabled():
        return False
    return _dense(x) and _dense(W) and torch._C._len_torch_dispatch_stack() == 0  # (who counts operations sees torch's)


def _dense(t: Tensor) -> bool:
    """Whether the rows or the columns of a matrix lie without gaps."""
    return t.stride() in ((t.shape[1], 1), (1, t.shape[0]))


def frozen_linear(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor | None:
    """x·Wᵀ + b (..., out) of a layer that is not trained, or None where torch's own product does."""
    if ONEDNN is None or x.ndim < 2 or x.shape[-1] != W.shape[-1] or W.requires_grad or W.dtype != x.dtype:
        return None
    if not x.is_cpu or x.dtype != torch.float32 or x.numel() * len(W) < LEAST or (b is not None and b.requires_grad):
        return None
    if recorded() or autocasts(x) or not (ordinary(x) and ordinary(W)):
        return None
    if torch.is_grad_enabled() and x.requires_grad:
        y: Tensor = _Frozen.apply(x, W, b)
        return y
    return _unflattened(linear(x.flatten(0, -2), W, b), x)


def _unflattened(y: Tensor, x: Tensor) -> Tensor:
    """y (n, out) with the leading axes of x, as a tensor that others may write into."""
    return y if x.ndim == 2 else torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[1]))  # type: ignore[no-any-return]


class _Frozen(torch.autograd.Function):
    """(x, W, b) to x·Wᵀ + b, of which only x has a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        ctx.save_for_backward(W)
        return _unflattened(linear(x.reshape(-1, x.shape[-1]), W, b), x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (W,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            return dy @ W, None, None
        dx = product(dy.reshape(-1, dy.shape[-1]), W)
        return dx.view(*dy.shape[:-1], dx.shape[1]), None, None
