"""One pass over chats of mixed lengths, prompts masked, to a held-out loss: trimtab, TRL and the Hugging Face Trainer.

    python bench/end_to_end.py [--rows 48] [--arms ...] [--write]

SmolLM2-135M, LoRA r=16 on all linear layers, batches of 8 rows (packed: sequences of 1,024 tokens), the same rows,
token ids, learning rate and schedule in every arm, each in a fresh process; batches differ as the tools make them. The
chats are put together from the definitions of examples/data/devil: 1 to 12 turns, the fewer the likelier, of which the
last answer is learned. Time is that of training alone: loading, encoding and the evaluations are not in it. The time to
a loss is interpolated between evaluations, and the loss is the worst that any arm ends at: all of them reach it.

Needs trl and peft beside what trimtab needs; arms whose package is missing are left out.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")

DATA = Path(__file__).resolve().parent.parent / "examples" / "data" / "devil"
TURNS, BATCH, PACKED, RATE, HELD_OUT = 12, 8, 1024, 1e-3, 16
LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}

# name -> (what trains, its settings), in the order of the waterfall; each of ours adds one thing to the one before it.
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "TRL, its defaults (bf16 autocast, checkpointing)": ("trl", {}),
    "TRL at its best, fp32 (packing, no checkpointing)": ("trl", {"packing": True, "bf16": False}),
    "TRL at its best, bf16 base (the same)": ("trl", {"packing": True, "bf16": False, "dtype": "bfloat16"}),
    "Trainer + PEFT, padded, fp32": ("trainer", {"library": "peft"}),
    "Trainer + trimtab's layers": ("trainer", {"library": "trimtab"}),
    "trimtab's loop: rows of like length in a batch": ("trimtab", {"fused": False}),
    "+ head and loss in one step, supervised rows only": ("trimtab", {}),
    "+ packing": ("trimtab", {"packing": True}),
    "+ precision auto (all of it)": ("trimtab", {"packing": True, "precision": "auto"}),
}
RIVALS = [name for name, (tool, how) in ARMS.items() if tool == "trl" or how.get("library") == "peft"]


@dataclass
class Clock:
    """The time of training, without that of the evaluations in it: each is (seconds, steps, held-out loss)."""

    score: Callable[[], float]
    seconds: float = 0.0
    processor: float = 0.0
    scores: list[tuple[float, int, float]] = field(default_factory=list)
    since: tuple[float, float] = (0.0, 0.0)

    def go(self) -> None:
        self.since = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        self.seconds += time.perf_counter() - self.since[0]
        self.processor += time.process_time() - self.since[1]

    def evaluate(self, step: int) -> None:
        self.scores.append((self.seconds, step, self.score()))


def chats(file: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Conversations of one or more definitions."""
    lines = [json.loads(line) for line in (DATA / file).read_text(encoding="utf-8").splitlines()]
    draw = random.Random(seed)
    draw.shuffle(lines)
    found = []
    for _ in range(count):
        turns = draw.choices(range(1, TURNS + 1), [1 / n for n in range(1, TURNS + 1)])[0]
        rows = [lines[draw.randrange(len(lines))] for _ in range(turns)]
        pairs = [(("user", r["prompt"]), ("assistant", r["completion"])) for r in rows]
        found.append({"messages": [{"role": who, "content": text} for pair in pairs for who, text in pair]})
    return found


def prepared(options: Any, settings: dict[str, Any]) -> tuple[Any, Any, Any, list[Any], list[Any]]:
    """(config, base, encoded rows, those to learn, those held out)."""
    from trimtab.train.config import TrainConfig
    from trimtab.train.model import load_base
    from trimtab.train.preparation import encode_data
    from trimtab.train.rows import Rows

    precision = "bf16" if settings.get("dtype") == "bfloat16" else settings.get("precision", "fp32")
    config = TrainConfig(
        model="smollm2-135m-instruct", train_on="last", system="", num_train_epochs=1, learning_rate=RATE,
        per_device_train_batch_size=BATCH, packing=settings.get("packing", False), max_length=PACKED, too_long="drop",
        precision=precision, r=16, lora_alpha=32,
    )  # fmt: skip
    base = load_base(config)
    data = encode_data(config, base.tokenizer, *(Rows(chats(f, n, 1)) for f, n in (
        ("train.jsonl", options.rows), ("valid.jsonl", HELD_OUT))))  # fmt: skip
    return config, base, data, data.examples, data.held_out


def with_trimtab(options: Any, settings: dict[str, Any]) -> Clock:
    """Our own loop, as `trimtab train` runs it."""
    from trimtab.train import loop
    from trimtab.train.batches import Batches
    from trimtab.train.evaluate import evaluate_loss
    from trimtab.train.events import Schedule
    from trimtab.train.model import adapt, make_optimizer

    config, base, data, rows, held_out = prepared(options, settings)
    # A packed sequence holds as many rows as a padded batch: each is a step.
    packed = data.packed(config)
    batches = Batches(rows, batch_size=1 if packed else BATCH, epochs=1, pad_id=base.pad_id, packed=packed)
    model = adapt(base, config, len(batches))
    if not settings.get("fused", True):
        loop.fuse_loss = lambda model: None
    clock = Clock(lambda: evaluate_loss(model, held_out, base.pad_id).loss)
    half = len(batches) // 2

    def watch(run: Any) -> None:
        clock.seconds = run.result.seconds
        if run.step in (half, len(batches)):
            clock.evaluate(run.step)

    clock.evaluate(0)
    warmup = round(0.1 * len(batches))
    began = time.process_time()
    loop.train(model, batches, make_optimizer(model, config), [Schedule("linear", warmup), watch])
    clock.processor = time.process_time() - began  # that of the evaluations included
    return clock


def with_trainer(options: Any, settings: dict[str, Any], trl: bool = False) -> Clock:
    """The Hugging Face Trainer with the padding collator, or TRL's on top of it."""
    import torch
    from datasets import Dataset
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

    from trimtab.train.evaluate import evaluate_loss

    library = importlib.import_module(settings.get("library", "peft"))
    _, base, _, rows, held_out = prepared(options, {**settings, "packing": False})
    torch.manual_seed(0)
    columns = {"input_ids": [e.ids for e in rows], "labels": [e.labels for e in rows]}
    common: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(), "per_device_train_batch_size": BATCH, "learning_rate": RATE, "use_cpu": True,
        "num_train_epochs": 1, "report_to": "none", "save_strategy": "no", "warmup_steps": 0.1, "disable_tqdm": True,
        "logging_strategy": "no", "seed": 0,
    }  # fmt: skip
    if trl:
        from trl import SFTConfig, SFTTrainer

        own = {k: v for k, v in settings.items() if k in ("packing", "bf16")}
        if settings:  # at its best
            own |= {"gradient_checkpointing": False}
        if own.get("packing"):
            own |= {"per_device_train_batch_size": 1}  # a packed sequence holds as many rows as a padded batch
        arguments = SFTConfig(**{**common, **own}, max_length=PACKED)
        trainer: Any = SFTTrainer(
            base.model, args=arguments, train_dataset=Dataset.from_dict(columns), processing_class=base.tokenizer,
            peft_config=library.LoraConfig(**LORA),
        )  # fmt: skip
    else:
        model = library.get_peft_model(base.model, library.LoraConfig(**LORA))
        columns["attention_mask"] = [[1] * len(e.ids) for e in rows]
        collator = DataCollatorForSeq2Seq(base.tokenizer, padding=True)
        trainer = Trainer(
            model, TrainingArguments(**common), data_collator=collator, train_dataset=Dataset.from_dict(columns)
        )
    inner = trainer.model
    clock = Clock(lambda: evaluate_loss(inner, held_out, base.pad_id).loss)

    class Watch(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            clock.evaluate(0)
            clock.go()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            clock.stop()
            if state.global_step in (state.max_steps // 2, state.max_steps):
                clock.evaluate(state.global_step)
            clock.go()

    trainer.add_callback(Watch())
    trainer.train()
    return clock


def run_arm(name: str, options: Any) -> None:
    """One arm, in this process; prints what it came to as a line of JSON."""
    tool, settings = ARMS[name]
    if tool == "trimtab":
        clock = with_trimtab(options, settings)
    else:
        clock = with_trainer(options, settings, trl=tool == "trl")
    print(json.dumps({"seconds": clock.seconds, "processor": clock.processor, "scores": clock.scores}))


def time_to(loss: float, scores: list[tuple[float, int, float]]) -> float:
    """Seconds until the held-out loss was `loss`, by straight lines between the evaluations."""
    for (t0, _, l0), (t1, _, l1) in pairwise(scores):
        if l1 <= loss:
            return t0 + (t1 - t0) * (l0 - loss) / (l0 - l1) if l0 > l1 else t1
    return scores[-1][0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--arms", nargs="*", help="only those whose names begin so")
    parser.add_argument("--write", action="store_true", help="write the table into docs/benchmarks.md")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        run_arm(options.arm, options)
        return
    found: dict[str, Any] = {}
    for name, (tool, settings) in ARMS.items():
        needed = {"trl": ["trl", "peft"], "trainer": [settings.get("library", "")]}.get(tool, [])
        if options.arms and not any(name.startswith(a) for a in options.arms):
            continue
        if not all(importlib.util.find_spec(n) for n in needed):
            print(f"left out, {' or '.join(needed)} is missing: {name}", file=sys.stderr)
            continue
        command = [sys.executable, __file__, "--rows", str(options.rows), "--arm", name]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{name}:\n{done.stderr[-3000:]}")
        found[name] = json.loads(done.stdout.splitlines()[-1])
        print(f"{found[name]['seconds']:7.1f} s  {found[name]['scores'][-1][2]:.4f}  {name}", file=sys.stderr)
    report(found, options)


def report(found: dict[str, Any], options: Any) -> None:
    from report import table, write

    worst = max(f["scores"][-1][2] for f in found.values())
    times = {name: time_to(worst, f["scores"]) for name, f in found.items()}
    ours = times[list(found)[-1]]
    rows = [
        [name, f["scores"][-1][1], f"{f['seconds']:.1f} s", f"{f['scores'][-1][2]:.3f}", f"{times[name]:.1f} s",
         f"{times[name] / ours:.2f}"]
        for name, f in found.items()
    ]  # fmt: skip
    head = ["", "steps", "training", "held-out loss at the end", f"to a loss of {worst:.3f}", "over all of trimtab"]
    start = next(iter(found.values()))["scores"][0][2]
    note = f"Before training the held-out loss is {start:.3f}. One run an arm: the clock's noise is in it."
    text = f"{note}\n\n{table(head, rows)}"
    title = f"One pass over {options.rows} chats of mixed lengths, prompts masked, SmolLM2-135M, LoRA r=16"
    if options.write:
        write("end_to_end", title, text)
    else:
        print(f"{title}\n\n{text}")


if __name__ == "__main__":
    main()
