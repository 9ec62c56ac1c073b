"""Many adapters trained at once over one frozen base: shared forward passes, and all else a run each.

Every run is what it would be alone: its rows, losses, clipping, optimiser, schedule, events and random numbers.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from trimtab.core.config import PeftConfig
from trimtab.errors import ConfigError, PeftError, TrainError
from trimtab.layer.head import fuse_loss
from trimtab.methods import method_class
from trimtab.shell.peft_model import PeftModel
from trimtab.shell.tasks import get_peft_model
from trimtab.train.batches import Batches
from trimtab.train.events import Schedule
from trimtab.train.loop import Event, Run, TrainResult, not_finite
from trimtab.train.processes import Alone, require_one
from trimtab.train.shared import Part, fixed_cost, losses, passes

__all__ = ["Job", "Results", "check_jobs", "train_many"]

TOKENS = 2048  # of a pass; more is no faster on processors, and takes memory


@dataclass
class Job:
    """One of the adapters that are trained at once.

    Attributes:
        name: the adapter's name in the model.
        config: of any method that mixed batches serve with gradients; without trained biases.
        batches: its rows, in the order of its own seed.
        learning_rate: the peak of its schedule ("linear", "cosine", "constant"), after `warmup_steps`.
        max_grad_norm: what its gradients are clipped to; 0: not at all.
        seed: of its start and its dropout.
        events: what happens along it; `run.model` is the model with this adapter active, and `run.stop` ends this job.
        result: of an earlier part of the run; it goes on there.
        restore: gives the optimiser the state it had then: called with (model, optimizer, processes).
        optimizer: makes its optimiser of its parameters; AdamW by default.
    """

    name: str
    config: PeftConfig
    batches: Batches
    learning_rate: float
    schedule: str = "linear"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0
    events: Sequence[Event] = ()
    result: TrainResult = field(default_factory=TrainResult)
    restore: Callable[[Any, Any, Any], None] | None = None
    optimizer: Callable[[list[nn.Parameter]], Any] | None = None


class Results(dict[str, TrainResult]):
    """{job: what became of it}; `stopped` says why one ended early, `failed` whether by an error.

    Attributes:
        model: the PeftModel that holds all the adapters.
    """

    model: PeftModel


def train_many(
    model: Any,
    jobs: Sequence[Job],
    *,
    tokens: int = TOKENS,
    events: Sequence[Callable[[Sequence[Run]], Any]] = (),
) -> Results:
    """Train an adapter for each job, all over one base model, in shared forward passes.

    In every round each job does its next step. Jobs end by themselves: after their last step, stopped by an event, or
    because their loss is not finite (`stopped` says so); the others go on as if nothing had been.

    Args:
        model: the base model, or a PeftModel of it; adapters it has under a job's name are trained further.
        tokens: of a forward pass, padding included; a batch of one job is never divided.
        events: functions that are called with the runs of a round when it is done.

    Raises:
        ConfigError: two jobs of one name, or adapters that cannot share a batch.
        TrainError: a launcher has started several processes.
    """
    require_one("Training many adapters at once")
    check_jobs(jobs)
    model = _with_adapters(model, jobs)
    shared = _Shared(model, tokens)
    with shared.open(jobs) as runs:
        live = [run for run in runs if shared.begin(run)]
        while live:
            shared.round(live)
            for event in events:
                event(live)
            live = [run for run in live if shared.goes_on(run)]
    results = Results({run.job.name: run.result for run in runs})
    results.model = model
    return results


def check_jobs(jobs: Sequence[Job]) -> None:
    """Raise `ConfigError` where jobs cannot be trained at once: all reasons."""
    names = [job.name for job in jobs]
    faults = [f"two jobs are called '{name}'" for name in dict.fromkeys(names) if names.count(name) > 1]
    for job in jobs:
        if job.config.is_prompt_learning:
            faults.append(f"'{job.name}' is a prompt, which cannot share a batch")
        elif getattr(job.config, "bias", "none") != "none":
            faults.append(f"'{job.name}' trains the base's biases (bias={job.config.bias!r}), which all rows share")  # type: ignore[attr-defined]
    taking: dict[str, list[str]] = {}  # of the same targets: what takes a layer's weight over, takes it from all others
    for job in jobs:
        if method_class(job.config).mutates(job.config):
            taking.setdefault(repr(getattr(job.config, "target_modules", None)), []).append(f"'{job.name}'")
    faults += [
        f"{' and '.join(takers)} start by changing the base's weights: each needs a base of its own"
        for takers in taking.values()
        if len(takers) > 1
    ]
    if not jobs:
        faults.append("there are no jobs")
    if faults:
        raise ConfigError(f"These jobs cannot be trained at once: {'; '.join(faults)}.")


def _with_adapters(model: Any, jobs: Sequence[Job]) -> PeftModel:
    """The model with an adapter for each job, each started as it would be alone."""
    parts = {part for path, _ in model.named_parameters() for part in path.split(".")} - {*_adapters_of(model)}
    if taken := [job.name for job in jobs if job.name in parts]:
        raise ConfigError(f"Parts of the model have these names, which no job can have then: {', '.join(taken)}.")
    for job in jobs:
        torch.manual_seed(job.seed)
        if not isinstance(model, PeftModel):
            model = get_peft_model(model, job.config, adapter_name=job.name)
        elif job.name not in model.peft_config:
            model.add_adapter(job.name, job.config)
    assert isinstance(model, PeftModel)
    return model


def _adapters_of(model: Any) -> dict[str, Any]:
    """{name: config} of the adapters that a model has."""
    return model.peft_config if isinstance(model, PeftModel) else {}


def _adamw(job: Job) -> Callable[[list[nn.Parameter]], Any]:
    """AdamW in one call for all tensors of a job: a quarter of the time of a call each, which K jobs have K times."""

    def make(own: list[nn.Parameter]) -> Any:
        fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in own)
        return torch.optim.AdamW(own, job.learning_rate, weight_decay=job.weight_decay, fused=fused)

    return make


@dataclass
class JobRun(Run):
    """The run of one job."""

    job: Any = None
    parameters: list[nn.Parameter] = field(default_factory=list)

    @property
    def live(self) -> bool:
        """Whether there is anything left to do."""
        return not (self.last or self.stop)


class _Shared:
    """The model that the runs share, and what they do with it together."""

    def __init__(self, model: PeftModel, tokens: int) -> None:
        self.model, self.tokens, self.fixed = model, tokens, fixed_cost(model)
        self.fused: Any = None

    @contextlib.contextmanager
    def open(self, jobs: Sequence[Job]) -> Iterator[list[JobRun]]:
        """The runs; the model is in training mode, and just their adapters are trained."""
        model, graft = self.model, self.model.graft
        active, training = graft.board.route.active, model.training
        others = [n for n, a in graft.adapters.items() if a.trainable and n not in {job.name for job in jobs}]
        for name in others:
            graft.set_trainable(name, False)
        for job in jobs:
            graft.set_trainable(job.name, True)
        runs = [self._run(job) for job in jobs]
        model.train()
        self.fused = fuse_loss(model)
        try:
            yield runs
        finally:
            if self.fused is not None:
                self.fused.remove()
            for run in runs:
                with self._as(run):
                    run.fire("close")
            for name in others:
                graft.set_trainable(name, True)
            graft.set_active(active, trainable=None)
            model.train(training)

    def _run(self, job: Job) -> JobRun:
        known = [Schedule(job.schedule, job.warmup_steps), *job.events]
        more: dict[str, Any] = {"seed": job.seed, "adapter": job.name, "job": job}
        run = JobRun(self.model, job.batches, None, job.result, known, Alone(), **more)
        run.parameters = list(run.trained().values())
        if not run.parameters:
            raise TrainError(f"No parameter of '{job.name}' requires a gradient: there is nothing to train.")
        run.optimizer = (job.optimizer or _adamw(job))(run.parameters)
        if job.restore is not None:
            job.restore(self.model, run.optimizer, run.processes)
        job.result.stopped, job.result.failed = "", False
        return run

    @contextlib.contextmanager
    def _as(self, run: JobRun) -> Iterator[None]:
        """Inside the block the model is the run's: its adapter alone is active. An error of the run ends it alone."""
        if any(not isinstance(event, Schedule) for event in run.events):
            self.model.graft.set_active([run.job.name], trainable=None)
        try:
            yield
        except PeftError as e:
            run.stop = run.result.stopped = str(e)
            run.result.failed = True

    def begin(self, run: JobRun) -> bool:
        """Start a run; whether there is anything left to do in it."""
        with self._as(run):
            run.fire("begin")
        return self.goes_on(run)

    def goes_on(self, run: JobRun) -> bool:
        """Whether a run goes on; its end, if it does not."""
        if run.live:
            return True
        run.result.stopped = run.stop
        if not run.result.failed:
            with self._as(run):
                run.fire("end")
        return False

    def round(self, runs: Sequence[JobRun]) -> None:
        """The next step of every run."""
        began = time.perf_counter()
        steps = {id(run): run.batches[run.step] for run in runs}
        for run in runs:
            with self._as(run):
                run.fire("before")
            run.learning_rate = run.optimizer.param_groups[0]["lr"]
            run.loss, run.tokens = 0.0, sum(b.tokens for b in steps[id(run)])
        for nth in range(max(map(len, steps.values()))):
            self._pass([(run, batches, nth) for run in runs if nth < len(batches := steps[id(run)])])
        for run in runs:
            with self._as(run):
                self._update(run, steps[id(run)])
        spent, tokens = time.perf_counter() - began, sum(run.tokens for run in runs)
        for run in runs:
            if not run.result.failed:
                self._done(run, spent * run.tokens / tokens)

    def _pass(self, work: Sequence[tuple[JobRun, Any, int]]) -> None:
        """Forward and backward of the nth batch of the step of each run."""
        every = [Part.of(run, batches[n], sum(b.trained for b in batches)) for run, batches, n in work]
        for parts in passes(every, self.tokens, self.fixed):
            found = losses(self.model, parts, self.fused)
            if terms := self.model.tuner.penalties([part.adapter for part in parts]):
                none = found.new_zeros(())
                found = found + torch.stack([terms.get(part.adapter, none).to(found) for part in parts])
            shares = found.new_tensor([part.share for part in parts])
            (found * shares).sum().backward()
            for part, loss in zip(parts, (found.detach() * shares).tolist(), strict=True):
                part.run.loss += loss

    def _update(self, run: JobRun, batches: Any) -> None:
        """The run's own part of a step."""
        try:
            if not math.isfinite(run.loss):
                raise TrainError(self._fault(run, batches, f"The loss is {run.loss}"))
            run.grad_norm = run.processes.clip(run.parameters, run.job.max_grad_norm)
            if not math.isfinite(run.grad_norm):
                found = f"The loss is {run.loss:.4f}, but its gradient {run.grad_norm}"
                raise TrainError(self._fault(run, batches, found))
            run.fire("gradients")
            run.optimizer.step()
            run.fire("updated")
        finally:
            run.optimizer.zero_grad(set_to_none=True)

    def _fault(self, run: JobRun, batches: Any, what: str) -> str:
        self.model.graft.set_active([run.job.name], trainable=None)
        try:
            return not_finite(run, batches, what)
        finally:
            self.model.train()

    def _done(self, run: JobRun, seconds: float) -> None:
        result, run.seconds = run.result, seconds
        result.step, result.tokens, result.seconds = run.step + 1, result.tokens + run.tokens, result.seconds + seconds
        result.losses.append((result.step, run.loss))
        with self._as(run):
            run.fire("step")
