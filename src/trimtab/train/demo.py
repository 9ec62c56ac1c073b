"""`trimtab demo`: a LoRA on a real model and real data, from nothing to a saved adapter that a fresh process loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

from trimtab.core.extras import need
from trimtab.files.sources import resolve_base
from trimtab.train.config import TrainConfig
from trimtab.train.data import DataError, Example, load_rows
from trimtab.train.evaluate import evaluate_loss
from trimtab.train.generate import complete, exact_match, generate_ids, references
from trimtab.train.loop import TrainResult, loss_of
from trimtab.train.model import Base, adapt, load_base
from trimtab.train.preparation import Data, encode_data
from trimtab.train.progress import clock
from trimtab.train.report import console_for
from trimtab.train.rows import Rows
from trimtab.train.run import run_training

ROWS = 400  # what the figures in the README are for
TRAIN_SECONDS = 480.0  # what training may take before the demo takes fewer rows; with all it gets about half right
MIN_ROWS, MIN_TEST_ROWS = 48, 20
VALID_ROWS, TEST_ROWS = 40, 100
SYSTEM = ""  # the chat template would introduce the model at length, in every row
# `trimtab train` takes the same, as options. fp32: what a fresh process says must be the same to the token.
SETTINGS: dict[str, Any] = {"r": 16, "lora_alpha": 32, "learning_rate": 1e-3, "per_device_train_batch_size": 4,
                            "system": SYSTEM, "precision": "fp32", "save_steps": -1}  # fmt: skip

# What the fresh process runs: everything one needs to use a saved adapter.
RELOAD = """
import json, sys
from trimtab import AutoPeftModelForCausalLM
from trimtab.train.generate import generate_ids
folder, prompts, pad_id, max_new_tokens = json.load(sys.stdin)
model = AutoPeftModelForCausalLM.from_pretrained(folder)
print(json.dumps(generate_ids(model, prompts, pad_id, max_new_tokens)))
"""


@dataclass
class Score:
    """How the model does on rows it never saw."""

    loss: float  # nats a trained token, on the valid rows
    answers: list[str]  # to the test rows
    exact: float  # share of the answers that are right to the character


@dataclass
class Task:
    """The data as the demo uses it."""

    rows: dict[str, Rows]  # train, valid, test
    config: TrainConfig
    tokenizer: Any

    def __post_init__(self) -> None:
        self.data: Data = encode_data(self.config, self.tokenizer, self.rows["train"], self.rows["valid"])
        self.test: list[Example] = encode_data(self.config, self.tokenizer, self.rows["test"], None).examples
        self.prompts = [str(row.get("prompt", row)) for row in self.rows["test"]]
        self.expected = references(self.tokenizer, self.test)
        self.longest_answer = 8 + max(len(e.ids) - e.prompt_length for e in (*self.data.examples, *self.test))

    def first(self, rows: int, share: float = 1.0) -> Task:
        """The same with fewer rows to train on, and a share of those to be tested on."""
        n, m = (max(MIN_TEST_ROWS, round(share * len(self.rows[part]))) for part in ("test", "valid"))
        fewer = {"train": self.rows["train"][:rows], "valid": self.rows["valid"][:m], "test": self.rows["test"][:n]}
        return Task(fewer, self.config, self.tokenizer)


def run(out: Path, base: str, data: Path | None, rows: int, epochs: float) -> int:
    """Run the demo; returns the exit code."""
    need("The demo", "matplotlib")  # now, not when all is trained
    began = time.monotonic()
    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False, soft_wrap=False)
    source = data or default_data()
    config = TrainConfig(
        **SETTINGS, model=base, data=str(source / "train.jsonl"), eval_data=str(source / "valid.jsonl"),
        output=str(out), overwrite_output_dir=True, num_train_epochs=epochs,
    )  # fmt: skip
    loaded, folder = load_base(config), resolve_base(base)
    model, tokenizer = loaded.model, loaded.tokenizer
    task = load_task(source, config, tokenizer)
    console.print(f"Base model: {base} ({sum(p.numel() for p in model.parameters()):,} parameters, {folder})")
    console.print(
        f"Task: {len(task.rows['train'])} rows to learn from, {len(task.test)} others to be tested on, for example"
    )
    console.print(f"  {task.prompts[0]}\n  -> {task.expected[0]}", markup=False)
    adapted = adapt(loaded, config, steps=1)
    adapted.print_trainable_parameters()
    task, training = affordable(adapted, task, config, rows, console)
    loaded.model = adapted.unload()  # the run makes its own

    console.print(f"\nBefore: scoring the base model on {len(task.test)} rows")
    start = time.monotonic()
    before = score(loaded, task)
    console.print(f"  held-out loss {before.loss:.3f}, exact match {before.exact:.0%}")
    left = training + 2 * (time.monotonic() - start)  # held-out loss as it trains, the adapter's score, the reload
    console.print(f"  Expect about {clock(left)} (min:s) more, at this speed.")

    scale = SETTINGS["lora_alpha"] / SETTINGS["r"]
    console.print(
        f"\nTraining: {len(task.rows['train'])} rows x {epochs:g} passes, r={SETTINGS['r']}, scale alpha/r={scale:g}, "
        f"learning rate {config.learning_rate:g}, batches of {config.per_device_train_batch_size}"
    )
    outcome = run_training(config, console_for(quiet=True), base=loaded, data=task.data)
    adapted, result = outcome.model, outcome.result
    if outcome.adapter is None:
        console.print("Interrupted.")
        return 130

    console.print("\nAfter: scoring the adapter, merged into the base for as long: it generates faster so")
    adapted.merge_adapter()
    after = score(replace(loaded, model=adapted), task, loss=result.eval_losses[-1][1])
    adapted.unmerge_adapter()  # the base is again what it was, bit for bit
    show(console, task, before, after, result)
    show_files(console, outcome.adapter, Path(folder), out / "loss.png")
    same = reload_is_equal(replace(loaded, model=adapted), task, outcome.adapter, console)
    console.print(f"Done in {clock(time.monotonic() - began)} (min:s).")
    return 0 if same else 1


def default_data() -> Path:
    """The US addresses: in the source tree, or in the installed package."""
    here = Path(__file__).resolve().parent
    for folder in (here.parents[2] / "examples/data/addresses", here / "addresses"):
        if (folder / "train.jsonl").is_file():
            return folder
    raise DataError("The demo's data is not installed. Name a folder with train, valid and test.jsonl: --data FOLDER")


def load_task(folder: Path, config: TrainConfig, tokenizer: Any) -> Task:
    rows = {split: load_rows(folder / f"{split}.jsonl") for split in ("train", "valid", "test")}
    return Task({**rows, "valid": rows["valid"][:VALID_ROWS], "test": rows["test"][:TEST_ROWS]}, config, tokenizer)


def affordable(model: nn.Module, task: Task, config: TrainConfig, rows: int, console: Console) -> tuple[Task, float]:
    """As much of the task as is wanted (`rows`), or as this machine can train on in `TRAIN_SECONDS`; the seconds."""
    wanted = min(rows or ROWS, len(task.rows["train"]))
    task = task.first(wanted, min(1.0, wanted / ROWS) if rows else 1.0)
    examples = task.data.examples
    seconds = config.num_train_epochs * sum(len(e.ids) for e in examples) / speed(model, examples)
    console.print(f"This machine trains on {wanted} rows in about {clock(seconds)} (min:s).")
    share = TRAIN_SECONDS / seconds
    if rows or share >= 1.0:
        return task, seconds
    fewer = min(wanted, max(MIN_ROWS, int(share * wanted)))
    task = task.first(fewer, share)
    console.print(
        f"[bold]That is long: {fewer} rows to learn from and {len(task.test)} to be tested on, then. "
        f"Expect a lower score.[/bold] (--rows {wanted} takes all.)"
    )
    return task, seconds * fewer / wanted


def speed(model: nn.Module, examples: list[Example], size: int = 4, steps: int = 4) -> float:
    """How many tokens a second this machine trains on, by timing a few small steps."""
    batches = [examples[i : i + size] for i in range(0, min(len(examples), size * steps), size)]
    model.train()
    loss_of(model, batches[0]).backward()  # the first one warms up
    start = time.perf_counter()
    for batch in batches:
        loss_of(model, batch).backward()
    model.zero_grad(set_to_none=True)
    return sum(len(e.ids) for batch in batches for e in batch) / (time.perf_counter() - start)


def score(base: Base, task: Task, loss: float | None = None) -> Score:
    if loss is None:
        loss = evaluate_loss(base.model, task.data.held_out, base.pad_id).loss
    answers = complete(base.model, base.tokenizer, task.test, task.longest_answer)
    return Score(loss, answers, exact_match(answers, task.expected))


def show(console: Console, task: Task, before: Score, after: Score, result: TrainResult) -> None:
    """The two scores, and the answers to the first three test rows side by side."""
    console.print(
        f"  {result.tokens:,} tokens in {clock(result.seconds)} (min:s), {result.tokens_per_second:,.0f} tokens/s\n"
    )
    table = Table("", "before", "after")
    table.add_row(f"held-out loss ({len(task.data.held_out)} rows)", f"{before.loss:.3f}", f"{after.loss:.3f}")
    table.add_row(f"exact match ({len(task.test)} rows)", f"{before.exact:.0%}", f"[bold]{after.exact:.0%}[/bold]")
    console.print(table)
    table = Table("prompt", "before", "after", show_lines=True)
    for prompt, expected, old, new in list(zip(task.prompts, task.expected, before.answers, after.answers))[:3]:
        verdict = "\n[green]right[/green]" if new == expected else f"\n[yellow]expected[/yellow] {escape(expected)}"
        table.add_row(escape(prompt), escape(old[:200] or "(nothing)"), escape(new or "(nothing)") + verdict)
    console.print(table)


def show_files(console: Console, adapter: Path, base: Path, plot: Path) -> None:
    small = size(adapter)
    line = f"Adapter:   {adapter} ({small / 1e6:.1f} MB"
    if base.is_dir():
        line += f"; the base is {size(base) / 1e6:.1f} MB, {size(base) / small:.0f} times as large"
    console.print(line + ")")
    console.print(f"Loss plot: {plot}\nMetrics:   {plot.parent / 'metrics.jsonl'}")


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def reload_is_equal(base: Base, task: Task, adapter: Path, console: Console) -> bool:
    """Whether a fresh process that loads the adapter answers with the very same tokens."""
    prompts = [e.ids[: e.prompt_length] for e in task.test[:3]]
    here = generate_ids(base.model, prompts, base.pad_id, task.longest_answer)
    question = json.dumps([str(adapter), prompts, base.pad_id, task.longest_answer])
    done = subprocess.run(
        [sys.executable, "-c", RELOAD],
        input=question,
        capture_output=True,
        text=True,
        check=False,
        env=dict(os.environ),
    )
    if done.returncode:
        console.print(f"A fresh process could not load the adapter:\n{done.stderr.strip()[-3000:]}", markup=False)
        return False
    there = json.loads(done.stdout.splitlines()[-1])
    if there != here:
        console.print("A fresh process loaded the adapter and generated OTHER tokens: this is a bug.", style="bold red")
        return False
    console.print(
        "A fresh process loaded it with AutoPeftModelForCausalLM.from_pretrained and generated the same "
        f"{sum(map(len, there))} tokens."
    )
    return True
