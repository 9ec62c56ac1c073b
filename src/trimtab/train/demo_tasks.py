"""`trimtab demo --tasks`: three adapters trained at once on one model, and one batch that all of them answer.

The tasks: addresses into JSON, definitions as the Devil's Dictionary has them, the sentiment of film reviews.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from trimtab.errors import DataError
from trimtab.train.assembly import assemble
from trimtab.train.config import TrainConfig
from trimtab.train.data import load_rows
from trimtab.train.demo import SETTINGS, speed
from trimtab.train.generate import answer
from trimtab.train.jobs import read_jobs, run_jobs
from trimtab.train.loop import TrainResult, train
from trimtab.train.model import Base, adapt, load_base, make_optimizer
from trimtab.train.preparation import prepare_data
from trimtab.train.processes import Alone
from trimtab.train.progress import clock
from trimtab.train.report import console_for
from trimtab.train.run import Outcome

ROWS, TEST_ROWS, GENERATED = 240, 100, 24  # of each task: to learn, to be tested on, to generate answers to
TRAIN_SECONDS = 240.0  # what training all of them may take before fewer rows are taken
MIN_ROWS = 24
SHARE = 0.2  # of the steps: so many are also done one task after the other, to be timed
BASE = "base"  # what answers call the model alone
NAMES = ("addresses", "devil", "sentiment")


def run(out: Path, base: str, data: Path | None, rows: int, epochs: float) -> int:
    """Run the demo; returns the exit code."""
    began = time.monotonic()
    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False, soft_wrap=False)
    tasks = task_folders(data)
    common = {k: v for k, v in SETTINGS.items() if k != "output"}
    common |= {"model": base, "num_train_epochs": epochs, "eval_steps": -1}
    folder = out / "data"
    settings = {name: _write(source, folder / name, rows or ROWS) for name, source in tasks.items()}
    configs = {name: TrainConfig(**common, **own) for name, own in settings.items()}
    loaded = load_base(next(iter(configs.values())))
    console.print(f"Base model: {base}. Tasks: {', '.join(tasks)}.")
    if not rows:
        count = affordable(loaded, configs, console)
        settings = {name: _write(source, folder / name, count) for name, source in tasks.items()}
    console.print("\nOne task after the other, a part of the steps, for their time")
    alone = {name: _alone(loaded, config) for name, config in configs.items()}
    rate = sum(r.tokens for r in alone.values()) / sum(r.seconds for r in alone.values())
    console.print(f"  {rate:,.0f} tokens/s")
    path = out / "jobs.yaml"
    content = {**common, "output": str(out), "jobs": settings}
    path.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
    console.print(f"\nAll at once: trimtab train --jobs {path}")
    del loaded
    outcomes = run_jobs(read_jobs(path, {"overwrite_output_dir": True}), console_for(quiet=True))
    if any(outcome.interrupted for outcome in outcomes.values()):
        console.print("Interrupted.")
        return 130
    _show(console, outcomes, rate)
    mixed_batch(console, outcomes, configs, tasks)
    console.print(f"Done in {clock(time.monotonic() - began)} (min:s). The adapters: {out}/NAME/adapter")
    return 1 if any(outcome.result.failed for outcome in outcomes.values()) else 0


def task_folders(data: Path | None) -> dict[str, Path]:
    """{task: its folder with train.jsonl and test.jsonl}: in `data`, in the source tree, or in what is installed."""
    here = Path(__file__).resolve().parent
    for folder in [data] if data else [here.parents[2] / "examples/data", here]:
        found = sorted(path.parent for path in folder.glob("*/train.jsonl") if (path.parent / "test.jsonl").is_file())
        if found:
            return {path.name: path for path in found if data or path.name in NAMES}
    raise DataError(
        "There are no tasks: name a folder with folders that hold train.jsonl and test.jsonl: --data FOLDER"
    )


def _write(source: Path, folder: Path, count: int) -> dict[str, Any]:
    """Put `count` rows of a task into a folder; the settings of the job that learns them."""
    learned, tested = (load_rows(source / f"{split}.jsonl") for split in ("train", "test"))
    parts = {"train": learned[:count], "test": tested[: min(TEST_ROWS, max(8, count))]}
    folder.mkdir(parents=True, exist_ok=True)
    for split, chosen in parts.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in chosen)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    job: dict[str, Any] = {"data": str(folder / "train.jsonl"), "eval_data": str(folder / "test.jsonl")}
    if str(learned[0].get("completion", "")).startswith("{"):  # an answer that is right or wrong
        job |= {"eval_generate": ["exact_match", "field_f1"], "eval_generate_rows": GENERATED}
    return job


def affordable(base: Base, configs: Mapping[str, TrainConfig], console: Console) -> int:
    """How many rows of each task this machine can train on in `TRAIN_SECONDS`."""
    first = next(iter(configs.values()))
    model = adapt(base, first, steps=1)
    examples = {name: prepare_data(config, base.tokenizer).examples for name, config in configs.items()}
    rate = speed(model, next(iter(examples.values())))
    base.model = model.unload()
    tokens = sum(len(e.ids) for part in examples.values() for e in part)
    seconds = first.num_train_epochs * tokens / rate
    count = ROWS if seconds <= TRAIN_SECONDS else max(MIN_ROWS, int(ROWS * TRAIN_SECONDS / seconds))
    console.print(
        f"This machine trains on {ROWS} rows of each in about {clock(seconds)} (min:s): {count} of each, then."
    )
    return count


def _alone(base: Base, config: TrainConfig) -> TrainResult:
    """The first steps of one task by itself."""
    run = assemble(config, base, prepare_data(config, base.tokenizer), Alone())
    steps = max(2, round(SHARE * len(run.batches)))
    del run.batches._steps[steps:]
    result = train(run.model, run.batches, make_optimizer(run.model, config), seed=config.seed)
    base.model = run.model.unload()
    return result


def _show(console: Console, outcomes: Mapping[str, Outcome], alone: float) -> None:
    """Scores before and after, and the time."""
    table = Table("task", "score", "before", "after")
    for name, outcome in outcomes.items():
        before, after = outcome.result.scores[0][1], outcome.result.scores[-1][1]
        for i, key in enumerate(before):
            form = "{:.3f}" if key == "loss" else "{:.0%}"
            said = "held-out loss" if key == "loss" else key.replace("_", " ")
            table.add_row(
                name if not i else "", said, form.format(before[key]), f"[bold]{form.format(after[key])}[/bold]"
            )
    console.print(table)
    tokens = sum(outcome.result.tokens for outcome in outcomes.values())
    seconds = sum(outcome.result.seconds for outcome in outcomes.values())
    console.print(
        f"{tokens:,} tokens in {clock(seconds)} (min:s) at once, {tokens / seconds:,.0f} tokens/s; one task after the "
        f"other they would take {clock(tokens / alone)}, at {alone:,.0f} tokens/s: {tokens / seconds / alone:.2f} x "
        "as fast at once.\n"
    )


def mixed_batch(
    console: Console, outcomes: Mapping[str, Outcome], configs: Mapping[str, TrainConfig], tasks: Mapping[str, Path]
) -> None:
    """A question of each task, answered by its adapter and by the base, all in one batch."""
    model = next(iter(outcomes.values())).model
    base_name = next(iter(configs.values())).model
    from transformers import AutoTokenizer

    from trimtab.files.sources import packaged_name, resolve_base

    tokenizer = AutoTokenizer.from_pretrained(resolve_base(packaged_name(base_name)))
    names = [name for name, outcome in outcomes.items() if outcome.adapter is not None]
    prompts = [str(load_rows(tasks[name] / "test.jsonl")[0]["prompt"]) for name in names]
    chosen, rows = [*names, BASE], len(names) * (len(names) + 1)
    began = time.monotonic()
    said = answer(model, tokenizer, prompts, chosen, max_new_tokens=96, batch_size=rows, system=SETTINGS["system"])
    console.print(
        f"One batch of {rows} rows, {len(names)} adapters and the base in it ({time.monotonic() - began:.1f} s):"
    )
    table = Table("prompt", "the base", "its adapter", show_lines=True)
    for i, (name, prompt) in enumerate(zip(names, prompts, strict=True)):
        own, base = said[i * len(chosen) + i], said[i * len(chosen) + len(names)]
        table.add_row(escape(prompt), escape(base.text[:240]), f"[bold]{name}[/bold]\n{escape(own.text[:400])}")
    console.print(table)
