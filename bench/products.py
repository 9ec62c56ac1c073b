"""Dense fp32 products by oneDNN over torch's own: those of a frozen layer and of its low-rank update (r=16).

    python bench/products.py [--rows 8 32 128 1024] [--blocks 25] [--write]

Forward is x·Wᵀ, backward dy·W; down is x·Aᵀ, outer the gradient of B, dyᵀ·(x·Aᵀ). The two are taken in turns in one
process. What is shown is the ratio of medians of the clock; `trimtab.core.kernels.dense` decides by it where oneDNN is
asked. Each product is compared with torch's before it is timed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import interleaved, ratio
from report import table, write
from torch import Tensor

SHAPES = ((576, 576), (576, 192), (576, 1536), (1536, 576))
RANK = 16


def onednn(x: Tensor, W: Tensor) -> Tensor:
    """x·Wᵀ."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, W, None, "none", [], "")
    return y


def pairs(rows: int, inputs: int, outputs: int) -> dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]]:
    """Each product by torch and by oneDNN."""
    x, W, A = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(RANK, inputs)
    dy, u = torch.randn(rows, outputs), torch.randn(rows, RANK)
    return {
        "forward": (lambda: F.linear(x, W), lambda: onednn(x, W)),
        "backward": (lambda: dy @ W, lambda: onednn(dy, W.t())),
        "down": (lambda: F.linear(x, A), lambda: onednn(x, A)),
        "outer": (lambda: dy.t() @ u, lambda: onednn(u.t(), dy.t()).t()),
    }


def clock(run: Callable[[], Any], calls: int) -> Callable[[], float]:
    def timed() -> float:
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) / calls

    return timed


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 32, 128, 1024])
    parser.add_argument("--blocks", type=int, default=25)
    parser.add_argument("--write", action="store_true", help="write the table into docs/benchmarks.md")
    options = parser.parse_args()
    lines: list[list[object]] = []
    for rows in options.rows:
        for inputs, outputs in SHAPES:
            cells: list[object] = [rows, f"{inputs} to {outputs}"]
            for own, other in pairs(rows, inputs, outputs).values():
                torch.testing.assert_close(own(), other(), rtol=1e-4, atol=1e-3)
                arms = {"torch": clock(own, 3), "oneDNN": clock(other, 3)}
                interleaved(arms, 2)  # warm
                found = interleaved(arms, options.blocks)
                middle, low, high = ratio(found["oneDNN"], found["torch"])
                cells.append(f"{middle:.2f} [{low:.2f}, {high:.2f}]")
            lines.append(cells)
    text = table(["rows", "layer", "forward", "backward", "down, r=16", "outer, r=16"], lines)
    title = "Dense fp32 products: the time of oneDNN over that of torch's own"
    if options.write:
        write("products", title, text)
    else:
        print(f"{title}\n\n{text}")


if __name__ == "__main__":
    main()
