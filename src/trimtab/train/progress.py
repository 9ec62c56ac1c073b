"""A progress bar on a terminal, a plain line now and then elsewhere. Both go to stderr."""

from __future__ import annotations

import sys
import time
from typing import Any


class Progress:
    """Shows step, loss, tokens/s and time left.

    Time left is by tokens, not steps: batches differ in length. The rate is over the work done, without evaluations.
    """

    def __init__(self, title: str = "Training", every: float = 10.0) -> None:
        self.title, self.every = title, every  # `every`: seconds between plain lines
        self._bar: Any = None

    def start(self, total: int, done: int = 0) -> None:
        """`total` tokens are to be done in all, `done` of them before this run."""
        self.total, self.done, self.began = total, done, done
        self.seconds, self._last = 0.0, time.monotonic()
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TaskProgressColumn, TextColumn
            from rich.progress import Progress as Bar

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[state]}"),
            )
            self._bar = Bar(*columns, console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=total, completed=done, state="")

    def step(self, tokens: int, where: str, loss: float, seconds: float) -> None:
        """`tokens` more are done, in `seconds`; `where` says which step that was."""
        self.done, self.seconds = self.done + tokens, self.seconds + seconds
        rate = (self.done - self.began) / self.seconds if self.seconds else 0.0
        left = (self.total - self.done) / rate if rate else 0.0
        state = f"{where}  loss {loss:.4f}  {rate:,.0f} tokens/s  {clock(left)} left"
        if self._bar:
            self._bar.update(self._task, completed=self.done, state=state)
        elif time.monotonic() - self._last >= self.every or self.done >= self.total:
            self._last = time.monotonic()
            print(f"{self.title}  {state}", file=sys.stderr, flush=True)

    def note(self, line: str) -> None:
        """A line that stays."""
        if self._bar:
            self._bar.console.print(line, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None


def clock(seconds: float) -> str:
    """75 -> "1:15"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
