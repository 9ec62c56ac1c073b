"""One line on how a run is going: redrawn on a terminal, a plain line now and then elsewhere. Both go to stderr."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from trimtab.train.loop import Event

if TYPE_CHECKING:
    from trimtab.train.loop import Run


class Progress(Event):
    """Shows step, loss, tokens/s, time left and memory, and evaluations as lines that stay.

    Time left is by tokens, not steps: batches differ in length. The rate is over the work done, without evaluations.
    """

    def __init__(self, title: str = "Training", every: float = 10.0) -> None:
        self.title, self.every = title, every  # `every`: seconds between plain lines
        self._bar: Any = None

    def begin(self, run: Run) -> None:
        self.total, self.done = run.batches.tokens(), run.batches.tokens(0, run.step)
        self.tokens, self.seconds, self._last = 0, 0.0, time.monotonic()
        if sys.stderr.isatty() and run.processes.main:
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar

            console = Console(stderr=True, highlight=False)
            # The line has to fit: what it says takes about 66 columns, the bar what is left.
            bar = BarColumn(bar_width=max(6, min(40, console.width - 70)))
            self._bar = Bar(bar, TextColumn("{task.fields[state]}"), console=console)
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=self.total, completed=self.done, state="")

    def step(self, run: Run) -> None:
        if not run.processes.main:
            return
        self.done, self.tokens, self.seconds = (
            self.done + run.tokens,
            self.tokens + run.tokens,
            self.seconds + run.seconds,
        )
        rate = self.tokens / self.seconds if self.seconds else 0.0
        left = (self.total - self.done) / rate if rate else 0.0
        recent = [loss for _, loss in run.result.losses[-10:]]
        state = (
            f"step {run.step}/{len(run.batches)}  loss {sum(recent) / len(recent):.4f}  {rate:,.0f} tokens/s  "
            f"{clock(left)} left  {size(memory(run.model))}"
        )
        if self._bar:
            self._bar.update(self._task, completed=self.done, state=state)
        elif time.monotonic() - self._last >= self.every or run.last:
            self._last = time.monotonic()
            print(f"{self.title}  {state}", file=sys.stderr, flush=True)

    def evaluated(self, run: Run) -> None:
        step, scores = run.result.scores[-1]
        best = (
            "  (best so far)" if run.result.best and run.result.best[0] == step and len(run.result.scores) > 2 else ""
        )
        if run.processes.main:
            self.note(f"step {step}: held-out {', '.join(map(_score, scores.items()))}{best}")

    def note(self, line: str) -> None:
        """A line that stays."""
        if self._bar:
            self._bar.console.print(line, markup=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self, run: Run) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None


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
