"""How far a sweep is, and the time that is left: a line on stderr, redrawn on a terminal."""

from __future__ import annotations

import sys
import time
from typing import Any

from trimtab.train.progress import clock


class Clock:
    """Counts the tokens that are trained on, of all that are planned.

    The time left is that of the work left at the speed so far, scoring included.

    Args:
        total: tokens that are planned.
        every: seconds between lines where there is no terminal.
    """

    def __init__(self, total: float, every: float = 10.0) -> None:
        self.total, self.every, self.done, self.over, self.running = max(1.0, total), every, 0.0, 0, 0
        self._began = self._last = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> Clock:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            columns = (BarColumn(bar_width=30), TextColumn("{task.fields[state]}"))
            self._bar = Progress(*columns, console=Console(stderr=True, highlight=False))
            self._bar.start()
            self._task = self._bar.add_task("Sweep", total=self.total, state="")
        return self

    def __exit__(self, *error: Any) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None

    def advance(self, tokens: int) -> None:
        """So many more are done."""
        self.done += tokens
        share = min(1.0, self.done / self.total)
        now = time.monotonic()
        left = (now - self._began) * (1 - share) / share if share else 0.0
        state = f"{share:.0%}  {self.running} runs in training, {self.over} over  {clock(left)} left"
        if self._bar:
            self._bar.update(self._task, completed=self.done, state=state)
        elif now - self._last >= self.every:
            self._last = now
            print(f"Sweep  {state}", file=sys.stderr, flush=True)

    def note(self, line: str) -> None:
        """A line that stays."""
        if self._bar:
            self._bar.console.print(line, markup=False)
        else:
            print(line, file=sys.stderr, flush=True)
