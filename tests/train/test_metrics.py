"""Metrics of answers."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.errors import ConfigError
from trimtab.train.metrics import METRICS, field_f1, fitting, json_valid, metric

values = st.recursive(
    st.integers(-9, 9) | st.text(max_size=3) | st.booleans() | st.none(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", min_size=1, max_size=2), inner, max_size=3)
    ),
    max_leaves=8,
)
objects = st.dictionaries(st.text("abc", min_size=1, max_size=2), values, min_size=1, max_size=3)


def leaves(value, path=()):
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [leaf for k, v in items for leaf in leaves(v, (*path, k))]
    return [(path, json.dumps(value))]


@given(objects, objects)
def test_field_f1_is_that_of_the_leaves(a, b) -> None:
    x, y = set(leaves(a)), set(leaves(b))
    found = field_f1([json.dumps(a)], [json.dumps(b)])
    assert found == pytest.approx(2 * len(x & y) / (len(x) + len(y)) if x or y else 0.0)
    assert found == field_f1([json.dumps(b)], [json.dumps(a)])


def test_fields_count_over_all_rows_and_what_is_no_json_has_none() -> None:
    truth = ['{"a": 1, "b": 2}', '{"a": 3}']
    assert field_f1(truth, truth) == 1.0
    assert field_f1(['{"a": 1, "b": 9}', "sorry"], truth) == pytest.approx(2 * 1 / (2 + 3))
    assert field_f1(["", ""], truth) == 0.0
    assert field_f1(['{"a": {"b": 1}}'], ['{"a.b": 1}']) == 1.0  # paths are what is compared
    assert field_f1(['{"a": "1"}'], ['{"a": 1}']) == 0.0


def test_json_is_json_as_a_whole() -> None:
    assert json_valid(['{"a": 1}', "[]", '```json\n{"a": 1}\n```', 'Here: {"a": 1}', "", "null"], [""] * 6) == 0.5


def test_what_fits() -> None:
    assert fitting(['{"a": 1}', "{}"]) == ["exact_match", "field_f1", "json_valid"]
    assert fitting(['{"a": 1}', "Paris"]) == ["exact_match"]
    assert fitting(["1", "2"]) == ["exact_match"]
    assert set(fitting(["{}"])) <= set(METRICS)


def test_an_unknown_metric_names_the_known() -> None:
    with pytest.raises(ConfigError, match="exact_match, field_f1, json_valid"):
        metric("bleu")
