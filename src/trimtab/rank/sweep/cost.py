"""What a step costs at each setting, and what a sweep will take before it is begun."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

from trimtab.rank.sweep.halving import steps_of_search
from trimtab.rank.sweep.space import Setting, Space
from trimtab.rank.sweep.work import Work
from trimtab.shell.tasks import get_peft_model
from trimtab.train.loss import batch_loss
from trimtab.train.plan import Cost, measure

ROUNDS = 3


def step_seconds(work: Work, settings: Sequence[Setting]) -> dict[Setting, float]:
    """Seconds of forward and backward of one batch at each setting, alone: the median of a few, taken in turns."""
    names = {s.name: s for s in settings}
    first = settings[0]
    batches = work.batches(first.rows, work.config.seed)
    every = [batch for step in range(len(batches)) for batch in batches[step]]
    middle = sorted(every, key=lambda b: b.tokens)[len(every) // 2]
    tensors = batches.tensors(middle)
    model: Any = get_peft_model(work.base.model, work.adapter(first), adapter_name=first.name)
    for setting in settings[1:]:
        model.add_adapter(setting.name, work.adapter(setting))
    found: dict[str, list[float]] = {name: [] for name in names}
    was_training = model.training
    model.train()
    try:
        for turn in range(ROUNDS + 1):  # the first one warms up
            for name in list(names) if turn % 2 else reversed(list(names)):
                model.set_adapter(name)
                began = time.perf_counter()
                batch_loss(model, tensors).backward()
                found[name].append(time.perf_counter() - began)
                model.zero_grad(set_to_none=True)
    finally:
        model.train(was_training)
        model.unload(pristine=True)
    return {names[name]: statistics.median(times[1:]) for name, times in found.items()}


def planned_tokens(work: Work, settings: Sequence[Setting]) -> float:
    """Tokens that are still to be trained on: less what earlier calls have done."""
    space, total = work.space, 0.0
    done: dict[Setting, int] = {}
    for outcome in work.store.outcomes.values():
        done[outcome.trial.setting] = done.get(outcome.trial.setting, 0) + outcome.steps
    for setting in settings:
        batches = work.batches(setting.rows, work.config.seed)
        steps = planned_steps(space, len(batches))
        total += max(0, steps - done.get(setting, 0)) * batches.tokens() / len(batches)
    return total


def planned_steps(space: Space, steps: int) -> int:
    """Steps of all the runs of a setting."""
    return steps_of_search(len(space.rates), steps) + (space.seeds - 1) * steps


def estimate(work: Work, settings: Sequence[Setting]) -> tuple[float, Cost]:
    """(seconds of the whole sweep, the cost of one run): from a few steps with the largest rank."""
    largest = max(settings, key=lambda s: (s.rows, s.rank))
    model: Any = get_peft_model(work.base.model, work.adapter(largest))
    try:
        cost = measure(model, work.batches(largest.rows, work.config.seed))
    finally:
        model.unload(pristine=True)
    quick, whole = work.scorer.tokens
    rates = len(work.space.rates)
    scored = len(settings) * ((2 * rates * quick if rates > 1 else 0) + (work.space.seeds + 1) * whole)
    forward = 3 * cost.tokens_per_second  # a forward pass is about a third of a step
    return planned_tokens(work, settings) / cost.tokens_per_second + scored / forward, cost
