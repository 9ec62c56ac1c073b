"""Products of half-precision activations with factors kept in fp32: exact to fp32, without an fp32 copy of the former.

Casting the factors to the activations' number format costs four more roundings (A, x·Aᵀ, s, B), which doubles the error
of a layer; casting the activations to fp32 costs twice their memory, kept until the backward pass. Here activations
are saved as they are, and widened a block of rows at a time, in the forward pass and again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

BLOCK = 1 << 22  # the elements widened at a time: 16 MB in fp32
HALF = (torch.float16, torch.bfloat16)


def project(x: Tensor, A: Tensor) -> Tensor:
    """x·Aᵀ (..., r) in A's number format: x (..., in) in half precision, A (r, in) in fp32."""
    return _Project.apply(x.reshape(-1, x.shape[-1]), A).view(*x.shape[:-1], A.shape[0])


def add_product(y: Tensor, h: Tensor, M: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    """scale·y + shift + h·Mᵀ, rounded once to y's number format: y (..., out) in half precision, the others in fp32."""
    flat = y.reshape(-1, y.shape[-1])
    return _AddProduct.apply(flat, h.reshape(-1, h.shape[-1]), M, scale, shift).view_as(y)


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor) -> Tensor:
        ctx.save_for_backward(x, A)
        return _joined(part.to(A.dtype) @ A.T for part in _blocks(x))

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, A = ctx.saved_tensors
        rows = _rows(x)
        dx = dA = None
        if ctx.needs_input_grad[0]:
            dx = _joined((part @ A).to(x.dtype) for part in dh.split(rows))
        if ctx.needs_input_grad[1]:
            dA = _total(d.T @ part.to(A.dtype) for d, part in zip(dh.split(rows), x.split(rows), strict=True))
        return dx, dA


class _AddProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, h: Tensor, M: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
        ctx.save_for_backward(None if scale is None else y, h, M, scale)
        ctx.shifted = shift is not None
        rows, parts = _rows(y), []
        for base, low in zip(y.split(rows), h.split(rows), strict=True):
            base = base.to(M.dtype)
            base = base if scale is None else base * scale
            base = base if shift is None else base + shift
            parts.append(torch.addmm(base, low, M.T).to(y.dtype))
        return _joined(parts)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        y, h, M, scale = ctx.saved_tensors
        wide, rows = M.dtype, _rows(dout)
        need_y, need_h, need_M, need_scale, need_shift = ctx.needs_input_grad
        blocks = dout.split(rows)
        dy = dout if scale is None else _joined((d.to(wide) * scale).to(dout.dtype) for d in blocks) if need_y else None
        dh = _joined(d.to(wide) @ M for d in blocks) if need_h else None
        dM = _total(d.to(wide).T @ p for d, p in zip(blocks, h.split(rows), strict=True)) if need_M else None
        dscale = dshift = None
        if need_scale:
            dscale = _total((d.to(wide) * p.to(wide)).sum(0) for d, p in zip(blocks, y.split(rows), strict=True))
        if need_shift:
            dshift = _total(d.to(wide).sum(0) for d in blocks)
        return dy, dh, dM, dscale, dshift


def _rows(x: Tensor) -> int:
    return max(1, BLOCK // max(1, x.shape[1]))


def _blocks(x: Tensor) -> tuple[Tensor, ...]:
    return x.split(_rows(x))


def _joined(parts: Iterable[Tensor]) -> Tensor:
    parts = list(parts)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _total(parts: Iterable[Tensor]) -> Tensor:
    first, *rest = parts
    for part in rest:
        first = first + part
    return first
