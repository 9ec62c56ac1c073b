"""Random masks that a row keeps whatever stands beside it: drawn from its own key, alone, packed, mixed, recomputed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MASK = (1 << 63) - 1


def mixed(seed: int, salt: int) -> int:
    """One number of two (the finaliser of splitmix64), so that neighbouring seeds have nothing in common."""
    z = (seed * 0x9E3779B97F4A7C15 + salt * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) & ((1 << 64) - 1)
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & ((1 << 64) - 1)
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & ((1 << 64) - 1)
    return (z ^ (z >> 31)) & MASK


def keep_mask(
    key: int, x: Tensor, p: float, keys: Sequence[int] | None = None, lengths: Sequence[int] | None = None
) -> Tensor:
    """Which entries of `x` are kept with probability 1 - p, as bools of its shape.

    Args:
        key: of the layer and the adapter.
        x: (rows, ..., d), or with `lengths` (..., d) whose leading axes flattened hold the rows one after another.
        keys: a number for each row; 0, 1, 2 ... by default.
        lengths: how many vectors each row has.
    """
    if lengths is None and x.ndim < 3:
        return _vectors(key, x, p, keys)
    parts = x.flatten(0, -2).split(list(lengths)) if lengths is not None else x.unbind(0)
    names = range(len(parts)) if keys is None else keys
    mask = torch.empty(x.shape, dtype=torch.bool, device=x.device)
    into = mask.flatten(0, -2).split(list(lengths)) if lengths is not None else mask.unbind(0)
    generator = torch.Generator(x.device)
    for name, row in zip(names, into, strict=True):
        row.bernoulli_(1 - p, generator=generator.manual_seed(mixed(key, name)))
    return mask


def _vectors(key: int, x: Tensor, p: float, keys: Sequence[int] | None) -> Tensor:
    """Rows that are single vectors: many of them, so that the numbers are hashed instead of drawn."""
    rows, d = (x.shape[0], x.shape[1]) if x.ndim == 2 else (1, x.numel())
    names = torch.arange(rows, device=x.device) if keys is None else torch.tensor(list(keys), device=x.device)
    low, high = key & 0x7FFFFFFF, key >> 31
    h = (names[:, None] * 0x9E3779B1 + low) ^ (torch.arange(d, device=x.device) * 0x85EBCA6B + (high & 0x7FFFFFFF))
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):  # each step is one to one on 32 bits
        h = ((h ^ (h >> shift)) * factor) & 0xFFFFFFFF
    h = h ^ (h >> 16)
    return (h >= int(p * (1 << 32))).view(x.shape)
