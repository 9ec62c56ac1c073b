"""The low-rank updates of a batch whose rows have different adapters: two batched products for all of them.

The factors of each row's adapters are stacked, several of one row side by side along the rank, and padded with zeros to
one rank: y[i] + x[i]·A[i]·B[i]. What is stacked is kept while it holds, so that a step of a generation only multiplies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.core.kernels.lowrank import SMALL
from trimtab.core.kernels.usual import autocasts, ordinary, recorded

Update = tuple[Tensor, Tensor, float]  # A (r, in), B (out, r), scale
Stamp = tuple[int, tuple[float, ...]]


@dataclass(frozen=True, eq=False)
class Bank:
    """The stacked factors of a batch.

    Attributes:
        source: what they were stacked from, by identity.
        parts: the tensors that were stacked.
        stamp: the parts' versions and the scales when they were.
    """

    source: Any
    parts: tuple[Tensor, ...]
    stamp: Stamp
    A: Tensor  # (rows, in, r)
    B: Tensor  # (rows, r, out)


def stacked(groups: Sequence[Sequence[Update]], owners: Tensor | None) -> tuple[Tensor, Tensor]:
    """A (rows, in, r) and B (rows, r, out), the scale included, of rows whose groups are `owners` (None: 0, 1 ...)."""
    first = next(update for group in groups for update in group)
    rank = max(sum(A.shape[0] for A, _, _ in group) for group in groups)
    none = first[0].new_zeros(rank, first[0].shape[1]), first[0].new_zeros(rank, first[1].shape[0])
    As, Bs = [], []
    for group in groups:
        if not group:
            As.append(none[0])
            Bs.append(none[1])
            continue
        A = torch.cat([A for A, _, _ in group]) if len(group) > 1 else group[0][0]
        B = torch.cat([s * B.t() for _, B, s in group]) if len(group) > 1 else group[0][2] * group[0][1].t()
        As.append(F.pad(A, (0, 0, 0, rank - len(A))))
        Bs.append(F.pad(B, (0, 0, 0, rank - len(B))))
    A, B = torch.stack(As).transpose(1, 2), torch.stack(Bs)
    if owners is not None:
        A, B = A.index_select(0, owners), B.index_select(0, owners)
    return A.contiguous(), B


def applies(y: Tensor, x: Tensor, rows: int, parts: Sequence[Tensor]) -> bool:
    """Whether `add_rows` can do it: ordinary tensors of one format, or a few rows in half precision."""
    dtype = parts[0].dtype
    if recorded() or autocasts(x) or not all(map(ordinary, (x, *parts))) or any(t.dtype != dtype for t in parts):
        return False
    fits = x.dtype == dtype or (dtype == torch.float32 and max(x.numel(), y.numel()) <= SMALL)
    return x.is_floating_point() and fits and len(x) % rows == 0


def add_rows(y: Tensor, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """y (..., out) with x·A·B added a row, where the first axis of x (..., in) is rows, or rows · anything."""
    flat, out = x.reshape(len(A), -1, x.shape[-1]), y.reshape(len(A), -1, y.shape[-1])
    if x.dtype == A.dtype:
        return torch.baddbmm(out, torch.bmm(flat, A), B).view_as(y)
    return torch.baddbmm(out.to(A.dtype), torch.bmm(flat.to(A.dtype), A), B).to(y.dtype).view_as(y)


def stamp_of(parts: Sequence[Tensor], scales: Sequence[float]) -> Stamp:
    """What changes when any of the parts or scales does."""
    return sum(t._version for t in parts), tuple(scales)
