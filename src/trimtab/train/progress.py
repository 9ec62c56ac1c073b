"""One line on how a run is going: redrawn on a terminal, a plain line now and then elsewhere. Both go to stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trimtab.train.loop import Event

if TYPE_CHECKING:
    from trimtab.train.loop import Run


class Line:
    """The line: how much of the work is done, and how fast.

    Args:
        every: seconds between plain lines.
    """

    def __init__(self, title: str, every: float) -> None:
        self.title, self.every = title, every
        self._bar: Any = None

    def start(self, total: int, done: int, shown: bool = True) -> None:
        """Begin with `done` of the `total` tokens; `shown`: redraw it, where there is a terminal."""
        self.total, self.done = total, done
        self.tokens, self.seconds, self._last = 0, 0.0, time.monotonic()
        if sys.stderr.isatty() and shown:
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar

            console = Console(stderr=True, highlight=False)
            # The line has to fit: what it says takes about 66 columns, the bar what is left.
            bar = BarColumn(bar_width=max(6, min(40, console.width - 70)))
            self._bar = Bar(bar, TextColumn("{task.fields[state]}"), console=console)
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=self.total, completed=self.done, state="")

    def show(self, what: str, tokens: int, seconds: float, model: Any, last: bool) -> None:
        """After so many tokens more, in so many seconds."""
        self.done, self.tokens, self.seconds = self.done + tokens, self.tokens + tokens, self.seconds + seconds
        rate = self.tokens / self.seconds if self.seconds else 0.0
        left = (self.total - self.done) / rate if rate else 0.0
        state = f"{what}  {rate:,.0f} tokens/s  {clock(left)} left  {size(memory(model))}"
        if self._bar:
            self._bar.update(self._task, completed=self.done, state=state)
        elif time.monotonic() - self._last >= self.every or last:
            self._last = time.monotonic()
            print(f"{self.title}  {state}", file=sys.stderr, flush=True)

    def note(self, line: str) -> None:
        """A line that stays."""
        if self._bar:
            self._bar.console.print(line, markup=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def stop(self) -> None:
        """No more of it."""
        if self._bar:
            self._bar.stop()
            self._bar = None


class Progress(Event):
    """Shows step, loss, tokens/s, time left and memory, and evaluations as lines that stay.

    Time left is by tokens, not steps: batches differ in length. The rate is over the work done, without evaluations.
    """

    def __init__(self, title: str = "Training", every: float = 10.0) -> None:
        self.line = Line(title, every)
        self.note = self.line.note

    def begin(self, run: Run) -> None:
        self.line.start(run.batches.tokens(), run.batches.tokens(0, run.step), run.processes.main)

    def step(self, run: Run) -> None:
        if run.processes.main:
            recent = [loss for _, loss in run.result.losses[-10:]]
            what = f"step {run.step}/{len(run.batches)}  loss {sum(recent) / len(recent):.4f}"
            self.line.show(what, run.tokens, run.seconds, run.model, run.last)

    def evaluated(self, run: Run) -> None:
        if run.processes.main:
            self.note(scored(run))

    def close(self, run: Run) -> None:
        self.line.stop()


class JointProgress(Event):
    """The same for jobs that are trained at once: an event of all of them, and a function called after every round.

    Args:
        total, done: tokens of all jobs, and those that are trained already.
    """

    def __init__(self, total: int, done: int, every: float = 10.0) -> None:
        self.line, self.open = Line("Training", every), False
        self.total, self.done = total, done

    def begin(self, run: Run) -> None:
        if not self.open:
            self.open = True
            self.line.start(self.total, self.done)

    def __call__(self, runs: Sequence[Run]) -> None:
        live = [run for run in runs if not (run.last or run.stop)]
        trained = [run for run in runs if not run.result.failed]
        losses = "  ".join(f"{run.adapter} {run.loss:.3f}" for run in runs[:3]) + (" ..." if len(runs) > 3 else "")
        left = max((len(run.batches) - run.step for run in live), default=0)
        what = f"{len(live)} jobs, {left} steps left  loss {losses}"
        tokens, seconds = sum(run.tokens for run in trained), sum(run.seconds for run in trained)
        self.line.show(what, tokens, seconds, runs[0].model, not live)

    def evaluated(self, run: Run) -> None:
        self.line.note(f"{run.adapter}, {scored(run)}")

    def close(self, run: Run) -> None:
        self.line.stop()


def scored(run: Run) -> str:
    """The latest scores in words."""
    step, scores = run.result.scores[-1]
    best = run.result.best and run.result.best[0] == step and len(run.result.scores) > 2
    return f"step {step}: held-out {', '.join(map(_score, scores.items()))}{'  (best so far)' if best else ''}"


def _score(item: tuple[str, float]) -> str:
    name, value = item
    return f"loss {value:.4f}" if name == "loss" else f"{name.replace('_', ' ')} {value:.1%}"


def memory(model: Any) -> int:
    """The most memory that was in use so far, in bytes: the device's, or the process's own on a CPU."""
    import torch

    device = next(model.parameters()).device
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def size(count: float) -> str:
    """1_900_000_000 -> "1.9 GB"."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count:.0f} B"


def clock(seconds: float) -> str:
    """75 -> "1:15"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
