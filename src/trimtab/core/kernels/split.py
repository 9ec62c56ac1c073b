"""Products of bfloat16 activations with factors kept in fp32, as bfloat16 products.

Where a processor multiplies bfloat16 two or three times faster than fp32, fp32 products of the factors take back what
the base gained; factors cast to bfloat16 cost the result up to twice its error. But an fp32 number is two bfloat16
numbers and a rest of 2^-17, M = hi + lo, and what a product lost by rounding is had by asking for it once more,
x·M - (x·M). Only lo times lo is dropped.
"""

from __future__ import annotations

import torch
from torch import Tensor


def split(M: Tensor, dim: int) -> Tensor:
    """A factor (..., r, in) or (..., out, r) in fp32 as bfloat16 [hi, lo, hi] along the axis `dim` of its rank."""
    hi = M.bfloat16()
    return torch.cat([hi, (M - hi).bfloat16(), hi], dim)


def split_product(x: Tensor, M: Tensor) -> tuple[Tensor, Tensor]:
    """x·M (..., T, r) as bfloat16 (hi, lo): x (..., T, k) in bfloat16, M (..., k, 3r) a factor as `split` gives it."""
    r = M.shape[-1] // 3
    mm, addmm = (torch.mm, torch.addmm) if x.ndim == 2 else (torch.bmm, torch.baddbmm)
    both = mm(x, M[..., : 2 * r])  # x·hi and x·lo, reading x once
    hi = both[..., :r]
    return hi, addmm(hi, x, M[..., :r], beta=-1).add_(both[..., r:])


def joined(hi: Tensor, lo: Tensor) -> Tensor:
    """[hi, hi, lo] (..., T, 3r): what to multiply with a factor as `split` gives it, for the exact product."""
    return torch.cat([hi, hi, lo], -1)
