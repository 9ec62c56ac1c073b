"""Steps of an adapter that are formed again in the backward pass instead of being kept: y = form(x, *tensors).

Autograd's own spelling keeps what every operation of a formula needs. Where a formula is cheap beside the layer's own
product, only what it starts from is kept, and of that x only where the graph does not hold what it was made of.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trimtab.core.kernels.rebuilt import Rebuilt, rebuilt
from trimtab.core.kernels.usual import autocasts, ordinary, product_dtype, recorded

Form = Callable[..., Tensor]


def anew(form: Form, x: Tensor, *tensors: Tensor) -> Tensor:
    """form(x, *tensors), in memory of its own; `form` must be a function of its arguments alone: it runs twice."""
    if not torch.is_grad_enabled() or recorded() or not all(map(ordinary, (x, *tensors))):
        return form(x, *tensors)
    source = rebuilt(x) if any(t.requires_grad for t in (x, *tensors)) else None
    y: Tensor = _Anew.apply(form, source, x, *tensors)
    return y


class _Anew(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, form: Form, source: Rebuilt | None, x: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(x if source is None else None, *tensors)
        ctx.form, ctx.source, ctx.autocast, ctx.dtype = form, source, autocasts(x), product_dtype(x)
        return form(x, *tensors)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, *tensors = ctx.saved_tensors
        own = (x if ctx.source is None else ctx.source.take(), *tensors)
        need, again = ctx.needs_input_grad[2:], torch.is_grad_enabled()
        if not again:
            own = tuple(t.detach().requires_grad_(n) for t, n in zip(own, need, strict=True))
        with torch.enable_grad(), torch.autocast(dy.device.type, ctx.dtype, enabled=ctx.autocast):
            y = ctx.form(*own)
        wanted = [t for t, n in zip(own, need, strict=True) if n]
        found = iter(torch.autograd.grad(y, wanted, dy, create_graph=again))
        return (None, None, *(next(found) if n else None for n in need))
