"""A row's kind is read off its keys, and a row that breaks its promise says how."""

from __future__ import annotations

import json
import math

import pytest

from trimtab.errors import DataError
from trimtab.train.kinds import PAIRS, Chat, Pair, Text, Tokens, describe, kind_of, parse, unused

USER, ASSISTANT = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}


@pytest.mark.parametrize("pair", PAIRS, ids=" and ".join)
def test_pairs_by_their_many_names(pair) -> None:
    row = dict(zip(pair, ["Hi?", "Hello."]))
    assert kind_of(row) == " and ".join(pair)
    assert parse(row, chat=True).messages == [USER, ASSISTANT]
    assert parse({k.title(): v for k, v in row.items()}, chat=True).messages == [USER, ASSISTANT]
    joined = parse(row, chat=False)
    assert isinstance(joined, Pair)
    assert joined.prompt == ("Hi?" if pair == ("prompt", "completion") else "Hi?\n\n")
    assert repr(pair[1]) in describe(kind_of(row))


def test_each_kind() -> None:
    assert isinstance(parse({"messages": [USER, ASSISTANT]}, True), Chat)
    assert isinstance(parse({"conversations": [{"from": "human", "value": "a"}]}, True), Chat)
    assert parse({"text": "a"}, True) == Text("text", "a")
    assert parse({"input_ids": [1, 2]}, True) == Tokens("token ids", [1, 2], [1, 2])
    for row in ({"messages": []}, {"conversations": []}, {"text": ""}, {"input_ids": []}):
        assert "trained" in describe(kind_of(row))


def test_the_richer_kind_wins_and_the_rest_is_said_to_be_unused() -> None:
    row = {"instruction": "a", "input": "b", "output": "c", "text": "all of it", "id": 3, "source": "web"}
    parsed = parse(row, True)
    assert parsed.kind == "instruction and output"
    assert unused(row, parsed) == {"text", "source"}
    row = {"text": "a", "tools": [], "label_id": 1}
    assert unused(row, parse(row, True)) == {"tools", "label_id"}
    row = {"messages": [USER, ASSISTANT], "tools": None, "system": "s"}
    assert unused(row, parse(row, True)) == set()


def test_null_and_nan_are_no_values() -> None:
    # As a table has them whose rows are of several kinds.
    row = {"messages": None, "prompt": math.nan, "completion": None, "text": "a"}
    assert parse(row, True) == Text("text", "a")
    with pytest.raises(DataError, match=r"its keys are 'prompt', 'completion' \(null: 'completion'\); expected"):
        parse({"prompt": "a", "completion": math.nan}, True)


def test_alpaca_with_input_system_and_history() -> None:
    row = {
        "instruction": "Sort",
        "input": "2, 1",
        "output": "1, 2",
        "system": "Be brief.",
        "history": [["Hi?", "Hello."]],
    }
    assert [(m["role"], m["content"]) for m in parse(row, True).messages] == [
        ("system", "Be brief."), ("user", "Hi?"), ("assistant", "Hello."),
        ("user", "Sort\n\n2, 1"), ("assistant", "1, 2"),
    ]  # fmt: skip
    assert unused(row, parse(row, True)) == set()
    joined = parse(row, False)
    assert (joined.prompt, joined.completion) == ("Sort\n\n2, 1\n\n", "1, 2")
    assert unused(row, joined) == {"system", "history"}


def test_turns_of_a_prompt_are_not_trained() -> None:
    parsed = parse({"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]}, True)
    assert parsed.trained == [False, False, False, True]
    parsed = parse({"prompt": json.dumps([USER]), "completion": "x"}, True)  # a string is a string
    assert parsed.messages[0]["content"] == json.dumps([USER])


def test_tools_as_a_list_or_as_json() -> None:
    tools = [{"type": "function", "function": {"name": "look"}}]
    for given in (tools, json.dumps(tools)):
        assert parse({"messages": [USER, ASSISTANT], "tools": given}, True).tools == tools
    assert parse({"messages": [USER, ASSISTANT], "tools": []}, True).tools is None
    options = parse({"messages": [USER, ASSISTANT], "chat_template_kwargs": {"enable_thinking": False}}, True).options
    assert options == {"enable_thinking": False}


def test_tokens_with_labels_masks_and_padding() -> None:
    ids = [5, 6, 7, 8]
    assert parse({"input_ids": ids, "labels": [-100, 6, 7, -100]}, True).labels == [None, 6, 7, None]
    assert parse({"input_ids": ids, "completion_mask": [0, 0, 1, 1]}, True).labels == [None, None, 7, 8]
    both = {"input_ids": ids, "completion_mask": [0, 1, 1, 1], "assistant_masks": [1, 0, 1, 1]}
    assert parse(both, True).labels == [None, None, 7, 8]
    padded = parse({"input_ids": [0, *ids], "attention_mask": [0, 1, 1, 1, 1], "labels": [-100, -100, 6, 7, 8]}, True)
    assert (padded.ids, padded.labels) == (ids, [None, 6, 7, 8])
    assert parse({"input_ids": json.dumps(ids)}, True).ids == ids  # a CSV's cell


BAD = [
    ({}, "its keys are none; expected 'messages'"),
    ({"question": "a"}, "its keys are 'question'; expected .*can be mapped"),
    ({"text": 3}, "'text' is a int"),
    ({"prompt": "a", "completion": 3}, "'completion' a int: they must both be strings"),
    ({"prompt": [USER], "completion": "a"}, "they must both be strings, or both lists"),
    ({"text": "a", "label": 1}, "'label' a int"),
    ({"question": "a", "answer": ""}, "the answer is empty"),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, "trimtab dpo"),
    ({"prompt": "a", "completion": "b", "label": True}, "trimtab kto"),
    ({"messages": [USER, ASSISTANT], "tools": "{"}, "'tools' is a string, but not of JSON"),
    ({"messages": [USER, ASSISTANT], "tools": {"a": 1}}, "'tools' must be a list of JSON schemas"),
    ({"messages": [USER, ASSISTANT], "chat_template_kwargs": [1]}, "must be an object"),
    ({"instruction": "a", "output": "b", "history": ["x"]}, "list of pairs"),
    ({"input_ids": []}, "'input_ids' must be a list of integers"),
    ({"input_ids": [1, "2"]}, "'input_ids' must be a list of integers"),
    ({"input_ids": [1, 2], "labels": [1]}, "'labels' has 1 entries, and 'input_ids' 2"),
    ({"input_ids": [1, 2, 3], "labels": [1, 9, 3]}, "'labels' differ from 'input_ids' at 1"),
    ({"input_ids": [1, 2, 3], "labels": [2, 3, -100]}, "shifted by one already"),
]


@pytest.mark.parametrize(("row", "reason"), BAD, ids=[reason for _, reason in BAD])
def test_a_row_that_is_not_what_it_promises(row, reason) -> None:
    with pytest.raises(DataError, match=reason):
        parse(row, chat=True)
