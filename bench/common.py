"""What the benchmarks share: interleaved timing, tables."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence


def once(run: Callable[[], object]) -> float:
    """Processor seconds of one call: unlike the clock's, they do not count what other processes take."""
    start = time.process_time()
    run()
    return time.process_time() - start


def interleaved(arms: dict[str, Callable[[], float]], blocks: int) -> dict[str, list[float]]:
    """Seconds of each arm, taken in turns there and back (ABBA), so that a slow spell of the machine hits all alike."""
    found: dict[str, list[float]] = {name: [] for name in arms}
    for block in range(blocks):
        for name in list(arms) if block % 2 == 0 else reversed(list(arms)):
            found[name].append(arms[name]())
    return found


def median_ms(seconds: Sequence[float]) -> float:
    """The median in milliseconds."""
    return 1000 * statistics.median(seconds)
