"""The runs of a sweep in turns: a step of each, over one base model, so that a run can be ended by what others say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from trimtab.errors import TrainError
from trimtab.layer.head import fuse_loss
from trimtab.rank.sweep.score import alone
from trimtab.rank.sweep.serial import Job
from trimtab.shell.tasks import get_peft_model
from trimtab.train.events import MethodSteps, Schedule
from trimtab.train.loop import Run, TrainResult, take_step
from trimtab.train.processes import Alone


def train_in_turns(base: Any, jobs: Sequence[Job]) -> dict[str, TrainResult]:
    """Train jobs step by step in turns; one that fails has the reason in its result's `stopped`."""
    model: Any = None
    for job in jobs:
        torch.manual_seed(job.seed)
        if model is None:
            model = get_peft_model(base, job.config, adapter_name=job.name)
        else:
            model.add_adapter(job.name, job.config)
    # All of them, so that none is put away while its optimiser holds its tensors; each step is of one alone.
    model.set_adapter([job.name for job in jobs])
    model.train()
    fused = fuse_loss(model)
    left = runs = [(job, _run(model, job)) for job in jobs]
    try:
        while left:
            left = [(job, run) for job, run in left if _turn(job, run)]
    finally:
        if fused is not None:
            fused.remove()
        model.unload(pristine=True)
    return {job.name: run.result for job, run in runs}


def _run(model: Any, job: Job) -> Run:
    own = [p for name, p in model.named_parameters() if job.name in name.split(".") and p.requires_grad]
    optimizer = torch.optim.AdamW(own, lr=job.learning_rate, weight_decay=job.weight_decay)
    events = [Schedule(job.schedule, job.warmup_steps), MethodSteps(), *job.events]
    return Run(model, job.batches, optimizer, TrainResult(), events, Alone())


def _turn(job: Job, run: Run) -> bool:
    """One step of a run; whether there is more to come."""
    run.model.train()
    try:
        if not run.step:
            run.fire("begin")
        with alone(run.model, job.name):
            take_step(run, run.optimizer.param_groups[0]["params"], job.max_grad_norm)
        run.fire("step")
        if not run.last and not run.stop:
            return True
        run.result.stopped = run.stop
        run.fire("end")
    except TrainError as e:
        run.result.stopped = str(e)
    run.fire("close")
    return False
