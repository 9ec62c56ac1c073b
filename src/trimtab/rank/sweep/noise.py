"""Which of several measured settings are as good as the best: a pure function of their held-out losses.

Two things make a loss other than it might have been: the seed of the run, and which rows were held out. The first is
estimated by the spread over the seeds, pooled over all settings; the second by how the difference of two settings
varies over the rows, which both were tested on. A setting is within the noise of the best where its mean loss is larger
by no more than both explain, at 95 % for all comparisons together (Bonferroni): a flat curve is called so 19 times in
20.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Measured:
    """What a setting came to on the held-out rows.

    Attributes:
        size: what one wants little of: trained parameters.
        losses: of each seed, in nats a token.
        rows: of each held-out row, the loss summed over its tokens, mean over the seeds; none: unknown.
        tokens: of each row, how many are counted.
    """

    size: float
    losses: tuple[float, ...]
    rows: tuple[float, ...] = ()
    tokens: tuple[int, ...] = ()

    @property
    def mean(self) -> float:
        """The loss, over the seeds."""
        return sum(self.losses) / len(self.losses)


@dataclass(frozen=True)
class Verdict:
    """What can be said of settings beside each other; numbers are their places.

    Attributes:
        best: the one of the lowest mean loss.
        chosen: the smallest one within the noise of the best.
        within: those within the noise, the best among them.
        margins: how much worse than the best each might be by chance, in nats a token.
        spread: the standard deviation over seeds, pooled; NaN where no setting has two of them.
        flat: the smallest of all is within the noise.
        open: the largest of all is the best, and no smaller one within the noise: more might be better still.
    """

    best: int
    chosen: int
    within: tuple[int, ...]
    margins: tuple[float, ...]
    spread: float
    flat: bool
    open: bool


def judge(settings: Sequence[Measured]) -> Verdict:
    """Find the best setting, and the smallest one that is as good.

    Raises:
        ValueError: there is no setting with a finite loss.
    """
    known = [i for i, s in enumerate(settings) if s.losses and all(map(math.isfinite, s.losses))]
    if not known:
        raise ValueError("No setting has a finite loss.")
    best = min(known, key=lambda i: (settings[i].mean, settings[i].size))
    spread, freedom = pooled_spread([settings[i].losses for i in known])
    tail = (1 - CONFIDENCE) / max(1, len(known) - 1)
    margins = tuple(
        _margin(s, settings[best], spread, freedom, tail) if i in known else math.nan for i, s in enumerate(settings)
    )
    within = tuple(i for i in known if settings[i].mean - settings[best].mean <= margins[i])
    chosen = min(within, key=lambda i: (settings[i].size, settings[i].mean))
    sizes = [settings[i].size for i in known]
    flat = settings[chosen].size == min(sizes)
    open_ = settings[chosen].size == max(sizes) > min(sizes)
    return Verdict(best, chosen, within, margins, spread, flat, open_)


def pooled_spread(groups: Sequence[Sequence[float]]) -> tuple[float, int]:
    """(standard deviation within groups, its degrees of freedom); (NaN, 0) where no group has two values."""
    freedom = sum(len(g) - 1 for g in groups if g)
    if not freedom:
        return math.nan, 0
    squares = sum((x - sum(g) / len(g)) ** 2 for g in groups for x in g)
    return math.sqrt(squares / freedom), freedom


def _margin(one: Measured, best: Measured, spread: float, freedom: int, tail: float) -> float:
    """How much larger the loss of `one` might be by chance."""
    if one is best:
        return 0.0
    seeds = rows = 0.0
    if freedom:
        seeds = t_quantile(tail, freedom) * spread * math.sqrt(1 / len(one.losses) + 1 / len(best.losses))
    n, total = len(one.rows), sum(one.tokens)
    if n > 1 and total and len(best.rows) == n:
        # A row's part in the difference of the means, less what its tokens would have at the mean difference.
        mean = (sum(one.rows) - sum(best.rows)) / total
        parts = [a - b - mean * w for a, b, w in zip(one.rows, best.rows, one.tokens, strict=True)]
        rows = t_quantile(tail, n - 1) * math.sqrt(n / (n - 1) * sum(p * p for p in parts)) / total
    return math.hypot(seeds, rows)


def t_quantile(tail: float, freedom: int) -> float:
    """What Student's t exceeds with the probability `tail` (at most a half)."""
    low, high = 0.0, 1.0
    while _t_tail(high, freedom) > tail:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_tail(middle, freedom) > tail else (low, middle)
    return high


def _t_tail(t: float, freedom: int) -> float:
    """P(T > t), t >= 0 (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine, odd = math.cos(angle) ** 2, freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(2 + odd, freedom - 1, 2):
        term *= cosine * (k - 1) / k
        total += term
    inside = 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
    return max(0.0, (1 - inside) / 2)
