"""A training run from its config to a saved adapter: the parts put together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from trimtab import __version__
from trimtab.shell.peft_model import PeftModel
from trimtab.train import folder as files
from trimtab.train.adapters import RANK
from trimtab.train.assembly import Assembled, assemble
from trimtab.train.checkpoint import load_checkpoint
from trimtab.train.config import AUTO, TrainConfig
from trimtab.train.data import check_packing
from trimtab.train.events import Interrupt, Schedule
from trimtab.train.loop import Event, Run, TrainResult, train
from trimtab.train.model import Base, load_base, make_optimizer, merge_first
from trimtab.train.plan import measure, targets, try_evaluation, try_longest
from trimtab.train.preparation import Data, encode_data, read_data, show_data
from trimtab.train.processes import Alone, processes
from trimtab.train.progress import Progress
from trimtab.train.report import console_for, facts_of, show_end, show_facts, show_plan

__all__ = ["Choice", "Outcome", "run_training"]

MADE = f"Made by trimtab {__version__}; `trimtab train run.yaml` runs the same again."


@dataclass
class Outcome:
    """What a run came to."""

    folder: Path
    adapter: Path | None  # its folder; None where the run was stopped, or only planned
    result: TrainResult
    model: PeftModel
    interrupted: bool = False


@dataclass(frozen=True)
class Choice:
    """A rank that was measured, and what goes with it."""

    adapter: dict[str, Any]  # fields of the method's config
    learning_rate: float
    advice: str  # the same in words


Choose = Callable[[TrainConfig, Base, Data, Console], Choice]


def run_training(
    config: TrainConfig,
    console: Console | None = None,
    group: Alone | None = None,
    events: Sequence[Event | Callable[[Run], Any]] = (),
    base: Base | None = None,
    data: Data | None = None,
    choose: Choose | None = None,
) -> Outcome:
    """Do what a config says, from the model to the saved adapter.

    Args:
        console: where to print; None: stdout.
        group: the processes that train together; by default what the launcher has started.
        events: more of them, after the run's own.
        base, data: the config's model and rows, where the caller has them loaded.
        choose: what measures the rank where the config has `r: auto`: `trimtab.rank.sweep.auto.choose_rank`.

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
    chosen = _choose(config, base, data, console, choose if group.count == 1 else None)
    run = assemble(config, base, data, group)
    _announce(run, console)
    return _plan(run, console) if config.plan else _train(run, console, checkpoint, events, chosen)


def _claim(config: TrainConfig, group: Alone) -> Path | None:
    found = files.claim(config) if group.main else None
    group.wait()
    return group.gather(found)[0]  # type: ignore[no-any-return]


def _choose(config: TrainConfig, base: Base, data: Data, console: Console, choose: Choose | None) -> bool:
    """Fill in a rank that is to be measured; whether it was."""
    if config.adapter.get("r") != AUTO or choose is None:
        return False
    if config.plan:
        config.adapter["r"] = RANK
        console.print(f"r: {AUTO}: a sweep would come first, half as long as the run. The plan below is of r={RANK}.")
        return False
    choice = choose(config, base, data, console)
    config.adapter |= choice.adapter
    config.learning_rate = choice.learning_rate
    return True


def _base(config: TrainConfig, group: Alone) -> Base:
    if not config.on_top_of:
        return load_base(config)
    merged = config.folder / files.BASE
    if config.resume and merged.exists():
        return load_base(config, str(merged))
    return merge_first(load_base(config), config, merged if group.main and not config.plan else None)


def _announce(run: Assembled, console: Console) -> None:
    """The header, and what the rows are: raises where they cannot be trained on."""
    config, base, data = run.config, run.base, run.data
    facts = facts_of(config, base, data, run.batches, run.model, run.group.count, run.by_width)
    show_facts(console, f"Run in {config.folder}", facts)
    show_data(data, base.model, base.tokenizer, console)
    for line in base.notices:
        console.print(line, style="yellow", markup=False)
    console.print()
    if config.packing:
        check_packing(run.model, data.examples)


def _plan(run: Assembled, console: Console) -> Outcome:
    """What would be trained, and what it would take."""
    asked = None if run.config.continue_from else run.config.adapter
    cost = measure(run.model, run.batches)
    show_plan(console, targets(run.model, asked), cost, len(run.batches))
    return Outcome(run.config.folder, None, TrainResult(), run.model)


def _train(
    run: Assembled,
    console: Console,
    checkpoint: Path | None,
    events: Sequence[Event | Callable[[Run], Any]],
    chosen: bool,
) -> Outcome:
    """Train, from a checkpoint or from the start, and save what came out; `chosen`: a sweep has found the rank."""
    config, batches, group = run.config, run.batches, run.group
    result, restore = TrainResult(), None
    progress = Progress()
    own: list[Event] = [Schedule(config.lr_scheduler_type, run.warmup)]
    own += run.events([Interrupt(progress.note), progress], progress.note)
    optimizer = make_optimizer(run.model, config)
    try_longest(run.model, batches)
    if run.data.held_out:
        try_evaluation(run.model, run.data.held_out, config.eval_batch_size, run.base.pad_id)
    if checkpoint is not None:  # after these trials: methods keep what they draw and count in a forward
        result, restore = load_checkpoint(checkpoint, run.model, run.identity())
    if config.resume:
        console.print(_where(result, len(batches)))
    if group.main:  # nothing of an earlier run is touched before this
        if not config.resume:
            files.clear(config, chosen)
        files.save_config(config, MADE)
    torch.manual_seed(config.seed)
    prepared, optimizer = group.prepare(run.model, optimizer)
    if restore is not None:
        restore(prepared, optimizer, group)
    result = train(prepared, batches, optimizer, [*own, *events], result=result,
                   max_grad_norm=config.max_grad_norm, processes=group, seed=config.seed)  # fmt: skip
    if result.stopped == Interrupt.REASON:
        again = f"trimtab train --resume --output {config.folder}"
        text = f"\nStopped at step {result.step} of {len(batches)}. Go on: {again}"
        console.print(text, markup=False, soft_wrap=True)
        return Outcome(config.folder, None, result, run.model, interrupted=True)
    if result.stopped:
        console.print(f"Stopped at step {result.step}: {result.stopped}.")
    adapter, kept = run.save(group.unwrap(prepared), result)
    if group.main:
        more = {"loss plot": run.plot(result), "metrics": config.folder / files.METRICS}
        show_end(console, result, adapter, kept, more)
    group.wait()
    return Outcome(config.folder, adapter, result, run.model)


def _where(result: TrainResult, steps: int) -> str:
    if result.step >= steps:
        return f"All {steps} steps are done already."
    return f"Going on after step {result.step}." if result.step else "There is no checkpoint yet: from the start."
