"""Which rows go through the model together, step by step: a pure function of rows, sizes and seed.

So a resumed run goes on where it was, and every process of several knows the whole plan.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from trimtab.errors import TrainError
from trimtab.train.data import Example, batch_plan, collate, collate_packed, pack

__all__ = ["Batch", "Batches", "digest"]


@dataclass(frozen=True)
class Batch:
    """Some rows that go through the model at once."""

    rows: tuple[int, ...]  # their places among the examples
    tokens: int  # of them, without padding
    trained: int  # how many of those the loss counts
    size: int  # tokens with padding


class Batches:
    """The batches of every step of a run. No row is left out: the last step of an epoch may be short.

    Args:
        batch_size: rows of a batch; sequences, each a batch of a step by itself, where rows are packed.
        accumulate: batches of a step.
        epochs: passes over the rows, whole or not.
        max_steps: steps in all, instead of epochs, where positive.
        names: what to call each row in a message; by default its number, from 1.
        packed: tokens of a sequence that several rows share; 0: rows of like length share a batch, padded.

    Raises:
        TrainError: there are no rows.
        DataError: rows longer than `packed`.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int = 8,
        accumulate: int = 1,
        epochs: float = 3.0,
        max_steps: int = -1,
        seed: int = 0,
        pad_id: int = 0,
        names: Sequence[str] = (),
        packed: int = 0,
    ) -> None:
        if not examples:
            raise TrainError("There are no rows to train on.")
        self.examples, self.names, self.pad_id = examples, names, pad_id
        self._bins = pack(examples, packed) if packed else []
        accumulate *= batch_size if packed else 1
        self._steps: list[list[list[int]]] = []
        self._ends: list[int] = []  # step at which each epoch ends
        while len(self._steps) < max_steps if max_steps > 0 else len(self._ends) < epochs:
            batches = self._epoch(batch_size, seed * 1_000_003 + len(self._ends))
            steps = [batches[i : i + accumulate] for i in range(0, len(batches), accumulate)]
            rest = epochs - len(self._ends)
            whole = max_steps > 0 or rest >= 1
            self._ends.append(len(self._steps) + len(steps))
            self._steps += steps if whole else steps[: max(round(rest * len(steps)), not self._steps)]
        del self._steps[max_steps if max_steps > 0 else len(self._steps) :]

    def _epoch(self, batch_size: int, seed: int) -> list[list[int]]:
        """The batches of one pass over the rows, as places of examples."""
        if not self._bins:
            return batch_plan(self.examples, batch_size, seed=seed)
        return random.Random(seed).sample(self._bins, len(self._bins))

    def __len__(self) -> int:
        """How many steps there are."""
        return len(self._steps)

    def __getitem__(self, step: int) -> list[Batch]:
        return [self.batch(rows) for rows in self._steps[step]]

    def batch(self, rows: Sequence[int]) -> Batch:
        """These rows as a batch."""
        part = [self.examples[i] for i in rows]
        lengths = [len(e.ids) for e in part]
        size = sum(lengths) if self._bins else len(part) * max(lengths)
        return Batch(tuple(rows), sum(lengths), sum(e.trained for e in part), size)

    def tensors(self, batch: Batch) -> dict[str, Tensor]:
        """A batch as the model takes it."""
        part = [self.examples[i] for i in batch.rows]
        if not self._bins:
            return collate(part, self.pad_id)
        tensors = collate_packed(part)
        del tensors["seq_lengths"]
        return tensors

    def tokens(self, start: int = 0, stop: int | None = None) -> int:
        """Tokens of the steps from `start` to before `stop`, without padding."""
        steps = self._steps[start:stop]
        return sum(len(self.examples[i].ids) for step in steps for batch in step for i in batch)

    def epoch(self, step: int) -> float:
        """How many passes over the rows are done after `step` steps."""
        last = next((n for n, end in enumerate(self._ends) if step <= end), len(self._ends) - 1)
        start = self._ends[last - 1] if last else 0
        return last + (step - start) / (self._ends[last] - start)

    def ends_epoch(self, step: int) -> bool:
        """Whether an epoch, or the run, ends with the `step`-th step."""
        return step in self._ends or step == len(self)

    def name(self, row: int) -> str:
        """What a message calls a row."""
        return self.names[row] if self.names else f"row {row + 1}"


def digest(examples: Sequence[Example]) -> str:
    """SHA-256 of what is trained: the ids and labels of all rows, in their order."""
    found = hashlib.sha256()
    for example in examples:
        found.update(json.dumps([example.ids, example.labels]).encode())
    return found.hexdigest()
