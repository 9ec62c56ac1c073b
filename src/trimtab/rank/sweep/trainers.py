"""What trains the runs of a sweep: all at once, or one after the other, which is what the former is measured by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from trimtab.errors import TrainError
from trimtab.graft.graft import find_graft
from trimtab.shell.tasks import get_peft_model
from trimtab.train.events import Schedule
from trimtab.train.loop import TrainResult, train
from trimtab.train.many import Job, train_many

__all__ = ["Job", "train_serially", "train_together"]


def train_together(base: Any, jobs: Sequence[Job]) -> dict[str, TrainResult]:
    """Train jobs at once; the base is afterwards as it was."""
    try:
        return train_many(base, jobs)
    finally:
        graft = find_graft(base)
        if graft is not None:
            graft.unload(pristine=True)


def train_serially(base: Any, jobs: Sequence[Job]) -> dict[str, TrainResult]:
    """The same, one by one, by the plain trainer."""
    results: dict[str, TrainResult] = {}
    for job in jobs:
        torch.manual_seed(job.seed)
        model = get_peft_model(base, job.config, adapter_name=job.name)
        own = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(own, lr=job.learning_rate, weight_decay=job.weight_decay)
        result = results[job.name] = TrainResult()
        events = [Schedule(job.schedule, job.warmup_steps), *job.events]
        try:
            train(model, job.batches, optimizer, events, result=result, max_grad_norm=job.max_grad_norm, seed=job.seed)
        except TrainError as e:
            result.stopped, result.failed = str(e), True
        finally:
            model.unload(pristine=True)
    return results
