"""The rules of a sweep as pure functions: which rates are given up, what is within the noise, names, what is tried."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.errors import ConfigError
from trimtab.rank.sweep.clock import Clock
from trimtab.rank.sweep.halving import given_up, rungs, steps_of_search, survivors
from trimtab.rank.sweep.noise import Measured, judge, pooled_spread, t_quantile
from trimtab.rank.sweep.space import Setting, Space, Trial, around, chunks

LOSSES = st.floats(min_value=0, max_value=10) | st.sampled_from([math.inf, math.nan])
RATES = st.lists(st.integers(1, 10**6), min_size=1, max_size=9, unique=True).map(lambda n: [x / 1e7 for x in n])


# ---------------------------------------------------------------------- halving
@given(st.dictionaries(st.floats(min_value=1e-6, max_value=1), LOSSES, min_size=1, max_size=9))
def test_the_better_half_survives(losses: dict[float, float]) -> None:
    kept = survivors(losses)
    assert len(kept) == math.ceil(len(losses) / 2)
    finite = {r: x if math.isfinite(x) else math.inf for r, x in losses.items()}
    gone = losses.keys() - kept
    assert all(finite[a] <= finite[b] for a in kept for b in gone)
    assert all(a < b for a in kept for b in gone if finite[a] == finite[b]), "of equals the lower rate"


@given(st.integers(1, 1000))
def test_rungs_lie_inside_the_run(steps: int) -> None:
    found = rungs(steps)
    assert all(0 < rung < steps for rung in found)
    assert len(found) <= 2
    if steps >= 4:
        assert found == [max(1, round(steps / 4)), round(steps / 2)]


@given(RATES, st.integers(1, 200), st.randoms(use_true_random=False))
def test_a_search_ends_with_one_rate_or_the_best_few_however_the_scores_come(
    rates: list[float], steps: int, draw: random.Random
) -> None:
    every = {rate: {rung: draw.random() for rung in rungs(steps)} for rate in rates}
    reference = _by_the_book(rates, steps, every)
    # Scores come one by one, and of rates that are given up none come any more: the end is the same.
    told: dict[float, dict[int, float]] = {}
    order = [(rung, rate) for rate in rates for rung in rungs(steps)]
    draw.shuffle(order)
    order.sort(key=lambda x: x[0] if draw.random() < 0.5 else 0)
    seen: dict[float, int] = {}
    for rung, rate in order:
        gone = given_up(rates, steps, told)
        assert seen.items() <= gone.items(), "nothing that was given up comes back"
        seen = gone
        if gone.get(rate, steps) >= rung:
            told.setdefault(rate, {})[rung] = every[rate][rung]
    assert given_up(rates, steps, told) == reference
    assert len(reference) < len(rates)


def _by_the_book(rates: list[float], steps: int, scores: dict[float, dict[int, float]]) -> dict[float, int]:
    gone: dict[float, int] = {}
    left = sorted(rates)
    for rung in rungs(steps):
        left.sort(key=lambda rate: (scores[rate][rung], rate))
        while len(left) > math.ceil(len(rates) / 2 ** (1 + rungs(steps).index(rung))):
            gone[left.pop()] = rung
    return gone


def test_a_decision_waits_for_all_and_failures_do_not_hold_it_up() -> None:
    assert given_up([1e-4, 1e-3], 8, {1e-4: {2: 1.0}}) == {}
    assert given_up([1e-4, 1e-3], 8, {1e-4: {2: 1.0}, 1e-3: {2: math.inf, 4: math.inf}}) == {1e-3: 2}
    assert given_up([1e-3], 8, {1e-3: {2: 1.0, 4: 1.0}}) == {}, "the last rate is never given up"


@pytest.mark.parametrize(
    ("rates", "steps", "whole"), [(1, 100, 100), (2, 100, 125), (3, 100, 175), (4, 100, 200), (3, 1, 3)]
)
def test_what_a_search_costs(rates: int, steps: int, whole: int) -> None:
    assert steps_of_search(rates, steps) == whole


# ---------------------------------------------------------------------- noise
@pytest.mark.parametrize(  # from a printed table
    ("tail", "freedom", "value"),
    [(0.05, 1, 6.314), (0.05, 2, 2.920), (0.05, 3, 2.353), (0.025, 3, 3.182), (0.025, 4, 2.776), (0.01, 7, 2.998),
     (0.005, 10, 3.169), (0.05, 30, 1.697)],
)  # fmt: skip
def test_quantiles_of_student(tail: float, freedom: int, value: float) -> None:
    assert t_quantile(tail, freedom) == pytest.approx(value, abs=6e-4)


def test_the_pooled_spread() -> None:
    assert pooled_spread([[1.0, 3.0], [10.0, 10.0]]) == (1.0, 2)
    assert math.isnan(pooled_spread([[1.0], [2.0]])[0])


def curve(means: list[float], noise: float, seeds: int, draw: random.Random) -> list[Measured]:
    """A curve over ranks 1, 2, 4 ... with normal noise over the seeds."""
    return [Measured(2**i, tuple(mean + draw.gauss(0, noise) for _ in range(seeds))) for i, mean in enumerate(means)]


def test_a_flat_curve_is_called_flat_and_a_falling_one_is_not() -> None:
    draw = random.Random(0)
    flat = [judge(curve([1.0] * 5, 0.01, 2, draw)).flat for _ in range(2000)]
    assert sum(flat) / len(flat) > 0.94
    falling = [judge(curve([1.5, 1.3, 1.0, 1.0, 1.0], 0.01, 2, draw)) for _ in range(500)]
    assert sum(v.chosen == 2 for v in falling) / len(falling) > 0.9
    assert not any(v.flat for v in falling)
    still = [judge(curve([1.5, 1.4, 1.3, 1.2, 1.0], 0.01, 2, draw)) for _ in range(100)]
    assert all(v.open and v.best == 4 for v in still)


@given(st.lists(st.lists(st.floats(0, 5), min_size=2, max_size=3), min_size=1, max_size=6), st.floats(0.1, 10))
def test_the_verdict_holds_together(losses: list[list[float]], scale: float) -> None:
    settings = [Measured(i + 1, tuple(x)) for i, x in enumerate(losses)]
    found = judge(settings)
    assert found.best in found.within
    assert found.chosen in found.within
    assert found.chosen == min(found.within), "sizes rise with the place"
    assert min(s.mean for s in settings) == settings[found.best].mean
    assert found.flat == (found.chosen == 0)
    # In other units everything is the same, and so it is in another order.
    moved = judge([Measured(s.size, tuple(4 * x for x in s.losses)) for s in settings])
    assert (moved.best, moved.within) == (found.best, found.within)
    turned = judge(settings[::-1])
    assert settings[::-1][turned.chosen] == settings[found.chosen]


def test_what_the_held_out_rows_say() -> None:
    """A difference that lies in one row of forty may be chance, one that is in every row is none."""
    tokens = (10,) * 40
    best = Measured(8, (1.0,), (10.0,) * 40, tokens)
    one = Measured(1, (1.05,), (10.0,) * 39 + (30.0,), tokens)
    every = Measured(1, (1.05,), (10.5,) * 40, tokens)
    assert judge([one, best]).chosen == 0
    assert judge([every, best]).chosen == 1


def test_what_failed_is_left_out() -> None:
    settings = [Measured(1, (math.nan, 1.0)), Measured(2, (1.0, 1.0)), Measured(4, (math.inf,))]
    found = judge(settings)
    assert (found.best, found.chosen, found.within) == (1, 1, (1,))
    assert math.isnan(found.margins[0])
    with pytest.raises(ValueError, match="finite"):
        judge([settings[0]])


# ---------------------------------------------------------------------- what is tried
def test_names_of_runs_are_unlike() -> None:
    sets = ["all-linear", "q_proj,v_proj", "q_proj", r".*\.q_proj", r".*q_proj"]
    settings = [Setting(r, a, t, n) for r in (1, 11) for a in (1, 32) for t in sets for n in (10, 100)]
    trials = [Trial(s, rate, seed) for s in settings for rate in (1e-3, 1.2e-3, 3e-4) for seed in (0, 1)]
    names = [t.name for t in trials]
    assert len(set(names)) == len(trials)
    assert not any(set("./\\ *") & set(name) for name in names)
    assert Trial(settings[0], 2.4e-3, 0).name == "r1-a1-all-linear-n10-lr2_4e-3-s0"


def test_a_space() -> None:
    space = Space((4, 1, 4), (3e-3, 1e-3), (16, 32), ("all-linear", "q_proj"), 3, (50, 20))
    assert [s.rank for s in space.settings(50)[:3]] == [1, 4, 1]
    assert len(space.settings(60)) == 2 * 2 * 2 * 2
    assert [t.rate for t in space.search(space.settings(50)[0], 7)] == [1e-3, 3e-3]
    assert [t.seed for t in space.repeats(space.settings(50)[0], 1e-3, 7)] == [8, 9]
    assert {s.rows for s in Space().settings(60)} == {60}
    assert around(1e-3) == (3.3e-4, 1e-3, 3e-3)
    with pytest.raises(ConfigError, match="50 rows"):
        space.settings(49)


@pytest.mark.parametrize(
    "bad", [{"ranks": (0,)}, {"ranks": ()}, {"rates": (0.0,)}, {"rates": (math.nan,)}, {"seeds": 0}, {"alphas": (-1,)}]
)
def test_what_cannot_be_tried(bad: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="cannot be"):
        Space(**bad)  # type: ignore[arg-type]


def test_chunks_hold_settings_together() -> None:
    settings = Space(ranks=tuple(range(1, 8))).settings(10)
    for per, at_once in itertools.product((1, 3), (0, 1, 3, 7, 100)):
        parts = list(chunks(settings, per, at_once))
        assert [s for part in parts for s in part] == settings
        assert not at_once or all(len(part) * per <= max(at_once, per) for part in parts)


def test_the_time_that_is_left(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    with Clock(1000, every=10) as clock:
        clock.running = 3
        now = 105.0
        clock.advance(100)
        assert capsys.readouterr().err == "", "not so often"
        now = 150.0
        clock.advance(150)
        assert capsys.readouterr().err == "Sweep  25%  3 runs in training, 0 over  2:30 left\n"
        now = 400.0
        clock.advance(2000)
        assert "100%" in capsys.readouterr().err
