"""Memory for many new weights at once, in large pages.

A merge makes as many numbers as the base has. To take memory for them from the system in pages of 4 KB can take twice
as long as to compute them.
"""

from __future__ import annotations

import contextlib
import functools
import math
import mmap
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

PIECE, LEAST = 64 << 20, 128 << 10  # bytes: taken at a time; of a weight that is put there
SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")


class Room:
    """Memory on the CPU for weights of one number format; each piece goes when the last weight in it does."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.piece: mmap.mmap | None = None
        self.used = 0

    def take(self, shape: Sequence[int]) -> Tensor:
        """A new tensor, its values undefined."""
        count = math.prod(shape)
        size = -(-count * self.dtype.itemsize // 64) * 64
        if self.piece is None or self.used + size > len(self.piece):
            private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # a process that is forked off writes into its own
            self.piece, self.used = mmap.mmap(-1, max(PIECE, size), flags=private), 0
            self.piece.madvise(mmap.MADV_HUGEPAGE)
        tensor = torch.frombuffer(self.piece, dtype=self.dtype, count=count, offset=self.used).view(*shape)
        self.used += size
        return tensor


_open: dict[int, Room] = {}  # by thread


@functools.cache
def _large_pages() -> bool:
    """Whether the system gives large pages to those who ask."""
    return hasattr(mmap, "MADV_HUGEPAGE") and SWITCH.exists() and "[never]" not in SWITCH.read_text()


@contextlib.contextmanager
def opened(dtype: torch.dtype) -> Iterator[None]:
    """Inside the block, this thread's new weights of a format have room."""
    thread = threading.get_ident()
    if not _large_pages() or thread in _open:
        yield
        return
    _open[thread] = Room(dtype)
    try:
        yield
    finally:
        del _open[thread]


def spare(like: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Memory for a new weight of a shape and format, or None where torch is to take its own."""
    if not _open or (room := _open.get(threading.get_ident())) is None:
        return None
    fits = dtype == room.dtype and like.device.type == "cpu" and like.numel() * dtype.itemsize >= LEAST
    return room.take(like.shape) if fits and type(like) in (Tensor, torch.nn.Parameter) else None
