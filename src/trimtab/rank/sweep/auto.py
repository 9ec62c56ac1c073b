"""The rank of a training run that asks for `r: auto`: a short sweep first, in the run's own folder."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import replace

from rich.console import Console

from trimtab.errors import ConfigError
from trimtab.rank.sweep.cost import planned_steps
from trimtab.rank.sweep.run import OWN, prepare_sweep
from trimtab.rank.sweep.space import ALPHA, Space, around
from trimtab.train.batches import Batches
from trimtab.train.config import AUTO, TrainConfig
from trimtab.train.folder import RANK
from trimtab.train.model import Base, rate_by_width
from trimtab.train.preparation import Data
from trimtab.train.prepare import Prepared
from trimtab.train.run import Choice

RANKS = (1, 4, 16)
SHARE = 0.5  # of the steps of the run that is to follow
LEAST, MOST = 8, 60  # steps of a run of the sweep
HELD_OUT, FEWEST = 40, 10  # rows, taken from those to learn where none are held out; the fewest there must be
# What is of the run and not of the sweep; what `on_top_of` names is merged into the base that is given.
LEFT_OUT = ("resume", "on_top_of", "load_best", "early_stopping_patience", "report_to", "eval_generate",
            "metric_for_best_model", "learning_rate")  # fmt: skip


def choose_rank(config: TrainConfig, base: Base, data: Data, console: Console) -> Choice:
    """Measure the rank, its alpha and its learning rate, as far as the config leaves them open.

    The sweep takes about half of the steps of the run, with the same rows, batches and layers.

    Raises:
        ConfigError: settings that a sweep cannot do.
        DataError: too few rows.
        TrainError: no run of the sweep could be finished.
    """
    given = {name: value for name, value in config.adapter.items() if name != "r"}
    targets, alpha = given.get("target_modules", "all-linear"), given.get("lora_alpha", ALPHA)
    if "rank_pattern" in given or "alpha_pattern" in given:
        raise ConfigError(f"With r: {AUTO} there is one rank for all layers: leave rank_pattern and alpha_pattern out.")
    text = targets if isinstance(targets, str) else ",".join(targets)
    rate = config.learning_rate
    rates = around(rate_by_width(base.model)) if rate is None else (rate,)
    space = Space(RANKS, rates, (alpha,), (text,), seeds=2)
    kept = {name: value for name, value in config.to_dict().items() if name not in (*OWN, *LEFT_OUT)}
    output, steps = str(config.folder / RANK), _steps(config, data, space)
    short = TrainConfig(**{**kept, "output": output, "max_steps": steps})
    prepared = prepare_sweep(short, space, base=base, data=_held_out(data, config.seed))
    console.print(
        f"[bold]r: {AUTO}[/bold]: a sweep of ranks {', '.join(map(str, RANKS))} comes first, {steps} steps a run"
    )
    found = prepared.run(0, console)
    console.print()
    taken = {name: found.take[name] for name in OWN}
    taken["target_modules"] = targets
    return Choice(taken, found.take["learning_rate"], found.advice)


def _steps(config: TrainConfig, data: Data, space: Space) -> int:
    """Steps of a run of the sweep, so that all of them together are a share of the run that follows."""
    whole = len(
        Batches(
            data.examples, config.per_device_train_batch_size, config.gradient_accumulation_steps,
            config.num_train_epochs, config.max_steps, packed=data.packed(config),
        )
    )  # fmt: skip
    each = len(space.ranks) * planned_steps(space, 1000) / 1000
    return min(whole, max(LEAST, min(MOST, round(SHARE * whole / each))))


def _held_out(data: Data, seed: int) -> Data:
    """The rows, some of them held out: those that are, or a part of those to learn."""
    every = len(data.examples)
    if data.valid is not None:
        return replace(data, valid=_part(data.valid, range(min(HELD_OUT, len(data.held_out)))))
    if every < FEWEST:
        raise ConfigError(f"r: {AUTO} takes {FEWEST} rows at least, and there are {every}: name a rank.")
    held = set(random.Random(seed).sample(range(every), min(HELD_OUT, every // 5)))
    learned = [i for i in range(every) if i not in held]
    return replace(data, train=_part(data.train, learned), valid=_part(data.train, sorted(held)))


def _part(prepared: Prepared, kept: Iterable[int]) -> Prepared:
    """Some of the rows."""
    kept = list(kept)
    return replace(prepared, examples=[prepared.examples[i] for i in kept], places=[prepared.places[i] for i in kept])
