"""The low-rank updates of a batch whose rows have different adapters: two batched products for all of them.

The factors of each row's adapters are stacked, several of one row side by side along the rank, and padded with zeros to
one rank: y[i] + x[i]·A[i]·B[i]. What is stacked is kept while it holds, so that a step of a generation only multiplies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.core.kernels.lowrank import SMALL
from trimtab.core.kernels.usual import autocasts, ordinary, recorded

Update = tuple[Tensor, Tensor, float]  # A (r, in), B (out, r), scale


@dataclass(frozen=True, eq=False)
class Bank:
    """The stacked factors of a batch.

    Attributes:
        source: what they were stacked from, by identity.
        parts: the tensors that were stacked.
        stamp: what says that the parts and scales are still those.
        gate: what the base's output is scaled by first, where it is.
        shift: what is added to it then.
    """

    source: Any
    parts: tuple[Tensor, ...]
    stamp: Any
    A: Tensor  # (rows, in, r)
    B: Tensor  # (rows, r, out)
    gate: Tensor | None = None  # (rows, out)
    shift: Tensor | None = None  # (rows, out)


def stacked(groups: Sequence[Sequence[Update]], owners: Sequence[int]) -> tuple[Tensor, Tensor]:
    """A (rows, in, r) and B (rows, r, out), the scale included, of rows whose groups are `owners`."""
    if torch.is_grad_enabled():
        factors = layered(groups, owners)
        return factors[0].mT.contiguous(), factors[1].mT * factors[2]
    first = next(update for group in groups for update in group)
    rank = max(sum(len(A) for A, _, _ in group) for group in groups)
    scale = _scales(groups, rank, first[1])[:, :, None]  # (groups, r, 1)
    full = all(sum(len(A) for A, _, _ in group) == rank for group in groups)  # else what is not filled must be zero
    empty = torch.empty if full else torch.zeros
    A = empty(len(owners), first[0].shape[1], rank, dtype=first[0].dtype, device=first[0].device)
    B = empty(len(owners), rank, first[1].shape[0], dtype=first[1].dtype, device=first[1].device)
    into, values = [], []
    for row, group in enumerate(owners):
        at = 0
        for one_A, one_B, _ in groups[group]:
            end = at + len(one_A)
            into += [A[row, :, at:end], B[row, at:end]]
            values += [one_A.t(), one_B.t()]
            at = end
    torch._foreach_copy_(into, values)  # one call: a generation begins with it at every layer
    return A, B.mul_(scale[torch.tensor(owners, device=B.device)])


def layered(groups: Sequence[Sequence[Update]], owners: Sequence[int]) -> tuple[Tensor, Tensor, float]:
    """A (rows, r, in), B (rows, out, r) and a scale, by operations with a gradient; a B's own scale is in it."""
    first = next(update for group in groups for update in group)
    rank = max(sum(len(A) for A, _, _ in group) for group in groups)
    A = torch.stack([_beside([A for A, _, _ in group], rank, first[0], 0) for group in groups])
    B = torch.stack([_beside([B for _, B, _ in group], rank, first[1], 1) for group in groups])
    scales = {s for group in groups for _, _, s in group}
    if len(scales) > 1:
        B = B * _scales(groups, rank, first[1])[:, None]
    if list(owners) != list(range(len(groups))):
        places = torch.tensor(owners, device=A.device)
        A, B = A.index_select(0, places), B.index_select(0, places)
    return A, B, scales.pop() if len(scales) == 1 else 1.0


def _scales(groups: Sequence[Sequence[Update]], rank: int, like: Tensor) -> Tensor:  # (groups, r)
    """The scale of each direction, zero for what fills up the rank."""
    own = [[s for A, _, s in group for _ in range(len(A))] for group in groups]
    return like.new_tensor([found + [0.0] * (rank - len(found)) for found in own])


def _beside(parts: Sequence[Tensor], rank: int, like: Tensor, axis: int) -> Tensor:
    """Factors side by side along their rank's axis, filled up with zeros to `rank`."""
    shape = list(like.shape)
    shape[axis] = rank - sum(part.shape[axis] for part in parts)
    parts = [*parts, like.new_zeros(shape)] if shape[axis] else parts
    return torch.cat(list(parts), axis) if len(parts) > 1 else parts[0]


def applies(y: Tensor, x: Tensor, rows: int, parts: Sequence[Tensor]) -> bool:
    """Whether `add_rows` can do it: ordinary tensors of one format, or a few rows in half precision."""
    dtype = parts[0].dtype
    if recorded() or autocasts(x) or not all(map(ordinary, (x, *parts))):
        return False
    if any(t.dtype != dtype or t.is_inference() for t in parts):  # of the latter changes cannot be seen
        return False
    fits = x.dtype == dtype or (dtype == torch.float32 and max(x.numel(), y.numel()) <= SMALL)
    return x.is_floating_point() and fits and len(x) % rows == 0


def add_rows(y: Tensor, x: Tensor, bank: Bank) -> Tensor:
    """y (..., out), gated and shifted, with x·A·B added a row; the first axis of x (..., in) is rows, or rows · n."""
    A, B = bank.A, bank.B
    flat, out = x.reshape(len(A), -1, x.shape[-1]), y.reshape(len(A), -1, y.shape[-1])
    if bank.gate is not None:
        out = out * bank.gate[:, None]
        out = out if bank.shift is None else out + bank.shift[:, None]
    added = torch.baddbmm(out.to(A.dtype), torch.bmm(flat.to(A.dtype), A), B)
    return added.to(y.dtype).view_as(y)


def stamp_of(parts: Sequence[Tensor], scales: Sequence[float]) -> Any:
    """What changes when any of the parts or scales does."""
    return [(id(t), t.data_ptr(), t._version) for t in parts], scales
