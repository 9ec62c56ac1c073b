"""One row as examples: conversations by `masks`, and the kinds that need no chat template."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from trimtab.errors import DataError
from trimtab.train.example import IGNORE, Example
from trimtab.train.kinds import Chat, Pair, Row, Text, Tokens, parse, unused
from trimtab.train.masks import Notes, Template, TemplateName, TrainOn, encode_chat, shared, token_ids

TOUCHING = "prompt and completion are joined without a space between them"


@dataclass
class Encoder:
    """What turns a row into examples."""

    tokenizer: Any
    system: str | None = None
    train_on: TrainOn = "completions"
    plain: bool = False
    template_name: TemplateName = "own"

    def __post_init__(self) -> None:
        self.template = Template(self.tokenizer, self.template_name)
        self.conversations = 0  # how many there were
        self.chat = bool(self.tokenizer.chat_template) and not self.plain

    def encode(self, row: Row) -> tuple[list[Example], Notes, str, set[str]]:
        """The examples of a row, what is to be said of them, the row's kind and the columns that it does not use."""
        if not isinstance(row, Mapping):
            raise DataError(f"it is a {type(row).__name__}, not a dictionary")
        parsed = parse(row, self.chat)
        examples, notes = self._examples(parsed)
        if not all(example.trained for example in examples):
            raise DataError("no token of it would be trained (is the answer empty?)")
        bos = self.tokenizer.bos_token_id
        if bos is not None and any(example.ids[:2] == [bos, bos] for example in examples):
            raise DataError("it starts with two BOS tokens: the first turn or the chat template writes it twice")
        return examples, notes, parsed.kind, unused(row, parsed)

    def _examples(self, parsed: Chat | Pair | Text | Tokens) -> tuple[list[Example], Notes]:
        if isinstance(parsed, Chat):
            if self.system is not None and parsed.messages[0]["role"] != "system":
                messages = [{"role": "system", "content": self.system}, *parsed.messages]
                parsed = replace(parsed, messages=messages, trained=[False, *parsed.trained])
            self.conversations += 1
            return encode_chat(parsed, self.template, self.train_on)
        if isinstance(parsed, Tokens):
            return [self._tokens(parsed)], set()
        if isinstance(parsed, Text):
            ids = self._ended(parsed.text)
            return [Example(ids, self._without_bos(ids), 0)], set()
        touching = not (parsed.prompt[-1:].isspace() or parsed.completion[:1].isspace() or not parsed.prompt)
        return [self._pair(parsed)], {TOUCHING} if touching else set()

    def _pair(self, pair: Pair) -> Example:
        # The tokenizer adds its own BOS here, once: prompt and completion are one string to it.
        ids, head = self._ended(pair.prompt + pair.completion), self._ids(pair.prompt)
        if head and head[-1] == self.tokenizer.eos_token_id:  # some tokenizers end everything they are given
            head = head[:-1]
        start = shared(ids, head)
        labels = self._without_bos(ids) if self.train_on == "all" else [IGNORE] * start + ids[start:]
        return Example(ids, labels, start)

    def _tokens(self, tokens: Tokens) -> Example:
        size = len(self.tokenizer)
        if wrong := [id for id in tokens.ids if not 0 <= id < size]:
            raise DataError(f"'input_ids' holds {wrong[0]}, and the tokenizer has {size} tokens: is it another's?")
        labels = [IGNORE if label is None else label for label in tokens.labels]
        last = max((i + 1 for i, label in enumerate(labels) if label != IGNORE), default=0)
        while last > 0 and labels[last - 1] != IGNORE:
            last -= 1  # to the start of the last answer
        return Example(tokens.ids, labels, last)

    def _ids(self, text: str) -> list[int]:
        # A text that was rendered by a chat template has its BOS already.
        begun = bool(self.tokenizer.bos_token) and text.startswith(self.tokenizer.bos_token)
        return token_ids(self.tokenizer, text, special=not begun)

    def _ended(self, text: str) -> list[int]:
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise DataError("the tokenizer has no end token, so a model trained on it would never stop")
        ids = self._ids(text)
        return ids if ids and ids[-1] == eos else [*ids, eos]

    def _without_bos(self, ids: list[int]) -> list[int]:
        return [IGNORE if i == 0 and id == self.tokenizer.bos_token_id else id for i, id in enumerate(ids)]
