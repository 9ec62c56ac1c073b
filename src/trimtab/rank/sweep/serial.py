"""The runs of a sweep one after the other, by the plain trainer: what training them at once is measured by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trimtab.errors import TrainError
from trimtab.shell.tasks import get_peft_model
from trimtab.train.batches import Batches
from trimtab.train.events import MethodSteps, Schedule
from trimtab.train.loop import Event, TrainResult, train


@dataclass
class Job:
    """One run (until `trimtab.train.many` is here)."""

    name: str
    config: Any
    batches: Batches
    learning_rate: float
    events: Sequence[Event] = ()
    schedule: str = "linear"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0


def train_serially(base: Any, jobs: Sequence[Job]) -> dict[str, TrainResult]:
    """Train jobs of `trimtab.train.many` one by one; a job that fails has the reason in its result's `stopped`."""
    results: dict[str, TrainResult] = {}
    for job in jobs:
        torch.manual_seed(job.seed)
        model = get_peft_model(base, job.config, adapter_name=job.name)
        own = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(own, lr=job.learning_rate, weight_decay=job.weight_decay)
        result = results[job.name] = TrainResult()
        events = [Schedule(job.schedule, job.warmup_steps), MethodSteps(), *job.events]
        try:
            train(model, job.batches, optimizer, events, result=result, max_grad_norm=job.max_grad_norm)
        except TrainError as e:
            result.stopped = str(e)
        finally:
            model.unload(pristine=True)
    return results
