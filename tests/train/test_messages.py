"""Messages from the ways in which people write them down."""

from __future__ import annotations

import json

import pytest

from trimtab.errors import DataError
from trimtab.train.messages import as_strings, read_messages

ASKED = {"role": "user", "content": "Weather in Rome?"}


def call(arguments: object) -> dict[str, object]:
    return {"type": "function", "function": {"name": "look", "arguments": arguments}}


def test_sharegpt_and_its_roles() -> None:
    turns = [("system", "s"), ("human", "a"), ("gpt", "b"), ("Human", "c"), ("chatgpt", "d")]
    messages, trained = read_messages([{"from": who, "value": what} for who, what in turns])
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert [m["content"] for m in messages] == ["s", "a", "b", "c", "d"]
    assert trained == [False, False, True, False, True]


def test_llama_factorys_calls() -> None:
    turns = [
        ("human", "Weather?"),
        ("function_call", '{"name": "look", "arguments": {"city": "Rome"}}'),
        ("observation", "sunny"),
    ]
    messages, trained = read_messages([{"from": who, "value": what} for who, what in turns])
    assert messages[1] == {"role": "assistant", "content": "", "tool_calls": [call({"city": "Rome"})]}
    assert messages[2]["role"] == "tool"
    assert trained == [False, True, False]


@pytest.mark.parametrize(
    "calls",
    [
        [call({"city": "Rome"})],
        [call('{"city": "Rome"}')],
        json.dumps([call({"city": "Rome"})]),
        [{"name": "look", "arguments": {"city": "Rome"}}],
        {"name": "look", "arguments": '{"city": "Rome"}'},
        [{**call('{"city": "Rome"}'), "id": None}],
    ],
    ids=["objects", "strings", "all a string", "bare", "one", "null id"],
)
def test_tool_calls_become_objects(calls) -> None:
    [_, message], _ = read_messages([ASKED, {"role": "assistant", "content": None, "tool_calls": calls}])
    assert message == {"role": "assistant", "content": "", "tool_calls": [call({"city": "Rome"})]}
    [_, message] = as_strings([ASKED, message])
    assert message["tool_calls"] == [call('{"city": "Rome"}')]


def test_a_turn_can_be_left_out() -> None:
    said = {"role": "assistant", "content": "x"}
    turns = [
        ASKED,
        {**said, "weight": 0},
        {**said, "weight": 1},
        {**said, "train": False},
        {**said, "train": True},
        said,
    ]
    messages, trained = read_messages(turns)
    assert trained == [False, False, True, False, True, True]
    assert all(m == said for m in messages[1:])  # the template does not see the marks
    assert read_messages([ASKED, {"role": "assistant", "content": "", "train": False}])[1] == [False, False]


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_under_the_names_that_templates_look_for(key) -> None:
    [message], _ = read_messages([{"role": "assistant", "content": "4", key: "2 + 2"}])
    assert (message["reasoning_content"], message["thinking"], message["content"]) == ("2 + 2", "2 + 2", "4")


def test_text_parts_and_what_arrow_fills_with_null() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    [message], _ = read_messages([{"role": "user", "content": parts, "tool_calls": None, "name": None}])
    assert message == {"role": "user", "content": "ab"}
    assert read_messages(json.dumps([ASKED]))[0] == [ASKED]  # a CSV's cell


BAD = [
    ([], "must be a list of objects"),
    ("Hi?", "a conversation is a string, but not of JSON"),
    (["Hi?"], "must be a list of objects"),
    ([{"user": "Hi?"}], "turn 1: it has 'user'; expected 'role' and 'content'"),
    ([{"role": "user"}], "turn 1: it has 'role'; expected"),
    ([{"role": None, "content": None}], "turn 1: it has no values"),
    ([ASKED, {"role": "assistant", "content": 4}], "turn 2: its content is a int"),
    ([ASKED, {"role": "assistant", "content": ""}], "turn 2: the assistant says nothing"),
    ([ASKED, {"role": "assistant", "content": "a", "weight": 0.5}], "'weight' is 0.5"),
    ([{"role": "user", "content": [{"type": "image"}]}], "a part of type 'image'; only text"),
    ([ASKED, {"role": "assistant", "tool_calls": [{"id": 1}]}], "must have a 'function' with 'name'"),
    ([ASKED, {"role": "assistant", "tool_calls": "look()"}], "'tool_calls' is a string, but not of JSON"),
    ([ASKED, {"role": "assistant", "tool_calls": [call("{")]}], "arguments of 'look' is a string, but not of JSON"),
]


@pytest.mark.parametrize(("turns", "reason"), BAD, ids=[reason for _, reason in BAD])
def test_what_is_no_conversation_says_where(turns, reason) -> None:
    with pytest.raises(DataError, match=reason):
        read_messages(turns)
