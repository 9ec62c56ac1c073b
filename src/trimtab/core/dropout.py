"""Dropout whose mask is a pure function of a key, a row and a place in the row.

A row meets the same mask alone, in another batch, packed, padded at its end, or computed again: the generator is a
hash of counters, without state. It draws only the places that are emptied, by geometric gaps (p of them, not all), in
blocks of a row's positions, and gives them as a list: nothing of the size of x is drawn or kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

BLOCK = 64  # positions of a row that share a stream of gaps
WORD = 0xFFFFFFFF
MASK = (1 << 63) - 1


def mixed(seed: int, salt: int) -> int:
    """One number of two (the finaliser of splitmix64), so that neighbouring seeds have nothing in common."""
    z = (seed * 0x9E3779B97F4A7C15 + salt * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) & ((1 << 64) - 1)
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & ((1 << 64) - 1)
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & ((1 << 64) - 1)
    return (z ^ (z >> 31)) & MASK


@dataclass(frozen=True)
class Rows:
    """Where the rows of a batch lie among its vectors (flattened), in blocks.

    Vectors of no row (padding) are not dropped.
    """

    keys: Tensor  # (blocks, 1) int32
    starts: Tensor  # (blocks, 1) int64, the block's first vector
    lengths: Tensor  # (blocks, 1) int64, its vectors, at most BLOCK
    longest: int  # of the lengths

    @classmethod
    def of(cls, rows: Sequence[tuple[int, int, int]], device: torch.device | str = "cpu") -> Rows:
        """From (key, first vector, number of vectors) of each row; a key is any integer that names the row."""
        blocks = [
            (_word(mixed(key, at // BLOCK)), start + at, min(BLOCK, length - at))
            for key, start, length in rows
            for at in range(0, length, BLOCK)
        ]
        keys, starts, lengths = torch.tensor(blocks, device=device, dtype=torch.int64).view(-1, 3, 1).unbind(1)
        return cls(keys.to(torch.int32), starts, lengths, max((n for *_, n in blocks), default=0))


def rows_of(x: Tensor, keys: Sequence[int] | None = None, lengths: Sequence[int] | None = None) -> Rows:
    """The rows of an `x` (rows, ..., d), or with `lengths` of an (..., d) that holds them one after another.

    Args:
        keys: a number for each row; 0, 1, 2 ... by default.
        lengths: how many vectors each row has.
    """
    vectors = math.prod(x.shape[:-1])
    if lengths is not None and sum(lengths) != vectors:
        raise ValueError(f"The rows have {sum(lengths)} vectors, but the input has {vectors}.")
    count = x.shape[0] if x.ndim > 1 else 1
    each = vectors // count if count else 0
    return _rows(count, each, None if keys is None else tuple(keys), lengths and tuple(lengths), x.device)


@lru_cache(maxsize=16)  # all layers of a forward ask for the same
def _rows(
    count: int, each: int, keys: tuple[int, ...] | None, lengths: tuple[int, ...] | None, device: torch.device
) -> Rows:
    lengths = (each,) * count if lengths is None else lengths
    names = range(len(lengths)) if keys is None else keys
    starts = [end - n for end, n in zip(accumulate(lengths), lengths, strict=True)]
    return Rows.of(list(zip(names, starts, lengths, strict=True)), device)


class Places:
    """What drops entries of an input.

    Attributes:
        p: how many places are emptied.
        gain: what the others are scaled up by.
    """

    p: float
    gain: float

    def dropped(self, width: int) -> Tensor:
        """The places (n,) int64, some twice, that are emptied in a flattened x (vectors · width)."""
        raise NotImplementedError

    def kept(self, x: Tensor) -> Tensor:
        """Which entries of `x` are kept, as bools of its shape."""
        return ~self._emptied(x)

    def _emptied(self, x: Tensor) -> Tensor:
        places = self.dropped(x.shape[-1])
        return x.new_zeros(x.numel(), dtype=torch.bool).index_fill_(0, places, True).view(x.shape)

    def __call__(self, x: Tensor) -> Tensor:
        """`x` (..., width) after dropout: places emptied, the rest scaled up."""
        x = x.masked_fill(self._emptied(x), 0)
        return x / (1 - self.p) if self.gain not in (0, 1) else x


@dataclass(frozen=True)
class Dropout(Places):
    """The dropout of one adapter at one site in one forward.

    Args:
        p: how many places are emptied.
        key: of adapter, site and forward.
        rows: where the rows lie.
    """

    p: float
    key: int
    rows: Rows

    @property
    def gain(self) -> float:  # type: ignore[override]
        """1 / (1 - p), or 0 where nothing is left."""
        return 1 / (1 - self.p) if self.p < 1 else 0.0

    def dropped(self, width: int) -> Tensor:
        """The places (n,) int64, some twice, that are emptied in a flattened x (vectors · width)."""
        return dropped(self.key, self.rows, width, self.p)


@dataclass(frozen=True)
class Several(Places):
    """The dropouts of the parts of a batch that lie one after another; each part scales up for itself.

    Args:
        parts: (its dropout or None, how many vectors it has) of each part.
    """

    parts: tuple[tuple[Dropout | None, int], ...]
    gain = 1.0

    @property
    def p(self) -> float:  # type: ignore[override]
        """The greatest of the parts'."""
        return max((drop.p for drop, _ in self.parts if drop is not None), default=0.0)

    def dropped(self, width: int) -> Tensor:
        """The places (n,) int64, some twice, that are emptied in a flattened x (vectors · width)."""
        found, start = [], 0
        for drop, vectors in self.parts:
            if drop is not None:
                found.append(drop.dropped(width) + start * width)
            start += vectors
        return torch.cat(found)


def dropped(key: int, rows: Rows, width: int, p: float) -> Tensor:
    """The places (n,) int64, some twice, that dropout empties in a flattened x (vectors · width)."""
    if p >= 1 or p <= 0:
        return _all(rows, width)[: None if p >= 1 else 0]
    n = rows.longest * width
    draws = int(n * p + 8 * math.sqrt(n * p * (1 - p)) + 8)  # enough but for one block in 10^14
    words = _mixed(_counters(draws, rows.keys.device) ^ _mixed(rows.keys ^ _word(key)))
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


def _word(key: int) -> int:
    """A number as a signed word of 32 bits, all its bits in it."""
    return _signed((key ^ (key >> 32)) & WORD)


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word
