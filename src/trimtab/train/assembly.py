"""A run of which everything is loaded and nothing is done: rows, adapter, events, and how what comes out is saved."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.errors import DataError
from trimtab.shell.peft_model import PeftModel
from trimtab.train import folder as files
from trimtab.train.adapters import adapter_settings
from trimtab.train.batches import Batches, digest
from trimtab.train.card import write_card
from trimtab.train.checkpoint import Checkpoints, go_back, save_adapter, write_folder, writing
from trimtab.train.config import ADAPTER, FIELDS, LOOP, TrainConfig
from trimtab.train.evaluate import evaluate_generate, evaluate_loss
from trimtab.train.events import EarlyStopping, Evaluate, MethodSteps, Metrics, StepOne, Trackers
from trimtab.train.loop import Event, TrainResult
from trimtab.train.metrics import metric
from trimtab.train.model import Base, adapt, rate_by_width
from trimtab.train.plot import plot_losses
from trimtab.train.preparation import Data
from trimtab.train.processes import Alone
from trimtab.train.provenance import NAME, fingerprint, provenance
from trimtab.train.report import card_facts

__all__ = ["Assembled", "assemble", "scorer"]


def assemble(
    config: TrainConfig, base: Base, data: Data, group: Alone, model: PeftModel | None = None, adapter: str = ""
) -> Assembled:
    """The parts of a run put together; the config gets what it left to be found out.

    Args:
        model: the base with adapters already, where this run's is to be one of several.
        adapter: what it is called there.
    """
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
    prints = fingerprint(base.model if model is None else model)
    model = adapt(base, config, len(batches), model, adapter)
    if not config.continue_from:
        config.adapter = adapter_settings(config)
    config.precision = base.precision.name  # type: ignore[assignment]
    by_width = config.learning_rate is None
    if by_width:
        config.learning_rate = rate_by_width(base.model)
    return Assembled(config, base, data, batches, prints, model, group, by_width, adapter or None)


@dataclass
class Assembled:
    """A run of which everything is loaded and nothing is done."""

    config: TrainConfig
    base: Base
    data: Data
    batches: Batches
    prints: dict[str, str]  # the base's fingerprint, before it was adapted
    model: PeftModel
    group: Alone
    by_width: bool  # the learning rate is
    adapter: str | None = None  # its name where others are trained beside it

    @property
    def warmup(self) -> int:
        """Steps in which the learning rate rises."""
        config = self.config
        share = round(config.warmup_ratio * len(self.batches))
        return share if config.warmup_steps is None else config.warmup_steps

    def identity(self) -> dict[str, Any]:
        """What must be the same for a resumed run to be the same run: not where its rows are, but what they are."""
        free = {n for n, f in FIELDS.items() if f.metadata["section"] not in (LOOP, ADAPTER)} - {"model", "revision"}
        free |= {"per_device_eval_batch_size", "device"}
        own = {n: v for n, v in self.config.to_dict().items() if n not in free}
        return {**own, "rows": digest(self.data.examples), "packed": self.data.packed(self.config)}

    def events(self, watch: Sequence[Event], note: Callable[[str], None]) -> list[Event]:
        """The run's own events after its schedule, in the order in which they see a step.

        Args:
            watch: those of who watches it.
            note: shows a line.
        """
        config, batches = self.config, self.batches
        events: list[Event] = [MethodSteps(), StepOne(note), *watch, Metrics(config.folder / files.METRICS)]
        if config.report_to:
            events.append(Trackers(config.report_to, config.folder, config.folder.name, config.to_dict()))
        if self.data.held_out:
            every = _steps(config.eval_steps, batches)
            events.append(Evaluate(scorer(config, self.data, self.base), every, config.metric_for_best_model))
        if config.early_stopping_patience:
            events.append(EarlyStopping(config.early_stopping_patience))
        every, limit = _steps(config.save_steps, batches), config.save_total_limit
        return [*events, Checkpoints(config.folder, every, limit, config.keeps_best, self.identity())]

    def save(self, model: PeftModel, result: TrainResult) -> tuple[Path, int]:
        """Save the adapter, with its card and provenance; (its folder, the step whose weights it has)."""
        config, base, kept = self.config, self.base, result.step
        if config.keeps_best and result.best and result.best[0] != result.step:
            kept = result.best[0]
            go_back(config.folder / f"checkpoint-{kept}", model, self.adapter)
        content = provenance(
            base.name, base.commit or config.revision, self.prints, base.tokenizer,
            data={"rows": len(self.data.examples), "sha256": digest(self.data.examples), "from": config.data},
            config=config.to_dict(), steps=result.step, kept_step=kept,
            scores=next((dict(scores) for step, scores in reversed(result.scores) if step == kept), {}),
        )  # fmt: skip

        def write(folder: Path) -> None:
            save_adapter(model, folder, self.adapter, self.group.main)
            if self.group.main:
                (folder / NAME).write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
                facts = card_facts(config, base, self.data, result, kept, files.advice(config))
                write_card(folder, facts, result.scores)

        adapter = config.folder / files.ADAPTER
        if self.group.main:
            with writing(f"The adapter {adapter}", config.folder):
                write_folder(adapter, write)
        else:
            write(adapter)
        return adapter, kept

    def plot(self, result: TrainResult) -> Path | None:
        """Draw the losses, where matplotlib is installed."""
        try:
            return plot_losses(result, self.config.folder / files.PLOT, self.base.name)
        except ImportError:  # matplotlib is optional, and so is the picture
            return None


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


def _steps(every: float, batches: Batches) -> int:
    """A number of steps, or a share of them, as a number."""
    return max(1, round(every * len(batches))) if 0 < every < 1 else round(every)
