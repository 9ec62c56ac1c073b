"""The head and its cross-entropy in one step, on the rows that are supervised, a chunk of rows at a time.

The logits of a batch are the largest tensor of a training step, and autograd keeps them twice. Here a chunk of logits
becomes its own gradient in place: the losses and, the head being frozen, the gradient of the hidden states are had
with two products and no logits kept.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.core.kernels.usual import product_dtype, recorded

CHUNK = 1 << 24  # logits formed at a time: 64 MB in fp32


def linear_cross_entropy(
    hidden: Tensor,  # (..., d)
    W: Tensor,  # (vocabulary, d), the head
    labels: Tensor,  # (...), already shifted
    *,
    bias: Tensor | None = None,  # (vocabulary,)
    ignore_index: int = -100,
    reduction: Literal["mean", "sum", "none"] = "mean",
    scale: float = 1.0,
    softcap: float | None = None,
    chunk: int | None = None,
) -> Tensor:
    """The cross-entropy of the logits softcap·tanh(scale·(hidden·Wᵀ + bias)/softcap) against the labels, in fp32.

    A scalar, or with `reduction="none"` a loss for each row, zero where its label is `ignore_index`; rows weigh as the
    caller's gradient says. A trained head costs one product more than by single operations, a frozen one none.

    Args:
        chunk: rows whose logits are formed at a time.
    """
    flat, wanted = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1).to(hidden.device)
    if recorded():
        logits = _logits(flat, W, bias, scale, softcap)
        plain = F.cross_entropy(logits, wanted, ignore_index=ignore_index, reduction=reduction)
        return plain.view(labels.shape) if reduction == "none" else plain
    rows = (wanted != ignore_index).nonzero().squeeze(1)
    if len(rows) < len(flat):
        flat, wanted = flat.index_select(0, rows), wanted.index_select(0, rows)
    weight = 1 / len(rows) if reduction == "mean" and len(rows) else 1.0
    chunk = chunk or max(1, CHUNK // len(W))
    losses: Tensor = _CrossEntropy.apply(flat, W, bias, wanted, weight, chunk, (product_dtype(hidden), scale, softcap))
    if reduction == "none":
        return losses.new_zeros(labels.numel()).index_copy(0, rows, losses).view(labels.shape)
    return losses.sum() if reduction == "sum" or len(rows) else losses.sum() / 0  # nan, as of an empty mean


def _logits(x: Tensor, W: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """The logits (rows, vocabulary) in fp32 at least, by single operations."""
    logits = F.linear(x, W, bias)
    logits = logits.to(_wide(logits.dtype))
    logits = logits if scale == 1 else logits * scale
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _Head:
    """Chunks of logits in one buffer."""

    def __init__(
        self, W: Tensor, bias: Tensor | None, dtype: torch.dtype, rows: int, scale: float, softcap: float | None
    ) -> None:
        self.W, self.bias, self.scale, self.softcap = W.to(dtype), bias, scale, softcap
        self.products = W.new_empty(rows, len(W), dtype=dtype)
        self.buffer = self.products if dtype == _wide(dtype) else W.new_empty(rows, len(W), dtype=_wide(dtype))

    def losses(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The losses of rows x (n, d), and their gradients (n, vocabulary) with regard to hidden·Wᵀ + bias.

        The gradients are in the buffer, until the next rows take it.
        """
        logits = self.buffer[: len(x)]
        products = torch.mm(x.to(self.W.dtype), self.W.t(), out=self.products[: len(x)])
        logits = products if products.dtype == logits.dtype else logits.copy_(products)
        if self.bias is not None:
            logits += self.bias
        logits = logits if self.scale == 1 else logits.mul_(self.scale)
        bent = None if self.softcap is None else logits.div_(self.softcap).tanh_().clone()
        logits = logits if self.softcap is None else logits.mul_(self.softcap)
        labels = labels[:, None]
        right = logits.gather(1, labels)
        top = logits.amax(1, keepdim=True)
        total = logits.sub_(top).exp_().sum(1, keepdim=True)
        slopes = logits.div_(total)
        slopes.scatter_add_(1, labels, slopes.new_full((len(x), 1), -1.0))
        if bent is not None:
            slopes.mul_(bent.square_().neg_().add_(1))
        slopes = slopes if self.scale == 1 else slopes.mul_(self.scale)
        return (total.log_() + top - right).squeeze(1), slopes

    def narrow(self, slopes: Tensor) -> Tensor:
        """The gradients in the number format of the products."""
        products = self.products[: len(slopes)]
        return slopes if products.dtype == slopes.dtype else products.copy_(slopes)


class _CrossEntropy(torch.autograd.Function):
    """(x, W, bias) to the losses of the rows of x, each times `weight`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, labels: Tensor, weight: float, chunk: int, rest: Any
    ) -> Tensor:
        frozen = not any(ctx.needs_input_grad[1:3])
        dx = torch.empty_like(x, dtype=rest[0]) if frozen and ctx.needs_input_grad[0] else None
        losses = x.new_empty(len(x), dtype=_wide(rest[0]))
        head = _Head(W, bias, rest[0], min(chunk, len(x)), *rest[1:])
        for part in _chunks(x, chunk):
            losses[part], slopes = head.losses(x[part], labels[part])
            if dx is not None:
                dx[part].addmm_(head.narrow(slopes), head.W, beta=0, alpha=weight)
        ctx.save_for_backward(*((dx,) if frozen else (x, W, bias, labels)))
        ctx.frozen, ctx.rest = frozen, (weight, chunk, rest)
        return losses.mul_(weight)

    @staticmethod
    def backward(ctx: Any, dlosses: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():
            raise RuntimeError("linear_cross_entropy has no second derivative: use the model's own loss for it.")
        with torch.autocast(dlosses.device.type, enabled=False):
            if ctx.frozen:
                (dx,) = ctx.saved_tensors
                return (dx * dlosses[:, None].to(dx.dtype), *(None,) * 6)
            return (*_trained(ctx, dlosses), *(None,) * 4)


def _trained(ctx: Any, dlosses: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, of a trained head and of its bias: the logits are formed again."""
    (x, W, bias, labels), (weight, chunk, rest), need = ctx.saved_tensors, ctx.rest, ctx.needs_input_grad
    head = _Head(W, bias, rest[0], min(chunk, len(x)), *rest[1:])
    dx = torch.empty_like(x, dtype=rest[0]) if need[0] else None
    dW = torch.zeros_like(W, dtype=_wide(rest[0])) if need[1] else None
    db = torch.zeros_like(bias, dtype=_wide(rest[0])) if need[2] else None
    for part in _chunks(x, chunk):
        slopes = head.losses(x[part], labels[part])[1].mul_(dlosses[part, None] * weight)
        if db is not None:
            db += slopes.sum(0)
        slopes = head.narrow(slopes)
        if dx is not None:
            torch.mm(slopes, head.W, out=dx[part])
        if dW is not None:
            dW += torch.mm(slopes.t(), x[part].to(slopes.dtype))
    return dx, dW, db


def _chunks(x: Tensor, chunk: int) -> list[slice]:
    return [slice(at, at + chunk) for at in range(0, len(x), chunk)]
