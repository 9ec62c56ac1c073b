"""What happens along a run: schedule, evaluation, early stopping, Ctrl-C, the check of step 1, metrics, trackers."""

from __future__ import annotations

import json
import math
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trimtab.core.extras import need
from trimtab.core.io import write_whole
from trimtab.errors import TrainError
from trimtab.train.checkpoint import writing
from trimtab.train.loop import Event, Run

__all__ = [
    "EarlyStopping", "Evaluate", "Interrupt", "MethodSteps", "Metrics", "Schedule", "StepOne", "Trackers",
    "learning_rate_factor",
]  # fmt: skip


def learning_rate_factor(step: int, total: int, name: str, warmup: int) -> float:
    """The learning rate's factor for 0-based `step`: up over the warm-up, then down to nearly 0 (or not at all)."""
    if step < warmup:
        return (step + 1) / warmup
    left = (total - step) / max(1, total - warmup)  # 1 ... just above 0
    return {"linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left), "constant": 1.0}[name]


class Schedule(Event):
    """Sets the learning rate of every group of parameters before each step.

    Args:
        name: linear, cosine or constant.
        warmup: steps in which the rate rises.
    """

    def __init__(self, name: str = "linear", warmup: int = 0) -> None:
        self.name, self.warmup = name, warmup

    def begin(self, run: Run) -> None:
        for group in run.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])

    def before(self, run: Run) -> None:
        factor = learning_rate_factor(run.step, len(run.batches), self.name, self.warmup)
        for group in run.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor


class MethodSteps(Event):
    """Tells adapters that a step is done, while its gradients are there: rank schedules (AdaLoRA) act on it."""

    def updated(self, run: Run) -> None:
        run.processes.unwrap(run.model).update_and_allocate(run.step + 1)


class StepOne(Event):
    """After the first step's backward pass: says which trainable tensors got no gradient."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say, self.done = say, False

    def gradients(self, run: Run) -> None:
        if self.done:
            return
        self.done = True
        trained = run.trained()
        without = [n for n, p in trained.items() if p.grad is None]
        if len(without) == len(trained) or run.grad_norm == 0:
            raise TrainError("No trainable tensor got a gradient in the first step: nothing would be learned.")
        if without:
            shown = ", ".join(without[:5]) + (f" and {len(without) - 5} more" if len(without) > 5 else "")
            self.say(f"{len(without)} of {len(trained)} trainable tensors got no gradient in step 1: {shown}")


class Evaluate(Event):
    """Scores the model on held-out rows: before the first step, every so many steps, and after the last.

    Args:
        score: the model's scores, "loss" among them.
        every: steps; 0: after each epoch; -1: only at both ends.
        best_by: which score decides what is best; a loss is better when lower, all others when higher.
    """

    def __init__(self, score: Callable[[Any], dict[str, float]], every: int = 0, best_by: str = "loss") -> None:
        self.score, self.every, self.best_by = score, every, best_by

    def due(self, run: Run) -> bool:
        """Whether the step just done is one to evaluate after."""
        if run.last or run.step == 0:
            return True
        return run.step % self.every == 0 if self.every > 0 else self.every == 0 and run.batches.ends_epoch(run.step)

    def begin(self, run: Run) -> None:
        scores = run.result.scores
        if self.due(run) and not (scores and scores[-1][0] == run.step):  # a run may have been stopped just before
            self._evaluate(run)

    def step(self, run: Run) -> None:
        if self.due(run) and not run.stop:
            self._evaluate(run)

    def _evaluate(self, run: Run) -> None:
        result = run.result
        scores = self.score(run.model)
        result.scores.append((run.step, scores))
        score = scores[self.best_by]
        better = result.best is None or (score < result.best[1] if self.best_by == "loss" else score > result.best[1])
        if better and run.step:  # the untrained model is no checkpoint
            result.best = (run.step, score)
        result.no_better = 0 if better else result.no_better + 1
        run.fire("evaluated")


class EarlyStopping(Event):
    """Ends the run after `patience` evaluations in a row that were no better than the best."""

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def begin(self, run: Run) -> None:
        if run.step:  # resumed, perhaps from where it was stopped
            self.evaluated(run)

    def evaluated(self, run: Run) -> None:
        if run.result.no_better >= self.patience and not run.last:
            best = f", step {run.result.best[0]}" if run.result.best else ""
            run.stop = f"{run.result.no_better} evaluations were no better than the best{best}"


class Interrupt(Event):
    """The first Ctrl-C (or SIGTERM) ends the run after the step at hand; the second one ends it at once."""

    REASON = "interrupted"

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.asked = threading.Event()
        self.before_: dict[int, Any] = {}

    def begin(self, run: Run) -> None:
        if self.before_:  # jobs that are trained at once have one in common
            return
        if threading.current_thread() is threading.main_thread():  # only it may set handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before_[number] = signal.signal(number, self._first)

    def _first(self, number: int, frame: Any) -> None:
        self.asked.set()
        self._restore()
        self.say("Stopping after this step. Once more stops at once.")

    def step(self, run: Run) -> None:
        if run.processes.any(self.asked.is_set()):
            run.stop = self.REASON

    def close(self, run: Run) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self.before_.items():
            signal.signal(number, handler)
        self.before_ = {}


class Metrics(Event):
    """One JSON object a line: each step and each evaluation. A resumed run goes on after its checkpoint's line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self, run: Run) -> None:
        if not run.processes.main:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True) if self.path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= run.step]
        text = "".join(kept) if run.step else ""

        def write(path: Path) -> None:
            path.write_text(text, encoding="utf-8")

        write_whole({self.path: write})

    def step(self, run: Run) -> None:
        self._write(run, **step_metrics(run))

    def evaluated(self, run: Run) -> None:
        self._write(run, **evaluation_metrics(run))

    def _write(self, run: Run, **metrics: float) -> None:
        if run.processes.main:
            line = json.dumps({"step": run.step, "epoch": round(run.batches.epoch(run.step), 4), **metrics})
            with writing(str(self.path), self.path.parent), self.path.open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")


def step_metrics(run: Run) -> dict[str, float]:
    """What is worth keeping of a step."""
    return {
        "loss": run.loss,
        "learning_rate": run.learning_rate,
        "grad_norm": run.grad_norm,
        "tokens": run.tokens,
        "tokens_per_second": round(run.tokens / run.seconds, 1),
    }


def evaluation_metrics(run: Run) -> dict[str, float]:
    """The latest scores."""
    return {f"eval_{name}": value for name, value in run.result.scores[-1][1].items()}


class Trackers(Event):
    """Hands the metrics to trackers, through accelerate's classes for them.

    Args:
        names: trackio, wandb, tensorboard ..., or objects of accelerate's `GeneralTracker`.
        folder: where those that write files write them.
        project: what the run is called there.

    Raises:
        TrainError: one that accelerate does not know, or that is not installed.
        MissingPackageError: accelerate, whose trackers they are, is not installed.
    """

    def __init__(self, names: Sequence[Any], folder: Path, project: str, settings: dict[str, Any]) -> None:
        need("`report_to`", "accelerate")
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

        known = {str(getattr(name, "value", name)): cls for name, cls in LOGGER_TYPE_TO_CLASS.items()}
        there = {str(getattr(name, "value", name)) for name in get_available_trackers()}
        faults = [n for n in names if isinstance(n, str) and n not in there]
        if faults:
            raise TrainError(
                "; ".join(
                    f"report_to: {n} is not installed: pip install {n}" if n in known
                    else f"report_to: {n} is unknown; accelerate knows {', '.join(sorted(known))}" for n in faults
                ) + "."
            )  # fmt: skip
        self.classes = [known[n] if isinstance(n, str) else n for n in names]
        self.state, self.folder, self.project, self.settings = PartialState, folder, project, settings
        self.trackers: list[Any] = []

    def begin(self, run: Run) -> None:
        if not run.processes.main:
            return
        self.state()  # accelerate's trackers write log lines, for which it must know the processes
        for cls in self.classes:
            place = {"logging_dir": self.folder} if getattr(cls, "requires_logging_directory", False) else {}
            tracker = cls(self.project, **place) if isinstance(cls, type) else cls
            if hasattr(tracker, "start"):
                tracker.start()
            plain = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in self.settings.items()}
            tracker.store_init_configuration(plain)
            self.trackers.append(tracker)

    def step(self, run: Run) -> None:
        self._log(run, {f"train/{k}": v for k, v in step_metrics(run).items()})

    def evaluated(self, run: Run) -> None:
        self._log(run, {f"eval/{k}": v for k, v in run.result.scores[-1][1].items()})

    def _log(self, run: Run, values: dict[str, float]) -> None:
        for tracker in self.trackers:
            tracker.log(values, step=run.step)

    def close(self, run: Run) -> None:
        for tracker in self.trackers:
            tracker.finish()
