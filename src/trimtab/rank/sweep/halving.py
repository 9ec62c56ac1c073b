"""Which learning rates of a setting are given up early (successive halving: Jamieson and Talwalkar 2016).

After a quarter and after half of the steps, the better half of a setting's learning rates goes on, rounded up; by the
loss on held-out rows. No setting is ever given up: the best rate of each is trained to the end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

SHARES = (0.25, 0.5)


def rungs(steps: int) -> list[int]:
    """After which steps rates are given up, of a run of so many."""
    return sorted({at for share in SHARES if (at := max(1, round(share * steps))) < steps})


def survivors(losses: Mapping[float, float]) -> set[float]:
    """The rates that go on: the better half, rounded up; of equals the lower rate. What is not finite comes last.

    Args:
        losses: rate -> held-out loss.
    """
    order = sorted(losses, key=lambda rate: (losses[rate] if math.isfinite(losses[rate]) else math.inf, rate))
    return set(order[: -(-len(order) // 2)])


def given_up(rates: Sequence[float], steps: int, scores: Mapping[float, Mapping[int, float]]) -> dict[float, int]:
    """{rate: the step after which it was given up}, as far as the scores tell; in whatever order they came.

    Args:
        scores: rate -> {step: held-out loss}. A rung is decided when every rate that is left has a score there.
    """
    left, gone = list(rates), dict[float, int]()
    for rung in rungs(steps):
        if len(left) == 1 or any(rung not in scores.get(rate, {}) for rate in left):
            break
        kept = survivors({rate: scores[rate][rung] for rate in left})
        gone |= {rate: rung for rate in left if rate not in kept}
        left = [rate for rate in left if rate in kept]
    return gone


def steps_of_search(rates: int, steps: int) -> int:
    """Steps of all the rates of a setting together."""
    total, before = 0, 0
    for rung in (*rungs(steps), steps):
        total, before = total + rates * (rung - before), rung
        rates = -(-rates // 2)
    return total
