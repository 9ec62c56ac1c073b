"""How well a run's adapter does, on the held-out rows and on text of another kind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from trimtab.rank.sweep.result import Score
from trimtab.shell.locate import locate_graft
from trimtab.train.evaluate import evaluate_generate, evaluate_loss
from trimtab.train.example import Example

RUNG_ROWS = 32  # held-out rows that decide which learning rates go on


@dataclass(frozen=True)
class Scorer:
    """The rows that every run is tested on.

    Args:
        general: of text that is none of the task's.
        metrics: of generated answers, by name; `answers` rows of them.
    """

    tokenizer: Any
    held_out: Sequence[Example]
    general: Sequence[Example]
    pad_id: int = 0
    metrics: Sequence[str] = ()
    answers: int = 100
    batch_size: int = 16

    def quick(self, model: Any) -> float:
        """The loss on the first held-out rows."""
        return evaluate_loss(model, self.held_out[:RUNG_ROWS], self.pad_id).loss

    def whole(self, model: Any) -> Score:
        """Everything there is to know."""
        special = tuple(self.tokenizer.all_special_ids)
        found = evaluate_loss(model, self.held_out, self.pad_id, special=special)
        task = {"next_token": found.next_token} if found.accuracy is None else {"accuracy": found.accuracy}
        if self.metrics:
            part = self.held_out[: self.answers]
            task |= evaluate_generate(model, self.tokenizer, part, self.metrics, batch_size=self.batch_size).metrics
        tokens = tuple(e.trained for e in self.held_out)
        rows = tuple(loss * n for loss, n in zip(found.rows, tokens, strict=True))
        return Score(found.loss, rows, tokens, task, evaluate_loss(model, self.general, self.pad_id).loss)

    @property
    def tokens(self) -> tuple[int, int]:
        """(of a quick score, of a whole one), prompts counted, generated answers not."""
        quick, whole, general = (
            sum(len(e.ids) for e in part) for part in (self.held_out[:RUNG_ROWS], self.held_out, self.general)
        )
        return quick, whole + general


@contextmanager
def alone(model: Any, adapter: str) -> Iterator[Any]:
    """Inside the block the model answers with one of its adapters, whichever others are being trained."""
    graft, _ = locate_graft(model)
    with graft.board.using(open=True, active=(adapter,), enabled=True, plan=None):
        yield model
