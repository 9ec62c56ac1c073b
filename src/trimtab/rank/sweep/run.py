"""A sweep from rows to advice: the parts put together."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from trimtab.errors import ConfigError, DataError, TrainError
from trimtab.rank.adapter_file import STARTS
from trimtab.rank.suggest import layer_shapes
from trimtab.rank.sweep import show
from trimtab.rank.sweep.advice import advice, take
from trimtab.rank.sweep.clock import Clock
from trimtab.rank.sweep.cost import estimate, planned_tokens, step_seconds
from trimtab.rank.sweep.general import texts
from trimtab.rank.sweep.noise import judge
from trimtab.rank.sweep.result import Curve, Point, Score, Sweep, plain
from trimtab.rank.sweep.score import Scorer
from trimtab.rank.sweep.space import Setting, Space, around, chunks
from trimtab.rank.sweep.store import PLOT, RESULT, Store, precision_of
from trimtab.rank.sweep.trainers import train_together
from trimtab.rank.sweep.work import Trainer, Work, targets_of
from trimtab.train.adapters import USUAL
from trimtab.train.batches import digest
from trimtab.train.config import TrainConfig
from trimtab.train.data import encode_rows, load_rows
from trimtab.train.example import Example
from trimtab.train.methods import fields_of, method_of
from trimtab.train.model import Base, load_base, rate_by_width
from trimtab.train.preparation import Data, encode_data, read_data
from trimtab.train.provenance import fingerprint
from trimtab.train.report import console_for

HELD_OUT, MOST_HELD_OUT = 0.2, 100  # of the rows, where none are named
# What is swept, and what a run of a sweep cannot be told.
OWN = {"r": "ranks", "lora_alpha": "alphas", "target_modules": "targets"}
NOT_HERE = ("continue_from", "on_top_of", "resume", "report_to", "early_stopping_patience", "load_best")


def rank_sweep(
    *,
    ranks: Sequence[int] = Space.ranks,
    rates: Sequence[float] = (),
    alphas: Sequence[float] = Space.alphas,
    targets: Sequence[str] = Space.targets,
    seeds: int = 2,
    data_sizes: Sequence[int] = (),
    general: str | None = None,
    at_once: int = 0,
    console: Console | None = None,
    **settings: Any,
) -> Sweep:
    """Measure which rank a task needs: short runs of every rank and learning rate, over one base model.

    `trimtab.rank_sweep(model="base", data="rows.jsonl", eval_data="valid.jsonl", ranks=[1, 4, 16])`

    Args:
        rates: learning rates; by default `learning_rate` alone, or else a factor of 3 below, at and above what suits
            the model's width.
        alphas: lora_alpha; the scale is alpha / r.
        targets: sets of layers, each as `target_modules` has it: "all-linear", "q_proj,v_proj".
        seeds: runs of each setting that are trained to the end.
        data_sizes: rows to learn from, for the map of rank against data; none: all.
        general: rows whose loss shows what was forgotten; by default some that come with trimtab.
        at_once: how many runs are trained together at most; 0: all.
        console: where to print; None: stdout.
        settings: of the runs, as `trimtab train` has them: model, data, eval_data, max_steps, output ...

    Raises:
        ConfigError: settings that contradict each other, ranks that no layer has room for.
        DataError: rows that cannot be used, or too few.
        TrainError: another sweep is in the folder, or no run could be finished.
    """
    space = Space(tuple(ranks), tuple(rates), tuple(alphas), tuple(targets), seeds, tuple(data_sizes))
    prepared = prepare_sweep(TrainConfig(**settings), space, general)
    return prepared.run(at_once, console or console_for())


@dataclass
class Prepared:
    """A sweep of which everything is loaded and nothing is done."""

    work: Work
    settings: list[Setting]
    shapes: dict[str, dict[str, tuple[int, int]]]  # set of layers -> {layer: (out, in)}

    def plan(self, at_once: int, console: Console) -> None:
        """Show the runs and what they would take."""
        seconds, cost = estimate(self.work, self.settings)
        show.plan(console, self.work, self.settings, seconds, cost, at_once)

    def run(self, at_once: int, console: Console) -> Sweep:
        """Do it all, and write it down."""
        began, work = time.monotonic(), self.work
        repeated = len(work.store.outcomes)
        work.store.begin()
        show.header(console, work, self.settings, repeated)
        base = work.scorer.whole(work.base.model)
        was_training = work.base.model.training
        try:
            with Clock(planned_tokens(work, self.settings)) as clock:
                work.clock = clock
                self._train(at_once)
            curves, failed = self._curves()
        finally:
            work.base.model.train(was_training)
        last = curves[-1]
        tokens = sum(e.trained for e in work.data.examples)
        shapes = self.shapes[last.chosen.setting.targets]
        predicted = max(1, -(-tokens // sum(a + b for a, b in shapes.values())))
        result = Sweep(
            work.base.name, str(work.config.data), len(work.data.examples), len(work.data.held_out),
            len(work.batches(len(work.data.examples), work.config.seed)), tokens, base, curves, failed,
            advice(last, base, predicted), take(last.chosen, work.config.method), predicted, work.store.folder,
            work.store.folder, time.monotonic() - began, work.done, repeated,
        )  # fmt: skip
        best = min(last.chosen.runs, key=lambda run: run.score.loss if run.score else float("inf"))
        result.adapter = work.store.folder / "adapter"
        work.store.finish(result, show.markdown(result), best)
        drawn = _plot(result)
        show.sweep(console, result, work.space.seeds, drawn)
        return result

    def _train(self, at_once: int) -> None:
        """The search for learning rates, then the other seeds at the rates that were found."""
        work, space, first = self.work, self.work.space, self.work.config.seed
        for part in chunks(self.settings, len(space.rates), at_once):
            work.run([t for s in part for t in space.search(s, first)], search=len(space.rates) > 1)
        found = [(s, rate) for s in self.settings if (rate := work.rate(s)) is not None]
        for part in chunks([s for s, _ in found], space.seeds - 1, at_once):
            rates = dict(found)
            work.run([t for s in part for t in space.repeats(s, rates[s], first)], search=False)

    def _curves(self) -> tuple[list[Curve], dict[str, str]]:
        """The settings by number of rows, each curve judged; and what failed.

        Raises:
            TrainError: there is no curve.
        """
        points, failed = [], {}
        for setting in self.settings:
            point = self.work.point(setting)
            if point is None:
                failed[setting.name] = self.work.why(setting)
            else:
                points.append(point)
        if not points:
            whys = "; ".join(f"{name}: {why}" for name, why in list(failed.items())[:3])
            raise TrainError(f"No run could be finished: {whys}. Try lower learning rates (--rates).")
        times = step_seconds(self.work, [p.setting for p in points])
        points = [replace(p, step_seconds=times[p.setting]) for p in points]
        curves = []
        for rows in sorted({p.setting.rows for p in points}):
            some = [p for p in points if p.setting.rows == rows]
            curves.append(Curve(rows, some, judge([p.measured() for p in some])))
        return curves, failed


def prepare_sweep(
    config: TrainConfig,
    space: Space,
    general: str | None = None,
    base: Base | None = None,
    data: Data | None = None,
    train: Trainer = train_together,
) -> Prepared:
    """Load what a sweep needs, and check it; raises what `rank_sweep` does.

    Args:
        base, data: the config's model and rows, where the caller has them loaded.
        train: what trains the jobs.
    """
    config = _checked(config)
    config.precision = precision_of(_folder(config), config.precision)  # type: ignore[assignment]
    rows = _rows(config) if data is None else None
    base = base or load_base(config)
    if data is None:
        assert rows is not None
        data = encode_data(config, base.tokenizer, *rows)
    if len(data.held_out) < 2:
        raise DataError(
            f"{len(data.held_out)} row(s) to be tested on: that tells nothing of noise. Give more rows, eval_data, or "
            "val_size of 2 or more."
        )
    if not space.rates:
        rate = config.learning_rate
        space = replace(space, rates=around(rate_by_width(base.model)) if rate is None else (rate,))
    settings = space.settings(len(data.examples))
    shapes = {text: layer_shapes(base.model, targets_of(config, text)) for text in space.targets}
    _check_ranks(space, shapes)
    if config.gradient_checkpointing and not getattr(base.model, "is_quantized", False):
        base.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    other = _general(general, base, config)
    scorer = Scorer(base.tokenizer, data.held_out, other, base.pad_id, config.eval_generate, config.eval_generate_rows,
                    config.eval_batch_size)  # fmt: skip
    store = Store(_folder(config), _identity(config, base, data, other))
    return Prepared(Work(config, space, base, data, scorer, store, train), settings, shapes)


def _checked(config: TrainConfig) -> TrainConfig:
    """The config of the runs, if they can be runs of a sweep."""
    if not config.data:
        raise ConfigError("Name the rows to learn: --data FILE.")
    faults = [f"{name} is what is swept: give {OWN[name]}" for name in OWN if name in config.adapter]
    faults += [f"{name} is not for a sweep" for name in NOT_HERE if getattr(config, name)]
    if config.trainer != "own" or config.optimizer != "adamw":
        faults.append("a sweep trains by trimtab's own loop with adamw")
    start = str(config.adapter.get("init_lora_weights", ""))
    if start.lower().startswith(STARTS):
        faults.append(f"init_lora_weights={start} changes the base, and the runs of a sweep share it")
    fields = fields_of(method_of(config.method, USUAL)[0])
    if not {"r", "lora_alpha"} <= fields or "init_r" in fields:
        faults.append(f"the method {config.method} has no rank and lora_alpha to sweep")
    if faults:
        raise ConfigError(f"{'; '.join(faults)}.")
    return config


def _rows(config: TrainConfig) -> Any:
    """Rows to learn and to be tested on; a part of the former where none are named."""
    if config.eval_data or config.val_size:
        return read_data(config)
    every = len(load_rows(str(config.data), split=config.split, skip_bad=config.skip_bad_rows))
    config.val_size = min(MOST_HELD_OUT, round(HELD_OUT * every))
    if config.val_size < 2:
        raise DataError(
            f"{config.data} has {every} row(s): too few to learn from some and be tested on others. Give more, or "
            "other rows to be tested on (--eval-data)."
        )
    return read_data(config)


def _check_ranks(space: Space, shapes: dict[str, dict[str, tuple[int, int]]]) -> None:
    """No rank beyond what the largest layer can have."""
    for text, layers in shapes.items():
        room = max(min(shape) for shape in layers.values())
        large = [r for r in space.ranks if r > room]
        if large:
            raise ConfigError(
                f"Of the layers of {text} none has room for r={', '.join(map(str, large))}: a change of theirs has a "
                f"rank of {room} at most."
            )


def _general(source: str | None, base: Base, config: TrainConfig) -> list[Example]:
    """The text that shows what was forgotten."""
    rows: Any = load_rows(source) if source else [{"text": text} for text in texts()]
    return encode_rows(rows, base.tokenizer, config.max_length, "truncate", config.system)


def _folder(config: TrainConfig) -> Path:
    return Path(config.output) if config.output else Path("sweeps") / Path(str(config.data)).stem


# What may change between calls: where things are, and how fast.
FREE = {
    "learning_rate",
    "output",
    "overwrite_output_dir",
    "plan",
    "device",
    "per_device_eval_batch_size",
    "data",
    "eval_data",
    "model",
}


def _identity(config: TrainConfig, base: Base, data: Data, general: Sequence[Example]) -> dict[str, Any]:
    """What must be the same for a run that is there to be one of this sweep."""
    own = {name: value for name, value in plain(config.to_dict()).items() if name not in FREE}
    rows = {"rows": digest(data.examples), "held_out": digest(data.held_out), "general": digest(general)}
    return {**own, "base": fingerprint(base.model), "precision": base.precision.name, **rows}


def _plot(result: Sweep) -> Path | None:
    from trimtab.rank.sweep.plot import plot_sweep

    try:
        return plot_sweep(result, result.folder / PLOT)
    except ImportError:  # matplotlib is optional, and so is the picture
        return None


__all__ = ["RESULT", "Point", "Score", "prepare_sweep", "rank_sweep"]
