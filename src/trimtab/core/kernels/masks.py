"""Dropout whose mask is a pure function of a seed, a row and a place in the row.

The same row meets the same mask alone, in another batch, packed, padded at its end, or computed again: the generator
is a hash of counters, without state. It draws only the places that are emptied, by geometric gaps (p of them, not all),
in blocks of a row's positions, and gives them as a list: nothing of the size of x is drawn or kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

BLOCK = 64  # positions of a row that share a stream of gaps
WORD = 0xFFFFFFFF


@dataclass(frozen=True)
class Rows:
    """Where the rows of a batch lie among its tokens (flattened), in blocks: made once a forward.

    Tokens of no row (padding) are not dropped.
    """

    keys: Tensor  # (blocks, 1) int32
    starts: Tensor  # (blocks, 1) int64, the block's first token
    lengths: Tensor  # (blocks, 1) int64, its tokens, at most BLOCK

    @classmethod
    def of(cls, rows: Sequence[tuple[int, int, int]], device: torch.device | str = "cpu") -> Rows:
        """From (key, first token, number of tokens) of each row; a key is any integer that names the row."""
        blocks = [
            (_key(key, at // BLOCK), start + at, min(BLOCK, length - at))
            for key, start, length in rows
            for at in range(0, length, BLOCK)
        ]
        keys, starts, lengths = torch.tensor(blocks, device=device, dtype=torch.int64).view(-1, 3, 1).unbind(1)
        return cls(keys.to(torch.int32), starts, lengths)

    @classmethod
    def batch(cls, rows: int, length: int, key: int = 0, device: torch.device | str = "cpu") -> Rows:
        """A plain batch of rows of one length, named by their places in it."""
        return cls.of([(_key(key, i), i * length, length) for i in range(rows)], device)


@dataclass(frozen=True)
class Dropout:
    """The dropout of one adapter at one site in one step.

    Args:
        p: how many places are emptied.
        seed: of adapter, site and step (`seed_of`).
        rows: where the rows lie.
    """

    p: float
    seed: int
    rows: Rows

    def dropped(self, width: int) -> Tensor:
        """The places (n,) int64 that are emptied in a flattened x (tokens · width)."""
        return dropped(self.seed, self.rows, width, self.p)

    def __call__(self, x: Tensor) -> Tensor:
        """The input (..., width) after dropout: places emptied, the rest scaled up."""
        keep = x.new_full((x.numel(),), 1 / (1 - self.p) if self.p < 1 else 0.0)
        return x * keep.index_fill_(0, self.dropped(x.shape[-1]), 0.0).view_as(x)


def seed_of(*parts: int) -> int:
    """One seed of several numbers (an adapter's, a site's, a step's)."""
    seed = 0
    for part in parts:
        seed = _key(seed, part)
    return seed


def dropped(seed: int, rows: Rows, width: int, p: float) -> Tensor:
    """The places (n,) int64, some twice, that dropout empties in a flattened x (tokens · width)."""
    block = BLOCK * width
    if p >= 1 or p <= 0:
        return _all(rows, width)[: None if p >= 1 else 0]
    draws = int(block * p + 8 * math.sqrt(block * p * (1 - p)) + 8)  # enough but for one block in 10^14
    words = _mixed(_counters(draws, rows.keys.device) ^ _mixed(rows.keys ^ _signed(seed & WORD)))
    uniform = words.bitwise_and_(0xFFFFFF).add_(1).to(torch.float32).mul_(2.0**-24)  # in (0, 1]
    gaps = uniform.log_().mul_(1 / math.log1p(-p)).to(torch.int32).add_(1)
    within = gaps.cumsum(1, dtype=torch.int32).sub_(1)
    places, limits = within + rows.starts * width, rows.lengths * width
    inside = within < limits
    if not len(places) or not inside[0, 0]:
        return places[inside]
    return torch.where(inside, places, places[0, 0]).flatten()  # a list of one size, without looking


def _all(rows: Rows, width: int) -> Tensor:
    block = torch.arange(BLOCK * width, device=rows.keys.device)
    return (block + rows.starts * width)[block < rows.lengths * width]


@lru_cache(maxsize=32)
def _counters(n: int, device: torch.device) -> Tensor:
    return _mixed(torch.arange(1, n + 1, dtype=torch.int32, device=device))


def _mixed(words: Tensor) -> Tensor:
    """A bijection of 32-bit words in which each bit of a word moves each other (a multiply-xorshift hash), in place."""
    words.bitwise_xor_((words >> 16).bitwise_and_(0xFFFF)).mul_(0x7FEB352D)
    words.bitwise_xor_((words >> 15).bitwise_and_(0x1FFFF)).mul_(_signed(0x846CA68B))
    return words.bitwise_xor_((words >> 16).bitwise_and_(0xFFFF))


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word


def _key(a: int, b: int) -> int:
    """A 63-bit hash of two integers."""
    word = (a * 0x9E3779B97F4A7C15 + b + 0x632BE59BD9B4E019) & (2**64 - 1)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        word = ((word ^ (word >> shift)) * factor) & (2**64 - 1)
    return (word ^ (word >> 31)) >> 1
