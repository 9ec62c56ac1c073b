"""From rows to token ids and labels: what a training run, or a loop of your own, learns from.

    rows = load_rows("questions.csv")                      # trimtab.train.rows
    prepared = prepare(rows, tokenizer, max_length=1024)
    batch = collate([prepared.examples[i] for i in batch_plan(prepared.examples, 8)[0]])

Only what the model should say is trained: every assistant turn with its end token, every completion, all of a text.
`kinds` knows what a row is, `masks` where its answers are, `packing` how several share a sequence.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import DataError
from trimtab.train.encode import Encoder
from trimtab.train.example import IGNORE, Example
from trimtab.train.kinds import Row
from trimtab.train.packing import check_packing, collate_packed, pack
from trimtab.train.prepare import Prepared, Report, TooLong, prepare
from trimtab.train.rows import Rows, load_rows

__all__ = [
    "IGNORE", "DataError", "Example", "Prepared", "Report", "batch_plan", "check_packing", "collate", "collate_packed",
    "encode_row", "encode_rows", "load_rows", "pack", "prepare", "read_rows",
]  # fmt: skip


def read_rows(path: str | os.PathLike[str], fields: Mapping[str, str] | None = None) -> Rows:
    """The rows of a file; `load_rows` does more."""
    return load_rows(path, columns=fields)


def encode_row(row: Row, tokenizer: Any, system: str | None = None) -> Example:
    """Encode one row.

    Where the chat template shows earlier answers otherwise once a conversation goes on, this is the example of the
    last answer; `prepare` makes those of the others, too.

    Raises:
        DataError: nothing in it would be trained, or the model would not learn to stop.
    """
    return Encoder(tokenizer, system=system).encode(row)[0][-1]


def encode_rows(
    rows: Iterable[Row],
    tokenizer: Any,
    max_length: int | None = None,
    too_long: TooLong = "error",
    system: str | None = None,
) -> list[Example]:
    """The examples of `prepare`, where its report is not wanted."""
    return prepare(rows, tokenizer, max_length=max_length, too_long=too_long, system=system).examples


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
