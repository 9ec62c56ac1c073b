"""Torch's own random numbers, for functions that take no generator."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Inside the block torch draws from this seed, on the CPU and on `device`.

    After it these two go on as before; an accelerator that is not CUDA's stays seeded. torch.manual_seed would seed
    every accelerator there is.
    """
    cuda = device.type == "cuda"
    with torch.random.fork_rng([device] if cuda else []):
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        elif device.type not in ("cpu", "meta"):
            torch.get_device_module(device).manual_seed(seed)
        yield
