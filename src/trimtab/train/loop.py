"""The training loop: a model, its batches, an optimiser, and events for all the rest.

It trains whatever parameters of the model require a gradient, and knows nothing of adapters, files or screens.
"""

from __future__ import annotations

import contextlib
import math
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.dropout import mixed
from trimtab.core.method import Call
from trimtab.errors import TrainError
from trimtab.layer.head import fuse_loss
from trimtab.shell.locate import locate_graft
from trimtab.train.batches import Batch, Batches
from trimtab.train.loss import batch_loss, loss_of
from trimtab.train.processes import Alone

__all__ = ["Event", "Run", "TrainError", "TrainResult", "loss_of", "train"]


@dataclass
class TrainResult:
    """What has happened so far; a checkpoint holds it. Losses are means over trained tokens, in nats."""

    step: int = 0
    tokens: int = 0  # without padding
    seconds: float = 0.0  # of training, without evaluations
    losses: list[tuple[int, float]] = field(default_factory=list)  # (step, training loss)
    scores: list[tuple[int, dict[str, float]]] = field(default_factory=list)  # (step, scores on held-out rows)
    best: tuple[int, float] | None = None  # (step, score) of the best evaluation so far
    no_better: int = 0  # evaluations since
    stopped: str = ""  # why it ended before its last step
    failed: bool = False  # that was an error, of a job whose companions went on

    @property
    def eval_losses(self) -> list[tuple[int, float]]:
        """(step, held-out loss) of each evaluation."""
        return [(step, scores["loss"]) for step, scores in self.scores]

    @property
    def tokens_per_second(self) -> float:
        """Tokens over the time of training."""
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass
class Run:
    """What events see, and may set."""

    model: nn.Module
    batches: Batches
    optimizer: Any
    result: TrainResult
    events: list[Event]
    processes: Alone
    loss: float = math.nan  # of the step just done, as what follows
    grad_norm: float = math.nan  # before clipping
    learning_rate: float = math.nan  # of the first group of parameters
    tokens: int = 0
    seconds: float = 0.0
    stop: str = ""  # set by an event to end the run after this step: why
    seed: int | None = None  # of the adapters' random numbers
    adapter: str | None = None  # the one that this run trains, where others train beside it; None: all that train

    @property
    def step(self) -> int:
        """Steps done."""
        return self.result.step

    @property
    def last(self) -> bool:
        """Whether the last step is done."""
        return self.step >= len(self.batches)

    def trained(self) -> dict[str, nn.Parameter]:
        """{name: parameter} of what it trains: of its adapter alone, where others train beside it."""
        every, own = self.model.named_parameters(), self.adapter
        return {n: p for n, p in every if p.requires_grad and (own is None or own in n.split("."))}

    def fire(self, name: str) -> None:
        """Call a hook of every event, in their order."""
        for event in self.events:
            getattr(event, name)(self)


class Event:
    """Something that happens along a run. Every hook gets the `Run`; those that are not wanted stay as they are."""

    def begin(self, run: Run) -> None:
        """Before the first step of this process."""

    def before(self, run: Run) -> None:
        """Before a step."""

    def gradients(self, run: Run) -> None:
        """The gradients of a step are there, clipped."""

    def updated(self, run: Run) -> None:
        """The optimiser has used them."""

    def step(self, run: Run) -> None:
        """A step is done."""

    def evaluated(self, run: Run) -> None:
        """There are new scores in `run.result.scores`."""

    def saved(self, run: Run) -> None:
        """A checkpoint is written."""

    def end(self, run: Run) -> None:
        """After the last step, or after the one that an event stopped the run at."""

    def close(self, run: Run) -> None:
        """In any case, also after an error."""


class _Call(Event):
    """A plain function as an event: it is called after every step."""

    def __init__(self, function: Callable[[Run], Any]) -> None:
        self.step = function  # type: ignore[assignment,method-assign]


def train(
    model: nn.Module,
    batches: Batches,
    optimizer: Any,
    events: Iterable[Event | Callable[[Run], Any]] = (),
    *,
    result: TrainResult | None = None,
    max_grad_norm: float = 1.0,
    processes: Alone | None = None,
    seed: int | None = None,
) -> TrainResult:
    """Train the model's trainable parameters, step by step, from where `result` is.

    Every trained token of a step counts the same, whatever batch and process it is in.

    Args:
        events: objects with the hooks of `Event`, or functions that are called with the `Run` after every step.
        result: of an earlier part of the run; it goes on there.
        max_grad_norm: what gradients are clipped to; 0: not at all.
        seed: the adapters' dropout is a function of it, the step and the batch; None: of torch's own generator.

    Raises:
        TrainError: nothing is trainable, or the loss or the gradient is not finite; the rows are named.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    if not parameters:
        raise TrainError("No parameter of the model requires a gradient: there is nothing to train.")
    known = [e if isinstance(e, Event) else _Call(e) for e in events]
    run = Run(model, batches, optimizer, result or TrainResult(), known, processes or Alone(), seed=seed)
    run.result.stopped = ""
    was_training = model.training
    model.train()
    fused = fuse_loss(model)
    try:
        run.fire("begin")
        while not run.last and not run.stop:
            _step(run, parameters, max_grad_norm)
            run.fire("step")
        run.result.stopped = run.stop
        run.fire("end")
    finally:
        if fused is not None:
            fused.remove()
        run.fire("close")
        model.train(was_training)
    return run.result


def _step(run: Run, parameters: Sequence[nn.Parameter], max_grad_norm: float) -> None:
    """One step of the optimiser."""
    began = time.perf_counter()
    batches = run.batches[run.step]
    run.fire("before")
    run.learning_rate = run.optimizer.param_groups[0]["lr"]
    run.loss = _gradients(run, batches)
    if not math.isfinite(run.loss):
        raise TrainError(not_finite(run, batches, f"The loss is {run.loss}"))
    run.grad_norm = run.processes.clip(parameters, max_grad_norm)
    if not math.isfinite(run.grad_norm):
        raise TrainError(not_finite(run, batches, f"The loss is {run.loss:.4f}, but its gradient {run.grad_norm}"))
    run.fire("gradients")
    run.optimizer.step()
    run.fire("updated")
    run.optimizer.zero_grad(set_to_none=True)
    run.tokens, run.seconds = sum(b.tokens for b in batches), time.perf_counter() - began
    result = run.result
    result.step, result.tokens, result.seconds = run.step + 1, result.tokens + run.tokens, result.seconds + run.seconds
    result.losses.append((result.step, run.loss))


def _gradients(run: Run, batches: Sequence[Batch]) -> float:
    """Backward through the batches of a step; returns the step's loss."""
    trained = sum(b.trained for b in batches)
    mine = run.processes.share(batches)
    losses: list[Tensor] = []
    for i, (batch, counts) in enumerate(mine):
        last = i == len(mine) - 1
        with run.processes.forward_context(run.model, last), _seeded(run, batch):
            loss = batch_loss(run.model, run.batches.tensors(batch)) * (counts * batch.trained / trained)
            run.processes.backward(loss, run.model, last)
        losses.append(loss.detach())
    return run.processes.sum(torch.stack(losses).sum())


def call_of(run: Run, batch: Batch) -> Call:
    """What the formulas of a run's adapter are handed in the forward of a batch of the step at hand.

    Random numbers do not follow from the adapter's name: a job's is another than that of a run by itself.
    """
    seed = None if run.seed is None else mixed(run.seed, zlib.crc32(repr((run.step, batch.rows)).encode()))
    return Call(seed=seed, name="")


def _seeded(run: Run, batch: Batch) -> contextlib.AbstractContextManager[None]:
    """Around a forward: its random numbers are those of the run's seed, where it has one."""
    model = run.processes.unwrap(run.model)
    if run.seed is None or not getattr(model, "peft_config", None):
        return contextlib.nullcontext()
    board, call = locate_graft(model)[0].board, call_of(run, batch)
    stacked = len(board.route_here(quiet=True).active) > 1  # each has masks of its own
    return board.using(call=replace(call, name=None) if stacked else call)


@torch.no_grad()
def not_finite(run: Run, batches: Sequence[Batch], what: str) -> str:
    """A message that names the rows at fault: those whose loss is not finite alone, or else all of the step's."""
    rows = sorted(i for batch in batches for i in batch.rows)
    run.model.eval()
    bad = [
        i for i in rows if not math.isfinite(float(batch_loss(run.model, run.batches.tensors(run.batches.batch([i])))))
    ]
    names = [run.batches.name(i) for i in bad or rows]
    shown = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
    where = f"{what} at step {run.step + 1}."
    lower = f" Or else the learning rate, {run.learning_rate:.2g} here, is too high." if run.step else ""
    if bad and len(bad) < len(rows):
        others = len(rows) - len(bad)
        return f"{where} So it is for these rows alone, and not for the {others} others of the step: {shown}.{lower}"
    if not run.step:
        return f"{where} So it is before anything was trained, on {shown}: look at the base model and these rows."
    return f"{where} The step's rows: {shown}.{lower}"
