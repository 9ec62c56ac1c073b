"""From rows of text to batches of token ids with labels.

The kind of a row is read off its keys, so no registry file is needed:

    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}
    {"prompt": ..., "completion": ...}             strings, or lists of messages
    {"instruction": ..., "input": ..., "output": ...}
    {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}
    {"text": ...}

Only what the model should say is trained: every assistant turn with its end token, every completion, all of a text.
Where a turn begins and ends is found by rendering the chat template on prefixes of the conversation, which needs no
marker strings and no `{% generation %}` in the template.
"""

from __future__ import annotations

import csv
import json
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from trimtab.errors import DataError

__all__ = ["DataError", "Example", "batch_plan", "collate", "encode_row", "encode_rows", "read_rows"]

IGNORE = -100  # the label that every Hugging Face loss skips
Row = Mapping[str, Any]
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}


@dataclass(frozen=True)
class Example:
    """One row as token ids. `labels` repeats an id where it is trained and holds -100 elsewhere."""

    ids: list[int]  # (T,)
    labels: list[int]  # (T,)
    prompt_length: int  # ids[:prompt_length] is what to generate the last answer from

    @property
    def trained(self) -> int:
        """How many tokens the loss counts. The first token of a sequence has nothing to be predicted from."""
        return sum(label != IGNORE for label in self.labels[1:])


# --- reading --------------------------------------------------------------------------------------------------------


def read_rows(path: str | os.PathLike[str], fields: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """Rows of a .jsonl, .json (a list) or .csv file.

    Args:
        fields: our key -> the file's column, e.g. `{"prompt": "question", "completion": "answer"}`.

    Raises:
        DataError: a line that is not a JSON object, named; an unknown suffix; a column that is not there.
    """
    path = Path(path)
    rows: list[Any]
    if path.suffix == ".jsonl":
        rows = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError as e:
                    raise DataError(f"{path}, line {number}, column {e.colno}: {e.msg}") from e
    elif path.suffix == ".json":
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as e:
            raise DataError(f"{path}, line {e.lineno}, column {e.colno}: {e.msg}") from e
    elif path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    else:
        raise DataError(f"{path}: cannot read {path.suffix or 'a file without a suffix'}; use .jsonl, .json or .csv.")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: every row must be a JSON object.")
    for ours, theirs in (fields or {}).items():
        for number, row in enumerate(rows, start=1):
            if theirs not in row:
                raise DataError(f"{path}, row {number} has no field {theirs!r}; it has {', '.join(row)}.")
            row[ours] = row.pop(theirs)
    return rows


# --- encoding -------------------------------------------------------------------------------------------------------


def encode_rows(
    rows: Iterable[Row],
    tokenizer: Any,
    max_length: int | None = None,
    too_long: Literal["error", "drop", "truncate"] = "error",
    system: str | None = None,
) -> list[Example]:
    """Encode rows and make sure that there is something to learn in each.

    Args:
        max_length: longest example in tokens; None is the tokenizer's own limit.
        too_long: what to do with longer ones. "truncate" cuts the end, which may cut the end token.
        system: system message of conversations that have none; None leaves it to the chat template.

    Raises:
        DataError: rows of unknown kind, without trained tokens, without a trained end token, or too long: all of
            them, in one error.
    """
    limit = max_length or tokenizer.model_max_length
    examples: list[Example] = []
    faults: list[str] = []
    for number, row in enumerate(rows, start=1):
        try:
            example = encode_row(row, tokenizer, system)
            if len(example.ids) > limit:
                if too_long == "drop":
                    continue
                if too_long == "error":
                    raise DataError(
                        f"it has {len(example.ids)} tokens, more than {limit} (too_long='drop' or 'truncate')"
                    )
                example = Example(example.ids[:limit], example.labels[:limit], min(example.prompt_length, limit))
                if not example.trained:
                    raise DataError(f"cut to {limit} tokens it has nothing left to train on")
            examples.append(example)
        except DataError as e:
            faults.append(f"row {number}: {e}")
    if faults:
        shown = "\n  ".join(faults[:10]) + (f"\n  and {len(faults) - 10} more" if len(faults) > 10 else "")
        raise DataError(f"{len(faults)} row(s) cannot be trained on:\n  {shown}")
    if not examples:
        raise DataError("There are no rows to train on" + (f": all are longer than {limit} tokens." if limit else "."))
    return examples


def encode_row(row: Row, tokenizer: Any, system: str | None = None) -> Example:
    """Encode one row. Raises `DataError` when nothing in it would be trained, or the model would not learn to stop."""
    kind = _parse(row, chat=bool(tokenizer.chat_template))
    if isinstance(kind, str):
        example = _encode_text(kind, tokenizer)
    elif isinstance(kind, tuple):
        example = _encode_pair(*kind, tokenizer)
    else:
        if system is not None and kind[0]["role"] != "system":
            kind = [{"role": "system", "content": system}, *kind]
        example = _encode_chat(kind, tokenizer, row.get("tools"))
    if not example.trained:
        raise DataError("no token of it would be trained (is the answer empty?)")
    return example


def _parse(row: Row, chat: bool) -> str | tuple[str, str] | list[dict[str, Any]]:
    """A text, a pair (prompt, completion), or messages: what the row holds, as far as the tokenizer can take it."""
    keys = set(row)
    if "messages" in keys:
        return _messages(row["messages"])
    if "conversations" in keys:
        return _messages(row["conversations"])
    if {"prompt", "completion"} <= keys:
        prompt, completion = row["prompt"], row["completion"]
    elif "instruction" in keys and keys & {"output", "response"}:
        prompt = f"{row['instruction']}\n\n{row['input']}" if row.get("input") else row["instruction"]
        completion = row["output"] if "output" in keys else row["response"]
        prompt += "" if chat else "\n\n"
    elif "text" in keys:
        if not isinstance(row["text"], str):
            raise DataError("'text' is not a string")
        return row["text"]
    else:
        raise DataError(
            f"its keys are {', '.join(map(repr, row)) or 'none'}; expected 'messages', 'prompt' and 'completion', "
            "'instruction' and 'output', 'conversations', or 'text'"
        )
    if isinstance(prompt, list) and isinstance(completion, list):
        return _messages([*prompt, *completion])
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise DataError("prompt and completion must both be strings, or both lists of messages")
    if not completion:
        raise DataError("no token of it would be trained: the completion is empty")
    if chat:
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    return prompt, completion


def _messages(turns: Any) -> list[dict[str, Any]]:
    """Messages with `role` and `content`, from those or from ShareGPT's `from` and `value`."""
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise DataError("a conversation must be a list of objects with 'role' and 'content' (or 'from' and 'value')")
    messages = []
    for turn in turns:
        role = turn.get("role", turn.get("from"))
        if role is None or not ({"content", "value", "tool_calls"} & set(turn)):
            raise DataError(f"a turn has the keys {', '.join(map(repr, turn))}; expected 'role' and 'content'")
        rest = {k: v for k, v in turn.items() if k not in ("role", "from", "value")}
        messages.append({**rest, "role": ROLES.get(role, role), "content": turn.get("content", turn.get("value"))})
    return messages


def _encode_text(text: str, tokenizer: Any) -> Example:
    ids = _end(tokenizer(text).input_ids, tokenizer)
    return Example(ids, [id if i or id != tokenizer.bos_token_id else IGNORE for i, id in enumerate(ids)], 0)


def _encode_pair(prompt: str, completion: str, tokenizer: Any) -> Example:
    # The tokenizer adds its own BOS here, once: prompt and completion are one string to it.
    ids = _end(tokenizer(prompt + completion).input_ids, tokenizer)
    head = tokenizer(prompt).input_ids
    if head and head[-1] == tokenizer.eos_token_id:  # some tokenizers end everything they are given
        head = head[:-1]
    start = _shared(ids, head)
    return Example(ids, [IGNORE] * start + ids[start:], start)


def _end(ids: list[int], tokenizer: Any) -> list[int]:
    eos = tokenizer.eos_token_id
    if eos is None:
        raise DataError("the tokenizer has no end token, so a model trained on it would never stop")
    return ids if ids and ids[-1] == eos else [*ids, eos]


def _encode_chat(messages: list[dict[str, Any]], tokenizer: Any, tools: Any) -> Example:
    if not tokenizer.chat_template:
        raise DataError("it is a conversation, and the tokenizer has no chat template: set tokenizer.chat_template")

    def render(upto: int, ask: bool) -> str:
        return tokenizer.apply_chat_template(messages[:upto], tools=tools, tokenize=False, add_generation_prompt=ask)

    def tokenize(text: str) -> list[int]:  # the template writes BOS and the other special tokens itself
        return tokenizer(text, add_special_tokens=False).input_ids

    whole = render(len(messages), ask=False)
    ids = tokenize(whole)
    if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        raise DataError("it starts with two BOS tokens: the text of the first turn or the chat template repeats it")
    labels, prompt_length, last = [IGNORE] * len(ids), 0, 0
    special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = render(i, ask=True), render(i + 1, ask=False)
        if not whole.startswith(before):  # templates without a generation prompt for this turn
            before = render(i, ask=False)
        if not (whole.startswith(before) and whole.startswith(after)):
            continue  # the template rewrites earlier turns (it drops their thinking, say): only later ones are exact
        start, stop = _shared(ids, tokenize(before)), _shared(ids, tokenize(after))
        while stop > start and ids[stop - 1] not in special:  # the newline after the end of turn is nothing to learn
            stop -= 1
        if stop == start:
            raise DataError("the chat template ends its answer without an end token, so the model would never stop")
        labels[start:stop] = ids[start:stop]
        prompt_length, last = start, stop
    if not last:
        raise DataError("it has no assistant turn that the chat template shows whole")
    return Example(ids[:last], labels[:last], prompt_length)


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning: a token that spans the seam of two texts counts as the second one's."""
    n = min(len(a), len(b))
    return next((i for i in range(n) if a[i] != b[i]), n)


# --- batching -------------------------------------------------------------------------------------------------------


def batch_plan(examples: Sequence[Example], batch_size: int, seed: int | None = None) -> list[list[int]]:
    """Indices of each batch; no row is left out.

    Rows of like length share a batch, so little is padding. With a seed the rows are shuffled, sorted within pools of
    16 batches, and the batches shuffled again: the same seed gives the same plan. Without one they are sorted, longest
    first, so that a batch too large for the memory fails at once.
    """
    order = list(range(len(examples)))
    pool = len(order)
    draw = random.Random(seed)
    if seed is not None:
        draw.shuffle(order)
        pool = 16 * batch_size
    batches: list[list[int]] = []
    for start in range(0, len(order), max(pool, 1)):
        part = sorted(order[start : start + pool], key=lambda i: -len(examples[i].ids))
        batches += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    if seed is not None:
        draw.shuffle(batches)
    return batches


def collate(examples: Sequence[Example], pad_id: int = 0) -> dict[str, Tensor]:
    """Right-padded `input_ids`, `attention_mask` and `labels`, each (B, T). Padding is masked by place, not by id."""
    longest = max(len(e.ids) for e in examples)

    def padded(rows: Iterator[list[int]], fill: int) -> Tensor:
        return torch.tensor([row + [fill] * (longest - len(row)) for row in rows])

    return {
        "input_ids": padded((e.ids for e in examples), pad_id),
        "attention_mask": padded(([1] * len(e.ids) for e in examples), 0),
        "labels": padded((e.labels for e in examples), IGNORE),
    }
