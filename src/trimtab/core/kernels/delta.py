"""A linear layer whose weight has a full-size change formed from few tensors: y = x·(W + form(tensors))ᵀ + b.

The change is formed again in the backward pass instead of being saved, so that training needs no copy of the weights.
Where W is fp32 it is added to W and one product does for both, forward and backward: of the five products that a layer
and its change have by themselves, three are left. In half precision a small change would round away on W: it has
products of its own there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.core.kernels.dense import accumulate, linear, product
from trimtab.core.kernels.rebuilt import Rebuilt, rebuilt
from trimtab.core.kernels.usual import autocasts, ordinary, product_dtype, recorded

Form = Callable[..., Tensor]


def delta_linear(
    x: Tensor, W: Tensor | None, b: Tensor | None, form: Form, *tensors: Tensor, onto: Form | None = None
) -> Tensor:
    """x·(W + form(*tensors))ᵀ + b (..., out), for x (..., in) and a frozen W (out, in), or None: the change alone.

    `form` gives the change (out, in), in memory of its own, and must be a function of its arguments alone: it runs
    twice, outside autocast. `onto`, where it is given, is W + form(*tensors) of (W, *tensors).
    """
    own = tensors if W is None else (W, *tensors)
    trained = W is not None and W.requires_grad
    if not torch.is_grad_enabled() or recorded() or trained or not all(map(ordinary, (x, *own))):
        return plain(x, W, b, form, *tensors)
    source = rebuilt(x) if any(t.requires_grad for t in tensors) else None
    y: Tensor = _Delta.apply(x, W, b, product_dtype(x), source, form, onto, *tensors)
    return y


def plain(x: Tensor, W: Tensor | None, b: Tensor | None, form: Form, *tensors: Tensor) -> Tensor:
    """`delta_linear` by single operations."""
    D, _ = _formed(x, None, form, None, tensors)
    if W is None:
        return F.linear(x, D.to(x.dtype), b)
    if _sums(W):
        return F.linear(x, W + D.to(W.dtype), b)
    return F.linear(x, W, b) + F.linear(x, D.to(x.dtype))


def _sums(W: Tensor) -> bool:
    """Whether the change can be added to the weight without being rounded away."""
    return W.dtype in (torch.float32, torch.float64)


def _formed(
    x: Tensor, W: Tensor | None, form: Form, onto: Form | None, tensors: Sequence[Tensor]
) -> tuple[Tensor, bool]:
    """The change, or the weight with it, and whether it is that."""
    whole = W is not None and onto is not None and _sums(W)
    if whole:
        form, tensors = cast(Form, onto), (cast(Tensor, W), *tensors)
    if not autocasts(x):
        return form(*tensors), whole
    with torch.autocast(x.device.type, enabled=False):
        return form(*tensors), whole


class _Delta(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor | None,
        b: Tensor | None,
        dtype: torch.dtype,
        source: Rebuilt | None,
        form: Form,
        onto: Form | None,
        *tensors: Tensor,
    ) -> Tensor:
        flat, (D, whole) = x.reshape(-1, x.shape[-1]).to(dtype), _formed(x, W, form, onto, tensors)
        b = None if b is None else b.to(dtype)
        if W is None or whole:
            y = linear(flat, D.to(dtype), b)
        elif _sums(W):
            y = linear(flat, D.to(W.dtype).add_(W).to(dtype), b)
        else:
            y = accumulate(linear(flat, W.to(dtype), b), flat, D.to(dtype).t())
        trained = any(ctx.needs_input_grad[7:])
        ctx.save_for_backward(x if trained and source is None else None, W, *tensors)
        ctx.form, ctx.onto, ctx.source = form, onto, source
        ctx.dtype, ctx.shape, ctx.autocast = dtype, x.shape, autocasts(x)
        return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], len(D)))  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, W, *tensors = ctx.saved_tensors
        x = x if ctx.source is None else ctx.source.take()
        if torch.is_grad_enabled():
            return _differentiable(ctx, x, W, tensors, dy)
        with torch.autocast(dy.device.type, enabled=False):
            return _gradients(ctx, x, W, tensors, dy.reshape(-1, dy.shape[-1]))


def _gradients(
    ctx: Any, x: Tensor | None, W: Tensor | None, tensors: Sequence[Tensor], dy: Tensor
) -> tuple[Tensor | None, ...]:
    need, dtype = ctx.needs_input_grad, ctx.dtype
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_(n) for t, n in zip(tensors, need[7:], strict=True)]
        D, whole = _formed(dy, W, ctx.form, ctx.onto, leaves)
    dx = None
    if need[0]:
        M = D.detach()
        if W is None or whole:
            dx = product(dy, M.to(dtype))
        elif _sums(W):
            dx = product(dy, M.to(W.dtype).add_(W).to(dtype))
        else:
            dx = accumulate(product(dy, W.to(dtype)), dy, M.to(dtype))
        dx = dx.view(ctx.shape)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    found: Any = iter(())
    if wanted:
        assert x is not None
        dD = product(dy.t(), x.reshape(-1, x.shape[-1]).to(dtype))
        found = iter(torch.autograd.grad(D, wanted, dD.to(D.dtype)))
    db = dy.sum(0) if need[2] else None
    return (dx, None, db, None, None, None, None, *(next(found) if n else None for n in need[7:]))


def _differentiable(
    ctx: Any, x: Tensor | None, W: Tensor | None, tensors: Sequence[Tensor], dy: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients by operations that can be differentiated again."""
    need = ctx.needs_input_grad
    if x is None:
        raise RuntimeError("A second derivative needs the layer's input, which is not kept where nothing is trained.")
    with torch.autocast(x.device.type, ctx.dtype, enabled=ctx.autocast):
        y = plain(x, W, None, ctx.form, *tensors)
    wanted = {i: t for i, t in ((0, x), *enumerate(tensors, 7)) if need[i]}
    found = dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), dy, create_graph=True), strict=True))
    found |= {2: dy.flatten(0, -2).sum(0)} if need[2] else {}
    return tuple(found.get(i) for i in range(len(need)))
