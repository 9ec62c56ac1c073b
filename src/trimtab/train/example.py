"""One row as token ids and labels."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any

IGNORE = -100  # the label that every Hugging Face loss skips


@dataclass(frozen=True)
class Example:
    """One row as token ids. `labels` repeats an id where it is trained and holds -100 elsewhere."""

    ids: list[int]  # (T,)
    labels: list[int]  # (T,)
    prompt_length: int  # ids[:prompt_length] is what to generate the last answer from
    row: int = 0  # which row of the data it comes from, counted from 0

    @property
    def trained(self) -> int:
        """How many tokens the loss counts. The first token of a sequence has nothing to be predicted from."""
        return sum(label != IGNORE for label in self.labels[1:])

    def spans(self, tokenizer: Any) -> list[tuple[str, bool]]:
        """The text in pieces, each with whether it is trained."""
        pieces: list[tuple[str, bool]] = []
        done, start = "", 0
        for trained, labels in groupby(self.labels, key=lambda label: label != IGNORE):
            stop = start + len(list(labels))
            # Decoded from the beginning: some tokenizers drop the space before the first word they are given.
            text = tokenizer.decode(self.ids[:stop], clean_up_tokenization_spaces=False)
            whole = text.startswith(done)
            pieces.append((text[len(done) :] if whole else tokenizer.decode(self.ids[start:stop]), trained))
            done, start = text, stop
        return pieces
