"""Messages as chat templates want them, from the ways in which people write them down."""

from __future__ import annotations

import json
from typing import Any

from trimtab.errors import DataError

Message = dict[str, Any]

ROLES = {
    "human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant",
    "observation": "tool", "function_call": "assistant",
}  # fmt: skip
REASONING = ("reasoning_content", "thinking", "reasoning")  # the names under which templates look for it


def read_json(value: Any, name: str) -> Any:
    """The value of a string of JSON; any other value as it is. Columns of ragged objects are often such strings."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as e:
        raise DataError(f"{name} is a string, but not of JSON: {e}") from e


def read_messages(turns: Any) -> tuple[list[Message], list[bool]]:
    """Messages, and which are to be trained, from OpenAI's `role` and `content` or ShareGPT's `from` and `value`.

    Raises:
        DataError: it is no list of messages; says which turn and why.
    """
    turns = read_json(turns, "a conversation")
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise DataError("a conversation must be a list of objects with 'role' and 'content' (or 'from' and 'value')")
    messages, trained = [], []
    for number, turn in enumerate(turns, start=1):
        try:
            message, weight = _message({k: v for k, v in turn.items() if v is not None})
        except DataError as e:
            raise DataError(f"turn {number}: {e}") from None
        messages.append(message)
        trained.append(message["role"] == "assistant" and weight)
    return messages, trained


def _message(turn: dict[str, Any]) -> tuple[Message, bool]:
    turn = dict(turn)
    weight = _weight(turn)
    name = turn.pop("role", turn.pop("from", None))
    content = turn.pop("content", turn.pop("value", None))
    if not isinstance(name, str) or (content is None and not {"tool_calls", *REASONING} & set(turn)):
        keys = ", ".join(map(repr, [*(["role"] if name else []), *turn])) or "no values"
        raise DataError(f"it has {keys}; expected 'role' and 'content'")
    if name == "function_call":  # LLaMA-Factory's way to write a call
        turn["tool_calls"], content = content, ""
    if "tool_calls" in turn:
        turn["tool_calls"] = _calls(turn["tool_calls"])
    if thought := next((turn[key] for key in REASONING if turn.get(key)), ""):
        turn |= {"reasoning_content": thought, "thinking": thought}
    role = ROLES.get(name.lower(), name.lower())
    text = _text(content)
    if role == "assistant" and weight and not (text or turn.get("tool_calls")):
        raise DataError('the assistant says nothing, and would be trained to; give it "train": false')
    return {"role": role, "content": text, **turn}, weight


def _weight(turn: dict[str, Any]) -> bool:
    """Whether a turn is trained, by `"train": false` or OpenAI's `"weight": 0`."""
    said = {key: turn.pop(key) for key in ("train", "weight") if key in turn}
    for key, value in said.items():
        if value not in (0, 1):
            raise DataError(f"{key!r} is {value!r}; it can be 0 (false) or 1 (true)")
    return all(said.values())


def _text(content: Any) -> str:
    """The text of a message's content: a string, or OpenAI's list of parts."""
    if content is None:
        return ""  # beside tool calls; many templates would write "None"
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise DataError(f"its content is a {type(content).__name__}, not a string")
    other = [part for part in content if not (isinstance(part, dict) and isinstance(part.get("text"), str))]
    if other:
        kind = other[0].get("type", "unknown") if isinstance(other[0], dict) else type(other[0]).__name__
        raise DataError(f"its content has a part of type {kind!r}; only text can be trained on")
    return "".join(part["text"] for part in content)


def _calls(calls: Any) -> list[dict[str, Any]]:
    """Tool calls with their arguments as objects, which is what most templates want (`as_strings` is for the rest)."""
    calls = read_json(calls, "'tool_calls'")
    calls = calls if isinstance(calls, list) else [calls]
    read = []
    for call in calls:
        inner = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise DataError("each of 'tool_calls' must have a 'function' with 'name' and 'arguments'")
        given = read_json(inner.get("arguments") or {}, f"the arguments of {inner['name']!r}")
        rest = {k: v for k, v in call.items() if k not in ("function", "name", "arguments") and v is not None}
        read.append({"type": "function", **rest, "function": {"name": inner["name"], "arguments": given}})
    return read


def as_strings(messages: list[Message]) -> list[Message]:
    """The same with the arguments of tool calls as JSON strings, for the templates that concatenate them."""

    def call(one: dict[str, Any]) -> dict[str, Any]:
        function = one["function"]
        arguments = json.dumps(function["arguments"], ensure_ascii=False)
        return {**one, "function": {**function, "arguments": arguments}}

    return [{**m, "tool_calls": [call(c) for c in m["tool_calls"]]} if "tool_calls" in m else m for m in messages]
