"""Generation with one adapter that is not merged: tokens a second over the base's, ours and PEFT's.

    python bench/decode.py [--dtype float32] [--batch 1 32] [--new 24] [--write]

SmolLM2-135M, r=16 on all linear layers, prompts of 32 tokens, greedy. All arms run in one process on one copy of the
base's weights, interleaved (ABBA); the second base says what the machine's noise makes of equal arms. The tokens of
trimtab and PEFT, with equal adapters, are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import warnings
from types import SimpleNamespace
from typing import Any

import torch
from common import clocks, ratio
from step import adapted, load
from torch import Tensor, nn

warnings.filterwarnings("ignore")


@torch.no_grad()
def generate(model: nn.Module, ids: Tensor, new: int) -> Tensor:
    found: Tensor = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
    )
    return found[:, ids.shape[1] :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 32])
    parser.add_argument("--new", type=int, default=24)
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--write", action="store_true", help="write the table into docs/benchmarks.md")
    options = parser.parse_args()
    base, _ = load(SimpleNamespace(dtype=options.dtype, tokens=256))
    shape = SimpleNamespace(rank=16, dropout=0.0, targets="all")
    libraries = [name for name in ("peft", "trimtab") if importlib.util.find_spec(name)]
    models: dict[str, Any] = {"base": base.eval()}
    models |= {name: adapted(base, shape, name).eval() for name in libraries}
    models["base again"] = models["base"]
    for name in libraries:
        for key, parameter in models[name].named_parameters():
            if "lora_" in key:
                parameter.data.normal_(std=0.02, generator=torch.Generator().manual_seed(len(key)))
    rows: list[list[object]] = []
    for batch in options.batch:
        ids = torch.randint(0, 49000, (batch, 32), generator=torch.Generator().manual_seed(0))
        outs = [generate(models[name], ids[:4], options.new) for name in libraries]
        agree = min(float((out == outs[0]).float().mean()) for out in outs)
        if agree < (1 if options.dtype == "float32" else 0.5):  # in bfloat16 near ties fall either way
            raise SystemExit(f"Only {agree:.0%} of the tokens are PEFT's.")
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
        for block in range(options.blocks + 1):
            for name in models if block % 2 else list(models)[::-1]:
                times[name].append(clocks(functools.partial(generate, models[name], ids, options.new)))
        for name, found in times.items():
            cells: list[object] = [batch, name]
            for clock in (0, 1):
                own, bare = ([t[clock] for t in arm[1:]] for arm in (found, times["base"]))
                middle, low, high = ratio(bare, own)
                speed = batch * options.new / sorted(own)[len(own) // 2]
                cells += [f"{speed:.1f}", f"{middle:.2f} [{low:.2f}, {high:.2f}]"]
            rows.append(cells)
    from report import table, write

    head = ["rows", "", "tokens/s", "of the base's", "tokens per processor second", "of the base's"]
    title = f"Generation with one adapter that is not merged, SmolLM2-135M, {options.dtype}, r=16 on all linear layers"
    if options.write:
        write(f"decode-{options.dtype}", title, table(head, rows))
    else:
        print(f"{title}\n\n{table(head, rows)}")


if __name__ == "__main__":
    main()
