"""What one adapted layer adds to a forward: LoRA on a Linear, one row and more, against PEFT and the bare layer.

    python bench/layer_forward.py [--sizes 64 576] [--rows 1 32 1024] [--blocks 15] [--write]

No gradient, one thread; the arms run in turns (ABBA), and each figure is the median of its blocks. A second bare layer
shows the noise. Without the `peft` package its columns stay empty.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from common import interleaved, median_ms
from report import table, write
from torch import Tensor, nn

warnings.filterwarnings("ignore")
LIMIT = 0.55  # of PEFT's time, at 64 x 64 and one row


class Net(nn.Module):
    """One Linear of `size` x `size`."""

    def __init__(self, size: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def adapted(library: str, size: int) -> nn.Module:
    """The layer with a LoRA on it that changes the output."""
    module: Any = importlib.import_module(library)
    torch.manual_seed(1)
    config = module.LoraConfig(r=8, target_modules=["layer"], init_lora_weights=False)
    model = module.get_peft_model(Net(size), config).eval()
    layer: nn.Module = model.base_model.model.layer
    return layer


def runner(layer: nn.Module, x: Tensor, calls: int) -> Callable[[], float]:
    def run() -> float:
        start = time.process_time()
        for _ in range(calls):
            layer(x)
        return (time.process_time() - start) / calls

    return run


@torch.no_grad()
def measure(size: int, rows: int, blocks: int) -> dict[str, float]:
    """Microseconds of one call of each arm."""
    x = torch.randn(rows, size)
    layers = {"bare": Net(size).eval().layer, "trimtab": adapted("trimtab", size)}
    if importlib.util.find_spec("peft"):
        layers["peft"] = adapted("peft", size)
        torch.testing.assert_close(layers["trimtab"](x), layers["peft"](x), rtol=1e-4, atol=1e-4)
    layers["bare again"] = Net(size).eval().layer
    calls = max(20, min(500, 20_000_000 // (size * size * rows + 40_000)))
    arms = {name: runner(layer, x, calls) for name, layer in layers.items()}
    interleaved(arms, 2)  # warm
    return {name: 1000 * median_ms(found) for name, found in interleaved(arms, blocks).items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 576])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32, 1024])
    parser.add_argument("--blocks", type=int, default=15)
    parser.add_argument("--write", action="store_true", help="write the table into docs/benchmarks.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines: list[list[object]] = []
    worst = 0.0
    for size in options.sizes:
        for rows in options.rows:
            found = measure(size, rows, options.blocks)
            ratio = found["trimtab"] / found["peft"] if "peft" in found else float("nan")
            worst = max(worst, ratio) if (size, rows) == (64, 1) else worst
            peft = f"{found['peft']:.1f}" if "peft" in found else ""
            noise = found["bare again"] / found["bare"]
            ours = found["trimtab"]
            lines.append(
                [f"{size} x {size}", rows, f"{found['bare']:.1f}", f"{ours:.1f}", peft, f"{ratio:.2f}", f"{noise:.2f}"]
            )
    head = ["layer", "rows", "bare Linear, µs", "trimtab, µs", "PEFT, µs", "trimtab / PEFT", "bare / bare (noise)"]
    text = table(head, lines)
    title = "The forward of one layer with a LoRA of r=8, fp32, no gradient"
    if options.write:
        write("layer_forward", title, text)
    else:
        print(f"{title}\n\n{text}")
    if worst > LIMIT:
        print(f"\nFAILED: at 64 x 64 and one row {worst:.2f} of PEFT's time, more than {LIMIT}")
    return 1 if worst > LIMIT else 0


if __name__ == "__main__":
    raise SystemExit(main())
