"""The runs of a sweep: their jobs, what is watched of each, and what becomes of learning rates that lag behind."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trimtab.rank.sweep.clock import Clock
from trimtab.rank.sweep.halving import given_up, rungs
from trimtab.rank.sweep.result import FAILED, FINISHED, GIVEN_UP, Outcome, Point
from trimtab.rank.sweep.score import Scorer, alone
from trimtab.rank.sweep.space import Setting, Space, Trial
from trimtab.rank.sweep.store import Store
from trimtab.rank.sweep.trainers import Job
from trimtab.shell.locate import locate_graft
from trimtab.train.adapters import adapter_config
from trimtab.train.batches import Batches
from trimtab.train.config import FIELDS, TrainConfig
from trimtab.train.loop import Event, Run, TrainResult
from trimtab.train.methods import method_fields
from trimtab.train.model import Base
from trimtab.train.preparation import Data
from trimtab.train.values import parse

Trainer = Callable[[Any, Sequence[Job]], dict[str, TrainResult]]


@dataclass
class Work:
    """All that the runs of a sweep share.

    Args:
        train: trains jobs over the base model; returns each one's result, with the reason in `stopped` where it failed.
    """

    config: TrainConfig
    space: Space
    base: Base
    data: Data
    scorer: Scorer
    store: Store
    train: Trainer
    clock: Clock = field(default_factory=lambda: Clock(1))
    done: int = 0  # runs that this call has trained to their end
    _batches: dict[tuple[int, int], Batches] = field(default_factory=dict)

    def batches(self, rows: int, seed: int) -> Batches:
        """The batches of a run: of the first `rows` of the shuffled rows, so that fewer are among more."""
        if (rows, seed) not in self._batches:
            config, every = self.config, self.data.examples
            order = random.Random(config.seed).sample(range(len(every)), len(every))
            kept = sorted(order[:rows])
            places = self.data.train.places
            self._batches[rows, seed] = Batches(
                [every[i] for i in kept],
                batch_size=config.per_device_train_batch_size,
                accumulate=config.gradient_accumulation_steps,
                epochs=config.num_train_epochs,
                max_steps=config.max_steps,
                seed=seed,
                pad_id=self.base.pad_id,
                names=[places[i] for i in kept] if places else (),
                packed=self.data.packed(config),
            )
        return self._batches[rows, seed]

    def adapter(self, setting: Setting) -> Any:
        """A setting's config of the method."""
        config = copy.copy(self.config)
        config.adapter = {
            **self.config.adapter,
            "r": setting.rank,
            "lora_alpha": setting.alpha,
            "target_modules": targets_of(config, setting.targets),
        }
        found = adapter_config(config, len(self.batches(setting.rows, config.seed)))
        found.base_model_name_or_path, found.revision = self.base.name, config.revision
        return found

    def job(self, trial: Trial, events: Sequence[Event]) -> Job:
        """A run as the trainer takes it."""
        config, batches = self.config, self.batches(trial.setting.rows, trial.seed)
        warmup = round(config.warmup_ratio * len(batches)) if config.warmup_steps is None else config.warmup_steps
        return Job(
            name=trial.name, config=self.adapter(trial.setting), batches=batches, learning_rate=trial.rate,
            schedule=config.lr_scheduler_type, warmup_steps=warmup, weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm, seed=trial.seed, events=tuple(events),
        )  # fmt: skip

    def run(self, trials: Sequence[Trial], search: bool) -> None:
        """Train what is not over yet; with `search`, rates that lag behind the others of their setting are given up."""
        left = [t for t in trials if t.name not in self.store.outcomes]
        if not left:
            return
        table = Table(self, trials) if search else None
        self.clock.running = len(left)
        results = self.train(self.base.model, [self.job(t, [Watch(self, t, table)]) for t in left])
        for trial in left:
            if trial.name not in self.store.outcomes:  # neither finished nor given up
                result = results[trial.name]
                self.store.save(Outcome(trial, result.step, FAILED, result.stopped or "it was not finished"))
                self.clock.note(f"{trial.name} failed: {result.stopped}")

    def point(self, setting: Setting) -> Point | None:
        """What a setting's runs came to; nothing where none was finished, or its other seeds failed."""
        tried = self.tried(setting)
        rate = self.rate(setting)
        if rate is None:
            return None
        trials = [Trial(setting, rate, self.config.seed + i) for i in range(self.space.seeds)]
        runs = tuple(self.store.outcomes[t.name] for t in trials if self.store.finished(t.name))
        return Point(setting, rate, tried, runs)

    def rate(self, setting: Setting) -> float | None:
        """The best learning rate of a setting: of those not given up, the one of the lowest loss."""
        table = Table(self, self.space.search(setting, self.config.seed))
        gone = table.gone(setting)
        ended = {
            t.rate: o.score.loss
            for t in self.space.search(setting, self.config.seed)
            if t.rate not in gone and (o := self.store.outcomes.get(t.name)) and o.score is not None
            and math.isfinite(o.score.loss)
        }  # fmt: skip
        return min(ended, key=lambda rate: (ended[rate], rate)) if ended else None

    def tried(self, setting: Setting) -> dict[float, float]:
        """{rate: its last held-out loss in the search}; not finite where it failed."""
        found = {}
        for t in self.space.search(setting, self.config.seed):
            o = self.store.outcomes.get(t.name)
            last = list(o.rungs.values())[-1:] if o else []
            found[t.rate] = o.score.loss if o and o.score else last[0] if last and o and o.ended != FAILED else math.inf
        return found

    def why(self, setting: Setting) -> str:
        """Why no run of a setting was finished."""
        said = [o.why for o in self.store.outcomes.values() if o.trial.setting == setting and o.why]
        return said[0] if said else "its held-out loss is not finite"


class Table:
    """The held-out losses of a search at its rungs; it decides which rates are given up."""

    def __init__(self, work: Work, trials: Sequence[Trial]) -> None:
        self.work = work
        self.scores: dict[Setting, dict[float, dict[int, float]]] = {}
        for trial in trials:
            known = work.store.outcomes.get(trial.name)
            own = self.scores.setdefault(trial.setting, {})
            own[trial.rate] = dict(known.rungs) if known else {}
            if known and known.ended == FAILED:
                self.fail(trial)

    def steps(self, setting: Setting) -> int:
        """Of a run of the search."""
        return len(self.work.batches(setting.rows, self.work.config.seed))

    def gone(self, setting: Setting) -> dict[float, int]:
        """{rate: the step after which it is given up}, as far as is known."""
        return given_up(self.work.space.rates, self.steps(setting), self.scores[setting])

    def fail(self, trial: Trial) -> None:
        """A run that has failed is worse than all others."""
        own = self.scores[trial.setting][trial.rate]
        for rung in rungs(self.steps(trial.setting)):
            own.setdefault(rung, math.inf)


class Watch(Event):
    """Scores a run at its rungs and at its end, keeps what it came to, and ends it when its rate is given up."""

    def __init__(self, work: Work, trial: Trial, table: Table | None) -> None:
        self.work, self.trial, self.table = work, trial, table
        self.kept = False

    def step(self, run: Run) -> None:
        self.work.clock.advance(run.tokens)
        if self.table is None:
            return
        setting, rate = self.trial.setting, self.trial.rate
        if run.step in rungs(len(run.batches)):
            with alone(run.model, self.trial.name) as model:
                self.table.scores[setting][rate][run.step] = self.work.scorer.quick(model)
        if rate in self.table.gone(setting) and not run.last:
            run.stop = GIVEN_UP

    def end(self, run: Run) -> None:
        rungs = self.table.scores[self.trial.setting][self.trial.rate] if self.table else {}
        facts: dict[str, Any] = {"trial": self.trial, "steps": run.step, "rungs": rungs, "tokens": run.result.tokens}
        facts["parameters"] = trained_parameters(run.model, self.trial.name)
        if run.stop == GIVEN_UP:
            self.work.store.save(Outcome(ended=GIVEN_UP, **facts))
        elif not run.stop:
            with alone(run.model, self.trial.name) as model:
                score = self.work.scorer.whole(model)
            self.work.store.save(Outcome(ended=FINISHED, score=score, **facts), self._write(run.model))
            self.work.done += 1
        self.kept = bool(not run.stop or run.stop == GIVEN_UP)
        self.work.clock.running -= 1
        self.work.clock.over += 1

    def _write(self, model: Any) -> Callable[[Path], None]:
        def write(to: Path) -> None:
            model.save_pretrained(to, selected_adapters=[self.trial.name])
            for file in list((to / self.trial.name).iterdir()):  # an adapter of a name is saved one folder down
                file.replace(to / file.name)
            (to / self.trial.name).rmdir()

        return write

    def close(self, run: Run) -> None:
        if self.table is not None and not self.kept:
            self.table.fail(self.trial)  # so that the other rates of its setting do not wait for it


def trained_parameters(model: Any, adapter: str) -> int:
    """Of one adapter."""
    graft, _ = locate_graft(model)
    return sum(slot.get().numel() for slot in graft.slots(graft.require(adapter)))


def targets_of(config: TrainConfig, text: str) -> Any:
    """A set of layers as `target_modules` takes it."""
    hint = method_fields(config.method, str(FIELDS["method"].default))["target_modules"]
    return parse("target_modules", text, hint)
