"""What a row is, read off its keys, so that no registry file is needed.

A row becomes one of four things: a `Chat`, a `Pair` of strings, a `Text`, or `Tokens` that are encoded already.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from trimtab.errors import DataError
from trimtab.train.messages import Message, read_json, read_messages

__all__ = ["KEYS", "PAIRS", "Chat", "Pair", "Parsed", "Row", "Text", "Tokens", "describe", "kind_of", "parse", "unused"]

Row = Mapping[str, Any]

# What is asked and what is answered, under the names people give the two.
PAIRS = [
    ("prompt", "completion"), ("prompt", "response"), ("prompt", "answer"), ("prompt", "output"),
    ("question", "answer"), ("question", "response"), ("query", "response"), ("query", "answer"),
    ("instruction", "output"), ("instruction", "response"), ("instruction", "completion"), ("instruction", "answer"),
    ("input", "output"), ("input", "target"), ("source", "target"), ("user", "assistant"), ("text", "label"),
]  # fmt: skip
WHOLE = {"input_ids": "token ids", "messages": "messages", "conversations": "conversations", "text": "text"}
BESIDE = {"tools", "system", "chat_template_kwargs"}  # a conversation's
MASKS = {"labels", "attention_mask", "completion_mask", "assistant_masks"}  # the token ids'
NUMBERING = {"", "id", "index", "idx", "unnamed: 0", "__index_level_0__"}
KEYS = {*WHOLE, *BESIDE, *MASKS, *(key for pair in PAIRS for key in pair), "input", "history"}


@dataclass(frozen=True)
class Chat:
    """A conversation. `trained` says of each message whether it is an answer to be learnt."""

    kind: str
    messages: list[Message]
    trained: list[bool]
    tools: list[dict[str, Any]] | None = None
    options: dict[str, Any] = field(default_factory=dict)  # for the chat template, such as enable_thinking


@dataclass(frozen=True)
class Pair:
    """A prompt and its completion, as strings that follow each other."""

    kind: str
    prompt: str
    completion: str


@dataclass(frozen=True)
class Text:
    """A document."""

    kind: str
    text: str


@dataclass(frozen=True)
class Tokens:
    """Ids and labels that somebody else has made."""

    kind: str
    ids: list[int]
    labels: list[int | None]  # None: not trained


Parsed = Chat | Pair | Text | Tokens


def kind_of(row: Row) -> str:
    """The name of a row's kind; "" where its keys say nothing that is known."""
    keys = set(_present(row))
    if kind := next((WHOLE[key] for key in ("input_ids", "messages", "conversations") if key in keys), ""):
        return kind
    if pair := next((pair for pair in PAIRS if set(pair) <= keys), None):
        return " and ".join(pair)
    return "text" if "text" in keys else ""


def describe(kind: str, chat: bool = True) -> str:
    """What a kind is, and what of it is trained."""
    if kind in ("messages", "conversations"):
        return f"{kind}: the assistant's turns are trained, each with its end"
    if kind == "text":
        return "text: all of it is trained"
    if kind == "token ids":
        return "token ids: trained where their labels or masks say so"
    prompt, completion = kind.split(" and ")
    form = "a conversation" if chat else "one string"
    return f"{prompt!r} and {completion!r}, as {form}: {completion!r} is trained, with its end"


def unused(row: Row, parsed: Parsed) -> set[str]:
    """The columns of a row that nothing was made of, but for those that number the rows."""
    used = {*NUMBERING, *parsed.kind.split(" and "), *(key for key, kind in WHOLE.items() if kind == parsed.kind)}
    used |= MASKS if isinstance(parsed, Tokens) else set()
    if parsed.kind.startswith("instruction"):
        used |= {"input", "history"} if isinstance(parsed, Chat) else {"input"}
    if isinstance(parsed, Chat):
        used |= BESIDE
    return {key for key in row if str(key).strip().lower() not in used}


def _present(row: Row) -> dict[str, Any]:
    """The row without what is null (or NaN: a table's empty cell), also under its keys in lower case."""
    full = {str(key): value for key, value in row.items() if value is not None and value == value}
    return {**{key.strip().lower(): value for key, value in full.items()}, **full}


def parse(row: Row, chat: bool) -> Parsed:
    """What a row holds.

    Args:
        chat: whether prompts and completions that are strings are the turns of a conversation.

    Raises:
        DataError: the row is of no known kind, or not what its keys promise.
    """
    present, kind = _present(row), kind_of(row)
    _refuse_others(present)
    if not kind:
        raise DataError(_unknown(row, present))
    if kind == "token ids":
        return _tokens(present)
    if kind in ("messages", "conversations"):
        return _chat(kind, *read_messages(present[kind]), present)
    if kind == "text":
        if not isinstance(present["text"], str):
            raise DataError(f"'text' is a {type(present['text']).__name__}, not a string")
        return Text(kind, present["text"])
    return _pair(kind, present, chat)


def _refuse_others(row: Row) -> None:
    """Rows of other ways to train, which would be misread here."""
    if {"chosen", "rejected"} <= set(row):
        raise DataError("it is a preference ('chosen' and 'rejected'): `trimtab dpo` learns from those")
    if {"prompt", "completion"} <= set(row) and isinstance(row.get("label"), bool):
        raise DataError("it is a judgement ('label' is true or false): `trimtab kto` learns from those")


def _unknown(row: Row, present: Row) -> str:
    null = [key for key in row if str(key) not in present]
    keys = ", ".join(map(repr, row)) or "none"
    return (
        f"its keys are {keys}{f' (null: {repr(null)[1:-1]})' if null else ''}; expected 'messages', 'prompt' and "
        "'completion', 'instruction' and 'output', 'conversations', or 'text'. Other names can be mapped: "
        "columns={'prompt': ..., 'completion': ...}"
    )


def _chat(kind: str, messages: list[Message], trained: list[bool], row: Row) -> Chat:
    tools = read_json(row.get("tools"), "'tools'")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise DataError("'tools' must be a list of JSON schemas, or that list as a JSON string")
    options = read_json(row.get("chat_template_kwargs"), "'chat_template_kwargs'") or {}
    if not isinstance(options, dict):
        raise DataError("'chat_template_kwargs' must be an object")
    system = row.get("system")
    if isinstance(system, str) and system and messages[0]["role"] != "system":
        messages, trained = [{"role": "system", "content": system}, *messages], [False, *trained]
    return Chat(kind, messages, trained, tools or None, options)


def _pair(kind: str, row: Row, chat: bool) -> Parsed:
    first, second = kind.split(" and ")
    prompt, completion = row[first], row[second]
    if isinstance(prompt, list) and isinstance(completion, list):
        before, after = read_messages(prompt), read_messages(completion)
        return _chat(kind, before[0] + after[0], [False] * len(before[0]) + after[1], row)
    if not isinstance(prompt, str) or not isinstance(completion, str):
        found = f"{first!r} is a {type(prompt).__name__} and {second!r} a {type(completion).__name__}"
        raise DataError(f"{found}: they must both be strings, or both lists of messages")
    if not completion:
        raise DataError(f"no token of it would be trained: the {second} is empty")
    if first == "instruction" and row.get("input"):
        prompt = f"{prompt}\n\n{row['input']}"
    if not chat:
        # A prompt and a completion are the user's own to join; of others we know that they are paragraphs.
        return Pair(kind, prompt if kind == "prompt and completion" else f"{prompt}\n\n", completion)
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    return _chat(kind, *read_messages([*_history(row.get("history")), *turns]), row)


def _history(turns: Any) -> list[Message]:
    """LLaMA-Factory's earlier turns of an instruction: a list of [what was asked, what was answered]."""
    turns = turns or []
    if not all(isinstance(turn, list | tuple) and len(turn) == 2 for turn in turns):
        raise DataError("'history' must be a list of pairs [asked, answered]")
    return [m for a, b in turns for m in ({"role": "user", "content": a}, {"role": "assistant", "content": b})]


def _tokens(row: Row) -> Tokens:
    ids = _integers(row["input_ids"], "input_ids")
    labels: list[int | None] = list(ids)
    if "labels" in row:
        given = _integers(row["labels"], "labels", len(ids))
        if wrong := [i for i, (a, b) in enumerate(zip(ids, given)) if b not in (a, -100)]:
            shifted = all(given[i] in (-100, ids[i + 1]) for i in range(len(ids) - 1))
            hint = (
                " They are shifted by one already: the model does that itself, leave them as the ids" if shifted else ""
            )
            raise DataError(f"'labels' differ from 'input_ids' at {wrong[0]}; each must be the same id or -100.{hint}")
        labels = [None if b == -100 else b for b in given]
    for name in ("completion_mask", "assistant_masks"):
        if name in row:
            labels = [b if bit else None for b, bit in zip(labels, _integers(row[name], name, len(ids)))]
    if "attention_mask" in row:  # rows that were padded already
        kept = [bool(bit) for bit in _integers(row["attention_mask"], "attention_mask", len(ids))]
        ids, labels = _where(ids, kept), _where(labels, kept)
    return Tokens("token ids", ids, labels)


def _integers(values: Any, name: str, length: int | None = None) -> list[int]:
    values = read_json(values, f"{name!r}")
    if not isinstance(values, list | tuple) or not values or not all(isinstance(v, int) for v in values):
        raise DataError(f"{name!r} must be a list of integers")
    if length is not None and len(values) != length:
        raise DataError(f"{name!r} has {len(values)} entries, and 'input_ids' {length}")
    return list(values)


def _where(values: Iterable[Any], kept: Iterable[bool]) -> list[Any]:
    return [value for value, keep in zip(values, kept) if keep]
