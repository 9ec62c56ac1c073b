"""What the frozen model is computed in: fp32 or bf16, whichever this machine multiplies faster. Adapters stay in fp32.

Processors differ: with AVX512-BF16 or AMX bf16 products are 2 to 3 times as fast as fp32 ones, without them up to 4
times as slow. So it is measured where the run is, in a tenth of a second.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

__all__ = ["Precision", "choose", "speed_of_bf16"]

GAIN = 1.2  # by how much bf16 has to be faster: it is the less exact one
ROWS, WIDTH = 512, 1024  # of the products that are timed


@dataclass(frozen=True)
class Precision:
    """A number format, and why it was taken."""

    name: str  # "fp32" or "bf16"
    why: str

    @property
    def dtype(self) -> torch.dtype:
        """The same for torch."""
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[self.name]


def choose(wanted: str, device: torch.device) -> Precision:
    """The precision that was asked for ("fp32", "bf16"), or for "auto" the one that is faster on this device."""
    if wanted != "auto":
        return Precision(wanted, "as asked for")
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported():
            return Precision("bf16", "this GPU computes in it")
        return Precision("fp32", "this GPU does not compute in bf16")
    if device.type != "cpu":
        return Precision("fp32", f"bf16 is not relied on with {device.type}")
    gain = speed_of_bf16()
    says = f"bf16 products are {gain:.1f} x as fast as fp32 here" if gain >= 1 else (
        f"bf16 products are {1 / gain:.1f} x as slow as fp32 here"
    )  # fmt: skip
    return Precision("bf16" if gain >= GAIN else "fp32", f"measured: {says}")


def speed_of_bf16(repeat: int = 10) -> float:
    """How many times as fast as fp32 this processor multiplies bf16 matrices.

    By processor time where that is fine enough: what else the machine does then counts for little.
    """
    fine = time.get_clock_info("process_time").resolution < 1e-4
    clock = time.process_time if fine else time.perf_counter
    pairs = {}
    for dtype in (torch.float32, torch.bfloat16):
        pairs[dtype] = torch.ones(ROWS, WIDTH, dtype=dtype), torch.ones(WIDTH, WIDTH, dtype=dtype)
        pairs[dtype][0] @ pairs[dtype][1].T  # the first product sets things up
    seconds = dict.fromkeys(pairs, float("inf"))
    for _ in range(repeat):  # in turns, and the best of each
        for dtype, (x, W) in pairs.items():
            began = clock()
            x @ W.T
            seconds[dtype] = min(seconds[dtype], clock() - began)
    return seconds[torch.float32] / seconds[torch.bfloat16]
