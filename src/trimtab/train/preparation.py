"""The rows of a run: read, split, encoded, and looked at before anything is trained."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from trimtab.errors import DataError
from trimtab.train.config import TrainConfig
from trimtab.train.data import Example, Prepared, load_rows, prepare
from trimtab.train.generate import stop_ids
from trimtab.train.preflight import preflight
from trimtab.train.rows import Rows, splits

__all__ = ["Data", "encode_data", "prepare_data", "read_data", "show_data"]

PACKED = 1024  # tokens of a packed sequence, unless max_length says it, or a row is longer


@dataclass
class Data:
    """The rows of a run, encoded."""

    train: Prepared
    valid: Prepared | None = None
    notices: list[str] = field(default_factory=list)

    @property
    def examples(self) -> list[Example]:
        """What is learned."""
        return self.train.examples

    @property
    def held_out(self) -> list[Example]:
        """What the run is tested on."""
        return self.valid.examples if self.valid else []

    def packed(self, config: TrainConfig) -> int:
        """Tokens of a packed sequence; 0 where rows are not packed."""
        return config.packing and (config.max_length or max(PACKED, *(len(e.ids) for e in self.examples)))


def read_data(config: TrainConfig) -> tuple[Rows, Rows | None]:
    """The rows to learn, and those to be tested on: other ones, or a part of the same.

    Raises:
        DataError: rows that cannot be read, named; a column or a split that is not there.
    """
    assert config.data is not None
    named = {"prompt": config.prompt_field, "completion": config.completion_field,
             "messages": config.messages_field, "text": config.text_field}  # fmt: skip
    columns = {ours: theirs for ours, theirs in named.items() if theirs}
    rows = load_rows(config.data, split=config.split, columns=columns, skip_bad=config.skip_bad_rows)
    if config.eval_data:
        split = config.eval_split or _held_out_split(config.eval_data)
        return rows, load_rows(config.eval_data, split=split, columns=columns, skip_bad=config.skip_bad_rows)
    if not config.val_size:
        return rows, None
    count = round(config.val_size if config.val_size >= 1 else config.val_size * len(rows))
    if not 0 < count < len(rows):
        raise DataError(f"val_size would hold out {count} of {len(rows)} rows: leave some to learn and to test.")
    held = sorted(random.Random(config.seed).sample(range(len(rows)), count))
    chosen = set(held)
    return rows.pick(i for i in range(len(rows)) if i not in chosen), rows.pick(held)


def _held_out_split(source: str) -> str | None:
    """The split to be tested on of what has splits; the file itself where it has none."""
    if not Path(source).exists():  # a Hub data set
        return "valid"
    return next((name for name in ("valid", "test") if name in splits(source)), None)


def encode_data(config: TrainConfig, tokenizer: Any, rows: Rows, held_out: Rows | None) -> Data:
    """The rows as examples.

    Raises:
        DataError: rows that cannot be trained on: all of them, named.
    """

    def encoded(part: Rows) -> Prepared:
        return prepare(
            part, tokenizer, max_length=config.max_length, too_long=config.too_long, system=config.system,
            train_on=config.train_on, skip_bad=config.skip_bad_rows, plain=config.plain, template=config.template,
        )  # fmt: skip

    data = Data(encoded(rows), encoded(held_out) if held_out is not None else None)
    if same := _shared(data.examples, data.held_out):
        data.notices.append(f"{same} of the {len(data.held_out)} held-out rows are among those that are learned.")
    return data


def prepare_data(config: TrainConfig, tokenizer: Any) -> Data:
    """Read and encode the rows of a run; raises what `read_data` and `encode_data` do."""
    return encode_data(config, tokenizer, *read_data(config))


def show_data(data: Data, model: Any, tokenizer: Any, console: Console) -> None:
    """Look at the rows before the first step, and print what there is to say of them.

    Raises:
        DataError: training on them would be training on nothing, or would fail.
    """
    size = model.get_input_embeddings().weight.shape[0]
    preflight(data.train, tokenizer, stop_ids=stop_ids(model), vocab_size=size).render(console)
    for line in data.notices:
        console.print(line, style="yellow", markup=False)


def _shared(learned: Sequence[Example], held_out: Sequence[Example]) -> int:
    known = {tuple(e.ids) for e in learned} if held_out else set()
    return sum(tuple(e.ids) in known for e in held_out)
