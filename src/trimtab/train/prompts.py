"""What is asked of a model: prompts out of rows, and as token ids that it is to continue."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.errors import DataError
from trimtab.train.data import read_rows

__all__ = ["Message", "asked_in", "encode_prompt", "prompt_of", "prompts_of", "require_file"]

Message = Mapping[str, Any]  # {"role": ..., "content": ...}
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}  # as conversations name them


def encode_prompt(
    tokenizer: Any, prompt: str | Sequence[Message], system: str | None = None, raw: bool = False
) -> list[int]:
    """A prompt as the model is to continue it: by the chat template, where there is one."""
    if isinstance(prompt, str):
        if raw or not tokenizer.chat_template:
            ids: list[int] = tokenizer(prompt).input_ids
            return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids
        prompt = [{"role": "user", "content": prompt}]
    messages = list(prompt)
    if system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False).input_ids


def prompt_of(row: Mapping[str, Any]) -> str | list[Message]:
    """What a row asks: its prompt, or its conversation without the last answer.

    Raises:
        DataError: it holds neither.
    """
    turns = row.get("messages") or row.get("conversations")
    if turns is None and isinstance(row.get("prompt"), list):
        turns = row["prompt"]
    if isinstance(turns, list) and all(isinstance(t, Mapping) for t in turns):
        messages: list[Message] = [
            {"role": ROLES.get(role := t.get("role", t.get("from")), role), "content": t.get("content", t.get("value"))}
            for t in turns
        ]
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if messages:
            return messages
    if isinstance(row.get("prompt"), str):
        return str(row["prompt"])
    if "instruction" in row:
        return f"{row['instruction']}\n\n{row['input']}" if row.get("input") else str(row["instruction"])
    raise DataError(f"a row asks nothing: its keys are {', '.join(map(repr, row)) or 'none'}")


def prompts_of(
    data: str | os.PathLike[str], limit: int | None = None, fields: Mapping[str, str] | None = None
) -> list[str | list[Message]]:
    """The prompts of the (first) rows of a file.

    Args:
        fields: our key -> the file's column.

    Raises:
        DataError: no such file, no rows, or rows that ask nothing, by number.
    """
    require_file(data)
    prompts: list[str | list[Message]] = []
    faults = []
    for number, row in enumerate(read_rows(data, fields)[:limit], start=1):
        try:
            prompts.append(prompt_of(row))
        except DataError as e:
            faults.append(f"row {number}: {e}")
    if faults:
        raise DataError(f"{data}: " + "; ".join(faults[:10]))
    if not prompts:
        raise DataError(f"{data} has no rows.")
    return prompts


def require_file(data: str | os.PathLike[str]) -> None:
    """Raise `DataError` for the name of a file that is not there; what is no file's name is for `read_rows`."""
    if Path(data).suffix in (".jsonl", ".json", ".csv") and not Path(data).is_file():
        raise DataError(f"There is no file {data}.")


def asked_in(
    data: str | os.PathLike[str], limit: int, fields: Mapping[str, str] | None = None
) -> list[str | list[Message]]:
    """The first prompts of a file's rows; none where they are plain text."""
    try:
        return prompts_of(data, limit, fields)
    except DataError:
        return []
