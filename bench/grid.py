"""`bench/step.py --grid`: a LoRA step over the frozen one for many lengths, ranks, targets and dropouts.

On the first decoder layers of the model without its head, which no adapter touches: of the whole model's step these are
about three quarters, and what an adapter adds is less of it than is said here. Processor time. What is done is kept in
out/step-grid.json, and a run that was cut off goes on there.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from common import once
from report import table, write
from step import TARGETS, adapted, check_parity, floor, load
from torch import Tensor, nn

LAYERS = 4
TOKENS, RANKS, DROPOUTS = (128, 512, 1024, 2048), (8, 16, 64), (0.0, 0.05)
ARMS = ("floor", "PEFT", "trimtab")
KEPT = Path(__file__).resolve().parent.parent / "out" / "step-grid.json"


def hidden_step(model: nn.Module, ids: Tensor) -> None:
    """Forward and backward of the decoder layers."""
    causal: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = causal.model(input_ids=ids, use_cache=False).last_hidden_state
    hidden.backward(hidden.detach())


def measure(base: nn.Module, ids: Tensor, options: Any) -> dict[str, float]:
    """The median processor seconds of each arm's step."""
    check_parity(base, ids, options)
    models = {
        "floor": floor(base),
        "PEFT": adapted(base, options, "peft"),
        "trimtab": adapted(base, options, "trimtab"),
    }
    times: dict[str, list[float]] = {name: [] for name in ARMS}
    for block in range(options.blocks + 1):
        for name in ARMS if block % 2 else ARMS[::-1]:
            times[name].append(once(functools.partial(hidden_step, models[name], ids)))
            models[name].zero_grad(set_to_none=True)
    return {name: statistics.median(found[1:]) for name, found in times.items()}  # the first block warms up


def run(options: Any) -> None:
    """Every cell that is not known yet, then the table."""
    known: dict[str, dict[str, float]] = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    base: Any = None
    cells = list(itertools.product(TOKENS, RANKS, TARGETS, DROPOUTS))
    for i, (tokens, rank, targets, dropout) in enumerate(cells):
        key = f"{options.dtype} {tokens} {rank} {targets} {dropout:g}"
        if key in known:
            continue
        cell = SimpleNamespace(
            dtype=options.dtype, tokens=tokens, rank=rank, targets=targets, dropout=dropout, blocks=options.blocks
        )
        if base is None or cells[i - 1][0] != tokens:
            base, ids = load(cell)
            base.model.layers = base.model.layers[:LAYERS]
        known[key] = measure(base, ids, cell)
        KEPT.parent.mkdir(exist_ok=True)
        KEPT.write_text(json.dumps(known, indent=1))
        print(f"{i + 1} of {len(cells)}: {key}: {known[key]}", file=sys.stderr)
    report(options, known)


def report(options: Any, known: dict[str, dict[str, float]]) -> None:
    """The table, with the geometric mean and the worst cell of each column."""
    columns = [(dropout, arm) for dropout in DROPOUTS for arm in ("PEFT", "trimtab")]
    rows: list[list[Any]] = []
    for tokens, rank, targets in itertools.product(TOKENS, RANKS, TARGETS):
        times = {d: known[f"{options.dtype} {tokens} {rank} {targets} {d:g}"] for d in DROPOUTS}
        over = [times[d][arm] / times[d]["floor"] for d, arm in columns]
        rows.append([tokens, rank, targets, *over, *(times[d]["PEFT"] / times[d]["trimtab"] for d in DROPOUTS)])
    figures = list(zip(*(row[3:] for row in rows), strict=True))
    best_is_high = [False] * len(columns) + [True] * len(DROPOUTS)
    mean = [math.exp(statistics.mean(map(math.log, column))) for column in figures]
    worst = [min(c) if high else max(c) for c, high in zip(figures, best_is_high, strict=True)]
    rows += [["**geometric mean**", "", "", *mean], ["**worst cell**", "", "", *worst]]
    head = ["tokens", "r", "layers", *(f"{arm} over the floor, dropout {d:g}" for d, arm in columns)]
    head += [f"PEFT / trimtab, dropout {d:g}" for d in DROPOUTS]
    text = table(head, [[f"{c:.2f}" if isinstance(c, float) else c for c in row] for row in rows])
    note = (
        f"Processor time of the first {LAYERS} decoder layers, without the head, over the same frozen; medians of "
        f"{options.blocks} interleaved blocks. The head is a quarter of the whole model's step and has no adapter."
    )
    title = f"A LoRA step over the frozen one by length, rank, layers and dropout, SmolLM2-135M, {options.dtype}"
    if options.write:
        write(f"step-grid-{options.dtype}", title, f"{note}\n\n{text}")
    else:
        print(f"{title}\n\n{note}\n\n{text}")
