"""Conversations as token ids, and which of them the assistant says.

Where an answer begins and ends is found by rendering the chat template on beginnings of the conversation, which needs
no marker strings and no `{% generation %}` in the template; where the template has those marks, they say it.

An answer is trained as it was given: after the very text that the model is asked with. Some templates show an earlier
answer otherwise once the conversation goes on (they drop its thinking, say). Such an answer gets an example of its own
that ends with it, so a row may give several.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from trimtab.core.extras import need
from trimtab.errors import DataError
from trimtab.train.example import IGNORE, Example
from trimtab.train.kinds import Chat
from trimtab.train.messages import REASONING, as_strings

TrainOn = Literal["completions", "all", "last"]
TemplateName = Literal["own", "trl"]
Notes = set[str]  # what is worth saying of a row, in words that are the same for every row

MARKS = re.compile(r"\{%-?\s*generation\b")
THOUGHT = re.compile(r"</?think>")

ASKED_OTHERWISE = "the chat template asks for an answer with text that the conversation does not have before it"
LEFT_OUT = "the chat template leaves out the reasoning of an answer"
SPECIAL = "a message holds one of the tokenizer's special tokens as text, which is read as that token"
NO_TOOLS = "the chat template does not show the model its tools"
SPLIT = (
    "the chat template shows earlier answers otherwise once the conversation goes on: they get examples of their own"
)


class Template:
    """A tokenizer's chat template, or TRL's for training in its place.

    Raises:
        DataError: TRL's is asked for, and there is none for this tokenizer.
    """

    def __init__(self, tokenizer: Any, name: TemplateName = "own") -> None:
        self.tokenizer = tokenizer
        self.name = name
        self.text = _from_trl(tokenizer) if name == "trl" else None
        self.special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}

    def source(self) -> str:
        """Where masks come from, in words."""
        if self.text:
            model = re.search(r"Training variant of the (.+?) chat template", self.text)
            return f"TRL's training template{f' for {model[1]}' if model else ''}"
        if not self.tokenizer.chat_template:
            return "none: the tokenizer has no chat template"
        marks = self.has_marks(None)
        return "the tokenizer's chat template, " + ("by its generation marks" if marks else "by rendering prefixes")

    def has_marks(self, tools: Any) -> bool:
        """Whether `{% generation %}` says what the assistant says."""
        text = self.text or self.tokenizer.get_chat_template(tools=tools)
        return bool(MARKS.search(text)) and self.tokenizer.is_fast  # the slow ones know no positions

    def apply(self, chat: Chat, upto: int, **options: Any) -> Any:
        """The tokenizer's `apply_chat_template` on the first `upto` messages.

        Raises:
            DataError: the template raises.
        """
        own = {"chat_template": self.text} if self.text else {}
        arguments = {**own, **chat.options, "tools": chat.tools, **options}
        messages = chat.messages[:upto]
        try:
            try:
                return self.tokenizer.apply_chat_template(messages, **arguments)
            except TypeError:
                if not any("tool_calls" in message for message in messages):
                    raise
                return self.tokenizer.apply_chat_template(as_strings(messages), **arguments)
        except Exception as e:  # whatever a template may do
            where = "" if upto == len(chat.messages) else f" (on the first {upto} messages)"
            raise DataError(f"the chat template raises {type(e).__name__}: {e}{where}") from e

    def encode(self, text: str) -> list[int]:
        """Ids of rendered text: the template has written BOS and the other special tokens itself."""
        return token_ids(self.tokenizer, text, special=False)


def _from_trl(tokenizer: Any) -> str | None:
    if not tokenizer.chat_template:
        raise DataError("The tokenizer has no chat template that TRL could have a training template for.")
    need("A training template of TRL's", "trl")
    from trl.chat_template_utils import get_training_chat_template

    try:
        text: str | None = get_training_chat_template(tokenizer)
    except Exception as e:  # it tries the template on messages of its own
        raise DataError("TRL has no training template for this tokenizer's chat template: use its own.") from e
    return text  # None: the tokenizer's own has the marks already


@dataclass
class _Rendered:
    """The beginnings of one conversation as text, each rendered once."""

    chat: Chat
    template: Template

    def __post_init__(self) -> None:
        self._texts: dict[tuple[int, bool], str] = {}

    def text(self, upto: int, ask: bool = False) -> str:
        """The first `upto` messages; with `ask`, and what makes the model answer."""
        key = (upto, ask)
        if key not in self._texts:
            self._texts[key] = self.template.apply(self.chat, upto, tokenize=False, add_generation_prompt=ask)
        return self._texts[key]

    def ids(self, upto: int, ask: bool = False) -> list[int]:
        return self.template.encode(self.text(upto, ask))


def encode_chat(chat: Chat, template: Template, train_on: TrainOn = "completions") -> tuple[list[Example], Notes]:
    """The examples of a conversation, the one that holds its end last, and what is to be said of them.

    Raises:
        DataError: nothing in it would be trained, the template raises, or does not end its answers.
    """
    if not template.tokenizer.chat_template:
        raise DataError("it is a conversation, and the tokenizer has no chat template: set tokenizer.chat_template")
    # An answer before anything is asked has no prompt: it is there to be read, not to be learnt.
    asked = next((i for i, m in enumerate(chat.messages) if m["role"] not in ("system", "assistant")), 0)
    turns = [i for i, trained in enumerate(chat.trained) if trained and i > asked]
    rendered = _Rendered(chat, template)
    if train_on == "all":
        return [_everything(rendered, turns)], set()
    if not turns:
        roles = ", ".join(dict.fromkeys(repr(m["role"]) for m in chat.messages))
        raise DataError(f"it has no assistant turn to train on that answers another (its roles: {roles})")
    if train_on == "last":
        turns = turns[-1:]
    examples: list[Example] = []
    special = template.tokenizer.all_special_tokens
    notes: Notes = {SPECIAL} if any(token in m["content"] for m in chat.messages for token in special) else set()
    while turns:
        end = turns[-1] + 1
        whole = rendered.text(end)
        # By TRL's templates a row is one example, as it is there.
        shown = [i for i in turns if template.name == "trl" or whole.startswith(rendered.text(i + 1))]
        examples.insert(0, _example(rendered, shown, end, notes))
        turns = [i for i in turns if i not in shown]
    if len(examples) > 1:
        notes.add(SPLIT)
    return examples, notes


def _everything(rendered: _Rendered, turns: list[int]) -> Example:
    ids = rendered.ids(len(rendered.chat.messages))
    start = shared(ids, rendered.ids(turns[-1], ask=True)) if turns else 0
    return Example(ids, list(ids), start)


def _example(rendered: _Rendered, turns: list[int], end: int, notes: Notes) -> Example:
    """The first `end` messages, of which these turns are trained."""
    chat, template = rendered.chat, rendered.template
    if template.has_marks(chat.tools):
        options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        marked = template.apply(chat, end, tokenizer_kwargs={"verbose": False}, **options)
        ids, mask = list(marked["input_ids"]), marked["assistant_masks"]
    else:
        ids, mask = rendered.ids(end), None
    if mask is None or turns != [i for i in range(end) if chat.messages[i]["role"] == "assistant"]:
        trained = {at for i in turns for at in _span(rendered, i, ids, end, notes, marked=mask is not None)}
        mask = [at in trained and (mask is None or mask[at]) for at in range(len(ids))]
    for i in turns:
        _look_for_all(rendered, i, notes)
    labels = [id if bit else IGNORE for id, bit in zip(ids, mask)]
    last = max((i + 1 for i, label in enumerate(labels) if label != IGNORE), default=0)
    return Example(ids[:last], labels[:last], min(last, shared(ids, rendered.ids(turns[-1], ask=True))))


def _span(rendered: _Rendered, turn: int, ids: list[int], end: int, notes: Notes, marked: bool) -> range:
    """Where an answer is among the ids of the conversation; with marks, where those that belong to it may be."""
    whole = rendered.text(end)
    if not whole.startswith(rendered.text(turn, ask=True)):
        if not whole.startswith(rendered.text(turn)):
            raise DataError(
                f"the chat template shows what is before turn {turn + 1} otherwise once it is answered, "
                "so which tokens are the answer cannot be told"
            )
        notes.add(ASKED_OTHERWISE)
    stop = len(ids) if turn + 1 == end else shared(ids, rendered.ids(turn + 1))
    start = shared(ids, rendered.ids(turn, ask=not marked))  # marks may begin before what the model is asked with ends
    return range(start, stop if marked else _end(ids, start, stop, rendered.template))


def _look_for_all(rendered: _Rendered, turn: int, notes: Notes) -> None:
    """Make sure that an answer is all there in what the template makes of it."""
    message, after = rendered.chat.messages[turn], rendered.text(turn + 1)
    said = _squeezed(after[shared(rendered.text(turn, ask=True), after) :])
    for call in message.get("tool_calls", []):
        if _squeezed(call["function"]["name"]) not in said:
            raise DataError(f"the chat template does not show the call of the tool {call['function']['name']!r}")
    *thoughts, answer = THOUGHT.split(message["content"])
    if _squeezed(answer) not in said:
        raise DataError(f"the chat template does not show what the assistant says in turn {turn + 1}, or not as it is")
    if any(_squeezed(part) not in said for part in (*thoughts, str(message.get(REASONING[0], "")))):
        notes.add(LEFT_OUT)
    if any((tool.get("function") or tool).get("name", "") not in after for tool in rendered.chat.tools or ()):
        notes.add(NO_TOOLS)


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _end(ids: list[int], start: int, stop: int, template: Template) -> int:
    """Where an answer ends with its end token: the newline after that is nothing to learn."""
    special, decode = template.special, template.tokenizer.decode
    while stop > start and ids[stop - 1] not in special and not decode(ids[stop - 1]).strip():
        stop -= 1
    if stop == start or ids[stop - 1] not in special:
        raise DataError(
            "the chat template ends its answer without an end token, so the model would never stop "
            "(for some models TRL's training template, template='trl', has one)"
        )
    return stop


def token_ids(tokenizer: Any, text: str, special: bool) -> list[int]:
    """Ids of a text; with `special`, and the special tokens that the tokenizer gives every text.

    Raises:
        DataError: the text is none: it holds half a character.
    """
    try:
        ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False).input_ids
    except (TypeError, UnicodeEncodeError) as e:
        raise DataError("its text is no valid Unicode (half an emoji?)") from e
    return ids


def shared(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Length of the common beginning: a token that spans the seam of two texts counts as the second one's."""
    n = min(len(a), len(b))
    return n if a[:n] == b[:n] else next(i for i in range(n) if a[i] != b[i])
