"""How good generated answers are: a table of functions of (answers, what was expected)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from trimtab.errors import ConfigError

NO_JSON = object()
Metric = Callable[[Sequence[str], Sequence[str]], float]


def exact_match(answers: Sequence[str], expected: Sequence[str]) -> float:
    """Share of answers that equal what was expected, character for character."""
    return sum(a == b for a, b in zip(answers, expected, strict=True)) / len(expected)


def json_valid(answers: Sequence[str], expected: Sequence[str]) -> float:
    """Share of answers that are JSON as a whole: no fence and no word around it."""
    return sum(_parsed(a) is not NO_JSON for a in answers) / len(answers)


def field_f1(answers: Sequence[str], expected: Sequence[str]) -> float:
    """F1 of the fields of JSON answers, over all rows: a field counts where its path and its value are right.

    An answer that is no JSON has no fields, so all that were expected of it are missed.
    """
    right = given = wanted = 0
    for answer, truth in zip(answers, expected, strict=True):
        a, b = Counter(_fields(_parsed(answer))), Counter(_fields(_parsed(truth)))
        right, given, wanted = right + (a & b).total(), given + a.total(), wanted + b.total()
    return 2 * right / (given + wanted) if given + wanted else 0.0


METRICS: dict[str, Metric] = {"exact_match": exact_match, "field_f1": field_f1, "json_valid": json_valid}


def metric(name: str) -> Metric:
    """A metric by its name.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in METRICS:
        raise ConfigError(f"There is no metric '{name}'. Known: {', '.join(METRICS)}.")
    return METRICS[name]


def fitting(expected: Sequence[str]) -> list[str]:
    """The metrics that make sense for these answers: fields where every one is a JSON object."""
    objects = all(isinstance(_parsed(text), dict) for text in expected)
    return ["exact_match", "field_f1", "json_valid"] if objects else ["exact_match"]


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return NO_JSON


def _fields(value: Any, path: str = "") -> list[tuple[str, str]]:
    """(path, value as JSON) of every leaf: {"a": {"b": [1]}} has ("a.b[0]", "1")."""
    if isinstance(value, dict):
        return [leaf for k, v in value.items() for leaf in _fields(v, f"{path}.{k}" if path else str(k))]
    if isinstance(value, list):
        return [leaf for i, v in enumerate(value) for leaf in _fields(v, f"{path}[{i}]")]
    return [] if value is NO_JSON else [(path, json.dumps(value))]
