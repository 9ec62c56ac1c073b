"""Products of bfloat16 activations with factors kept in fp32, as bfloat16 products.

Where a processor multiplies bfloat16 two or three times faster than fp32, fp32 products of the factors take back what
the base gained; factors cast to bfloat16 cost the result up to twice its error. But an fp32 number is two bfloat16
numbers and a rest of 2^-17, M = hi + lo. Only lo times lo is dropped.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 1 << 21  # the elements widened at a time: 8 MB in fp32


def split(M: Tensor, dim: int) -> Tensor:
    """A factor in fp32 as bfloat16 [hi, lo, hi] along the axis `dim` of its rank."""
    hi = M.bfloat16()
    return torch.cat([hi, (M - hi).bfloat16(), hi], dim)


def product(x: Tensor, M: Tensor) -> tuple[Tensor, Tensor]:
    """x·M (T, r) as bfloat16 (hi, lo): x (T, k) in bfloat16, M (k, r) a factor in fp32.

    Of so few columns it is quicker in fp32, a block of rows at a time, than as the three bfloat16 products it takes.
    """
    rows = max(1, BLOCK // max(1, x.shape[1]))
    blocks = [torch.mm(part.float(), M) for part in x.split(rows)]
    whole = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
    hi = whole.bfloat16()
    return hi, whole.sub_(hi).bfloat16()


def joined(hi: Tensor, lo: Tensor) -> Tensor:
    """[hi, hi, lo] (T, 3r): what to multiply with a factor (3r, n) as `split` gives it, for the exact product."""
    return torch.cat([hi, hi, lo], 1)
