"""What runs, settings and a whole sweep come to; all of it can be written as JSON and read again."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trimtab.rank.sweep.noise import Measured, Verdict
from trimtab.rank.sweep.space import Setting, Trial

FINISHED, GIVEN_UP, FAILED = "finished", "given up", "failed"


@dataclass(frozen=True)
class Score:
    """What a model does on rows it has not seen; losses are means over trained tokens, in nats.

    Attributes:
        rows: the loss of each held-out row, summed over its tokens.
        tokens: of each row.
        task: right answers by their measure: accuracy, exact_match ..., or next_token: the share of the answers' tokens
            that the model would have said itself.
        general: the loss on text that is none of the task's.
    """

    loss: float
    rows: tuple[float, ...]
    tokens: tuple[int, ...]
    task: dict[str, float]
    general: float


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        steps: that were done.
        ended: finished, given up, or failed.
        why: of a failure.
        rungs: step -> the held-out loss that decided whether it went on.
        parameters: trained ones.
        bytes: of the adapter's weights on disk.
        tokens: trained on, padding not counted, prompts counted.
        folder: of the adapter.
    """

    trial: Trial
    steps: int
    ended: str
    why: str = ""
    rungs: dict[int, float] = field(default_factory=dict)
    score: Score | None = None
    parameters: int = 0
    bytes: int = 0
    tokens: int = 0
    folder: str = ""


@dataclass(frozen=True)
class Point:
    """What a setting came to, at its best learning rate.

    Attributes:
        tried: rate -> the last held-out loss of the search (not finite: it failed).
        runs: the finished ones, of each seed.
        step_seconds: forward and backward of one batch; NaN: not measured.
    """

    setting: Setting
    rate: float
    tried: dict[float, float]
    runs: tuple[Outcome, ...]
    step_seconds: float = math.nan

    @property
    def scores(self) -> list[Score]:
        """Of each seed."""
        return [run.score for run in self.runs if run.score is not None]

    @property
    def losses(self) -> tuple[float, ...]:
        """Held-out, of each seed."""
        return tuple(score.loss for score in self.scores)

    @property
    def loss(self) -> float:
        """Held-out, over the seeds."""
        return statistics.fmean(self.losses)

    @property
    def general(self) -> float:
        """On text of another kind, over the seeds."""
        return statistics.fmean(score.general for score in self.scores)

    @property
    def task(self) -> dict[str, tuple[float, float]]:
        """{measure: (mean, standard deviation) over the seeds}."""
        return {name: spread([s.task[name] for s in self.scores]) for name in self.scores[0].task}

    @property
    def parameters(self) -> int:
        """Trained ones."""
        return self.runs[0].parameters

    @property
    def edge(self) -> bool:
        """Whether the best rate is the lowest or the highest of several: one beyond might be better."""
        return len(self.tried) > 1 and self.rate in (min(self.tried), max(self.tried))

    def measured(self) -> Measured:
        """What the noise is judged by."""
        scores = self.scores
        rows = tuple(statistics.fmean(values) for values in zip(*(s.rows for s in scores), strict=True))
        return Measured(self.parameters, self.losses, rows, scores[0].tokens)


@dataclass(frozen=True)
class Curve:
    """The settings of one number of rows beside each other."""

    rows: int
    points: list[Point]
    verdict: Verdict

    @property
    def best(self) -> Point:
        """Of the lowest loss."""
        return self.points[self.verdict.best]

    @property
    def chosen(self) -> Point:
        """The smallest within the noise of the best."""
        return self.points[self.verdict.chosen]


@dataclass
class Sweep:
    """What came out.

    Attributes:
        rows: that were learned from; held_out: that were tested on.
        steps: of a run of all the rows.
        tokens: trained on in all rows, each counted once.
        base: the untrained model's score.
        curves: one for each number of rows, the fewest first.
        failed: settings of which no run could be finished, and why.
        advice: what to take, in words; `take` is the same as settings of a training run.
        predicted: the rank that the rule of capacity asks for (`suggest_rank`), on the layers that are advised.
        adapter: the best run of what is advised.
        seconds: of this call; what was finished before is not in it.
    """

    model: str
    data: str
    rows: int
    held_out: int
    steps: int
    tokens: int
    base: Score
    curves: list[Curve]
    failed: dict[str, str]
    advice: str
    take: dict[str, Any]
    predicted: int
    folder: Path
    adapter: Path
    seconds: float
    done: int = 0  # runs that were finished by this call
    repeated: int = 0  # runs that earlier calls had finished

    @property
    def curve(self) -> Curve:
        """That of the most rows."""
        return self.curves[-1]


def spread(values: list[float]) -> tuple[float, float]:
    """(mean, standard deviation); of one value the latter is NaN."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


# ---------------------------------------------------------------------- JSON
def plain(value: Any) -> Any:
    """Dataclasses as mappings, paths as text, what is no finite number as text ("nan", "inf")."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {f"{k:g}" if isinstance(k, float) else str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def read_outcome(content: Mapping[str, Any]) -> Outcome:
    """The outcome that `plain` made this of."""
    trial, score = content["trial"], content["score"]
    found = None
    if score is not None:
        task = {k: float(v) for k, v in score["task"].items()}
        rows, tokens = tuple(map(float, score["rows"])), tuple(score["tokens"])
        found = Score(float(score["loss"]), rows, tokens, task, float(score["general"]))
    return Outcome(
        trial=Trial(Setting(**trial["setting"]), float(trial["rate"]), trial["seed"]),
        rungs={int(k): float(v) for k, v in content["rungs"].items()},
        score=found,
        **{k: v for k, v in content.items() if k not in ("trial", "rungs", "score")},
    )
