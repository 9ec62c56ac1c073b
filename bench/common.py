"""What the benchmarks share: interleaved timing, tables."""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

clock = time.process_time  # unlike the clock's, processor seconds do not count what other processes take


def once(run: Callable[[], object]) -> float:
    """Seconds of one call, by `clock`: processor seconds."""
    start = clock()
    run()
    return clock() - start


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


def clocks(run: Callable[[], object]) -> tuple[float, float]:
    """(seconds by the wall clock, processor seconds) of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def ratio(found: Sequence[float], base: Sequence[float], draws: int = 2000) -> tuple[float, float, float]:
    """The ratio of medians and its 95 % interval, by drawing blocks anew: (ratio, low, high)."""
    rng, n = random.Random(0), len(found)
    drawn = []
    for _ in range(draws):
        blocks = [rng.randrange(n) for _ in range(n)]
        drawn.append(statistics.median(found[b] for b in blocks) / statistics.median(base[b] for b in blocks))
    drawn.sort()
    return statistics.median(found) / statistics.median(base), drawn[int(0.025 * draws)], drawn[int(0.975 * draws)]


def memory_of(run: Callable[[], object]) -> tuple[float, float]:
    """In this process, in MB: the growth of the peak resident size over two calls, and the most a third one allocates.

    The first has the allocator's habits in it and differs by tens of MB between equal runs; the second does not.
    """
    from torch.profiler import profile

    lines = lambda: Path("/proc/self/status").read_text().splitlines()
    status = lambda key: next(int(line.split()[1]) for line in lines() if line.startswith(key))
    Path("/proc/self/clear_refs").write_text("5")  # start the peak anew
    before = status("VmRSS")
    for _ in range(2):
        run()
    grown = status("VmHWM") - before
    with profile(profile_memory=True) as seen:
        run()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    running = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return grown / 1024, max(running) / 2**20
