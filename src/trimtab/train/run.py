"""A training run from its config to a saved adapter: the parts put together."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from trimtab import __version__
from trimtab.errors import DataError
from trimtab.shell.peft_model import PeftModel
from trimtab.train import folder as files
from trimtab.train.adapters import adapter_settings
from trimtab.train.batches import Batches, digest
from trimtab.train.card import write_card
from trimtab.train.checkpoint import Checkpoints, go_back, load_checkpoint, write_folder, writing
from trimtab.train.config import ADAPTER, FIELDS, LOOP, TrainConfig
from trimtab.train.data import check_packing
from trimtab.train.evaluate import evaluate_generate, evaluate_loss
from trimtab.train.events import (
    EarlyStopping,
    Evaluate,
    Interrupt,
    MethodSteps,
    Metrics,
    Schedule,
    StepOne,
    Trackers,
)
from trimtab.train.loop import Event, Run, TrainResult, train
from trimtab.train.metrics import metric
from trimtab.train.model import Base, adapt, load_base, make_optimizer, merge_first, rate_by_width
from trimtab.train.plan import measure, targets, try_evaluation, try_longest
from trimtab.train.plot import plot_losses
from trimtab.train.preparation import Data, encode_data, read_data, show_data
from trimtab.train.processes import Alone, processes
from trimtab.train.progress import Progress
from trimtab.train.provenance import NAME, fingerprint, provenance
from trimtab.train.report import card_facts, console_for, facts_of, show_end, show_facts, show_plan

__all__ = ["Outcome", "run_training"]


@dataclass
class Outcome:
    """What a run came to."""

    folder: Path
    adapter: Path | None  # its folder; None where the run was stopped, or only planned
    result: TrainResult
    model: PeftModel
    interrupted: bool = False


def run_training(
    config: TrainConfig,
    console: Console | None = None,
    group: Alone | None = None,
    events: Sequence[Event | Callable[[Run], Any]] = (),
    base: Base | None = None,
    data: Data | None = None,
) -> Outcome:
    """Do what a config says, from the model to the saved adapter.

    Args:
        console: where to print; None: stdout.
        group: the processes that train together; by default what the launcher has started.
        events: more of them, after the run's own.
        base, data: the config's model and rows, where the caller has them loaded.

    Raises:
        PeftError: in one of its kinds, whatever cannot be done; what was there before is as it was.
    """
    group = group or processes()
    console = console or console_for(quiet=not group.main)
    checkpoint = None if config.plan else _claim(config, group)
    rows = read_data(config) if data is None else None  # before the model: reading them is quick
    base = base or _base(config, group)
    if data is None:
        assert rows is not None
        data = encode_data(config, base.tokenizer, *rows)
    batches = Batches(
        data.examples,
        batch_size=config.per_device_train_batch_size,
        accumulate=config.gradient_accumulation_steps * group.count,
        epochs=config.num_train_epochs,
        max_steps=config.max_steps,
        seed=config.seed,
        pad_id=base.pad_id,
        names=data.train.places,
        packed=data.packed(config),
    )
    prints = fingerprint(base.model)
    model = adapt(base, config, len(batches))
    if not config.continue_from:
        config.adapter = adapter_settings(config)
    config.precision = base.precision.name  # type: ignore[assignment]
    by_width = config.learning_rate is None
    if by_width:
        config.learning_rate = rate_by_width(base.model)
    job = _Job(config, base, data, batches, prints, model, group, console, by_width)
    job.announce()
    return job.plan() if config.plan else job.train(checkpoint, events)


def _claim(config: TrainConfig, group: Alone) -> Path | None:
    found = files.claim(config) if group.main else None
    group.wait()
    return group.gather(found)[0]  # type: ignore[no-any-return]


def _base(config: TrainConfig, group: Alone) -> Base:
    if not config.on_top_of:
        return load_base(config)
    merged = config.folder / files.BASE
    if config.resume and merged.exists():
        return load_base(config, str(merged))
    return merge_first(load_base(config), config, merged if group.main and not config.plan else None)


@dataclass
class _Job:
    """A run of which everything is loaded and nothing is done."""

    config: TrainConfig
    base: Base
    data: Data
    batches: Batches
    prints: dict[str, str]  # the base's fingerprint, before it was adapted
    model: PeftModel
    group: Alone
    console: Console
    by_width: bool  # the learning rate is

    def announce(self) -> None:
        """The header, and what the rows are: raises where they cannot be trained on."""
        facts = facts_of(self.config, self.base, self.data, self.batches, self.model, self.group.count, self.by_width)
        show_facts(self.console, f"Run in {self.config.folder}", facts)
        show_data(self.data, self.base.model, self.base.tokenizer, self.console)
        for line in self.base.notices:
            self.console.print(line, style="yellow", markup=False)
        self.console.print()
        if self.config.packing:
            check_packing(self.model, self.data.examples)

    def plan(self) -> Outcome:
        """What would be trained, and what it would take."""
        asked = None if self.config.continue_from else self.config.adapter
        cost = measure(self.model, self.batches)
        show_plan(self.console, targets(self.model, asked), cost, len(self.batches))
        return Outcome(self.config.folder, None, TrainResult(), self.model)

    def train(self, checkpoint: Path | None, events: Sequence[Event | Callable[[Run], Any]]) -> Outcome:
        """Train, from a checkpoint or from the start, and save what came out."""
        config, batches, group = self.config, self.batches, self.group
        result, restore = TrainResult(), None
        if checkpoint is not None:
            result, restore = load_checkpoint(checkpoint, self.model, self.identity())
        if config.resume:
            self.console.print(_where(result, len(batches)))
        own, optimizer = self.events(), make_optimizer(self.model, config)
        try_longest(self.model, batches)
        if self.data.held_out:
            try_evaluation(self.model, self.data.held_out, config.eval_batch_size, self.base.pad_id)
        if group.main:  # nothing of an earlier run is touched before this
            if not config.resume:
                files.clear(config)
            files.save_config(config, f"Made by trimtab {__version__}; `trimtab train run.yaml` runs the same again.")
        torch.manual_seed(config.seed)
        prepared, optimizer = group.prepare(self.model, optimizer)
        if restore is not None:
            restore(prepared, optimizer, group)
        result = train(prepared, batches, optimizer, [*own, *events], result=result,
                       max_grad_norm=config.max_grad_norm, processes=group, seed=config.seed)  # fmt: skip
        if result.stopped == Interrupt.REASON:
            again = f"trimtab train --resume --output {config.folder}"
            text = f"\nStopped at step {result.step} of {len(batches)}. Go on: {again}"
            self.console.print(text, markup=False, soft_wrap=True)
            return Outcome(config.folder, None, result, self.model, interrupted=True)
        if result.stopped:
            self.console.print(f"Stopped at step {result.step}: {result.stopped}.")
        return self.finish(group.unwrap(prepared), result)

    def identity(self) -> dict[str, Any]:
        """What must be the same for a resumed run to be the same run: not where its rows are, but what they are."""
        free = {n for n, f in FIELDS.items() if f.metadata["section"] not in (LOOP, ADAPTER)} - {"model", "revision"}
        free |= {"per_device_eval_batch_size", "device"}
        own = {n: v for n, v in self.config.to_dict().items() if n not in free}
        return {**own, "rows": digest(self.data.examples), "packed": self.data.packed(self.config)}

    def events(self) -> list[Event]:
        """The run's own events, in the order in which they see a step."""
        config, batches, progress = self.config, self.batches, Progress()
        warmup = round(config.warmup_ratio * len(batches)) if config.warmup_steps is None else config.warmup_steps
        events: list[Event] = [Schedule(config.lr_scheduler_type, warmup), MethodSteps(), StepOne(progress.note)]
        events += [Interrupt(progress.note), Metrics(config.folder / files.METRICS), progress]
        if config.report_to:
            events.append(Trackers(config.report_to, config.folder, config.folder.name, config.to_dict()))
        if self.data.held_out:
            every = _steps(config.eval_steps, batches)
            events.append(Evaluate(scorer(config, self.data, self.base), every, config.metric_for_best_model))
        if config.early_stopping_patience:
            events.append(EarlyStopping(config.early_stopping_patience))
        every, limit = _steps(config.save_steps, batches), config.save_total_limit
        return [*events, Checkpoints(config.folder, every, limit, config.keeps_best, self.identity())]

    def finish(self, model: PeftModel, result: TrainResult) -> Outcome:
        """Save the adapter, with its card and provenance, and say where everything is."""
        config, base, kept = self.config, self.base, result.step
        if config.keeps_best and result.best and result.best[0] != result.step:
            kept = result.best[0]
            go_back(config.folder / f"checkpoint-{kept}", model)
        content = provenance(
            base.name, base.commit or config.revision, self.prints, base.tokenizer,
            data={"rows": len(self.data.examples), "sha256": digest(self.data.examples), "from": config.data},
            config=config.to_dict(), steps=result.step, kept_step=kept,
            scores=next((dict(scores) for step, scores in reversed(result.scores) if step == kept), {}),
        )  # fmt: skip

        def write(folder: Path) -> None:
            model.save_pretrained(folder, is_main_process=self.group.main)
            if self.group.main:
                (folder / NAME).write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
                write_card(folder, card_facts(config, base, self.data, result, kept), result.scores)

        adapter = config.folder / files.ADAPTER
        if self.group.main:
            with writing(f"The adapter {adapter}", config.folder):
                write_folder(adapter, write)
            plot = _plot(config, base, result)
            more = {"loss plot": plot, "metrics": config.folder / files.METRICS}
            show_end(self.console, result, adapter, kept, more)
        else:
            write(adapter)
        self.group.wait()
        return Outcome(config.folder, adapter, result, model)


def scorer(config: TrainConfig, data: Data, base: Base) -> Callable[[Any], dict[str, float]]:
    """The function that scores the model on the held-out rows: its loss, and the metrics of its answers.

    Where every answer is one token, how many of them are right is told by the same forward as the loss.

    Raises:
        ConfigError: a metric that is unknown.
        DataError: answers are to be generated, and there are rows that ask nothing.
    """
    for name in config.eval_generate:
        metric(name)
    rows, part = data.held_out, data.held_out[: config.eval_generate_rows]
    if config.eval_generate and not all(e.prompt_length for e in part):
        raise DataError("eval_generate is for rows that ask something; text has only a loss.")
    special = tuple(base.tokenizer.all_special_ids)
    tokens = config.eval_batch_size * max(len(e.ids) for e in rows)

    def score(model: Any) -> dict[str, float]:
        inner = getattr(model, "module", model)
        found = evaluate_loss(inner, rows, base.pad_id, tokens, special)
        scores = {"loss": found.loss}
        if found.accuracy is not None:
            scores["accuracy"] = found.accuracy
        elif config.metric_for_best_model == "accuracy":
            raise DataError("metric_for_best_model: accuracy is of answers of one token, and some held out are longer.")
        if config.eval_generate:
            names, size = config.eval_generate, config.eval_batch_size
            scores |= evaluate_generate(inner, base.tokenizer, part, names, batch_size=size).metrics
        return scores

    return score


def _where(result: TrainResult, steps: int) -> str:
    if result.step >= steps:
        return f"All {steps} steps are done already."
    return f"Going on after step {result.step}." if result.step else "There is no checkpoint yet: from the start."


def _steps(every: float, batches: Batches) -> int:
    """A number of steps, or a share of them, as a number."""
    return max(1, round(every * len(batches))) if 0 < every < 1 else round(every)


def _plot(config: TrainConfig, base: Base, result: TrainResult) -> Path | None:
    try:
        return plot_losses(result, config.folder / files.PLOT, base.name)
    except ImportError:  # matplotlib is optional, and so is the picture
        return None
