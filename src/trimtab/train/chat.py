"""A conversation with a model and its adapters, with commands; how it is shown is another's business."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from trimtab.errors import AdapterNameError, ConfigError
from trimtab.shell.opening import BASE, Opened
from trimtab.train.generate import Answer, answer, stream
from trimtab.train.prompts import encode_prompt

HELP = """\
/adapter NAME    answer with this adapter from now on; alone: which there are
/base            answer with the model alone
/compare [TEXT]  the model alone and every adapter answer TEXT, or what was last
/reset           forget the conversation
/help            this
/quit            leave (also Ctrl-D)"""


class Show(Protocol):
    """How a conversation is shown."""

    def begin(self, name: str) -> None:
        """An answer by this adapter follows."""

    def write(self, text: str) -> None:
        """A piece of an answer."""

    def end(self) -> None:
        """The answer is over."""

    def note(self, text: str) -> None:
        """Something that is no answer."""

    def beside(self, answers: list[Answer]) -> None:
        """Answers to one message, to be seen side by side."""


class Chat:
    """A conversation.

    Args:
        opened: the model; its adapters can be switched at any time.
        system: the system message.
        sampling: as for `generate`; greedy by default.

    Attributes:
        messages: what was said so far.
        adapter: who answers now; "base" for the model alone.
    """

    def __init__(self, opened: Opened, system: str | None = None, max_new_tokens: int = 512, **sampling: Any) -> None:
        self.tokenizer = opened.need_tokenizer()
        if not self.tokenizer.chat_template:
            raise ConfigError(
                f"{opened.base} has no chat template, so it cannot tell a question from an answer. "
                "To continue a text: trimtab generate --raw --prompt ..."
            )
        self.model, self.names = opened.model, list(opened.adapters)
        self.adapter = self.names[0] if self.names else BASE
        self.system, self.max_new_tokens, self.sampling = system, max_new_tokens, sampling
        self.messages: list[dict[str, str]] = []

    def say(self, text: str, write: Callable[[str], None] = lambda piece: None) -> Answer:
        """The answer to a message, handed to `write` as it comes; both join the conversation.

        What interrupts it ends the answer where it is: that much is kept.
        """
        said: list[str] = []

        def both(piece: str) -> None:
            said.append(piece)
            write(piece)

        self.messages.append({"role": "user", "content": text})
        try:
            reply = stream(self.model, self.tokenizer, self.messages, both, self._who, self.max_new_tokens, self.system,
                           **self.sampling)  # fmt: skip
        except BaseException:
            self._keep("".join(said).strip())
            raise
        self._keep(reply.text)
        return reply

    def compare(self, text: str = "") -> list[Answer]:
        """What the model alone and every adapter say to a message, or to the last one; the conversation stays as it is.

        Raises:
            ConfigError: there is no message yet.
        """
        asked = list(self.messages)
        while asked and asked[-1]["role"] == "assistant":
            asked.pop()
        if text:
            asked = [*self.messages, {"role": "user", "content": text}]
        if not asked:
            raise ConfigError("There is no message yet: say something, or /compare TEXT.")
        names = [BASE, *self.names] if self.names else None
        return answer(self.model, self.tokenizer, [asked], names, self.max_new_tokens, system=self.system,
                      **self.sampling)  # fmt: skip

    def use(self, name: str) -> None:
        """Let this adapter answer from now on.

        Raises:
            AdapterNameError: there is none of that name.
        """
        if name not in (*self.names, BASE):
            raise AdapterNameError(f"There is no adapter '{name}'. There is {', '.join([*self.names, BASE])}.")
        self.adapter = name

    def reset(self) -> None:
        """Forget the conversation."""
        self.messages.clear()

    def handle(self, line: str, show: Show) -> bool:
        """Do what a line says; False where it says to leave."""
        line = line.strip()
        word, _, rest = line.partition(" ")
        try:
            if not line:
                return True
            if word == "/quit":
                return False
            if word == "/help":
                show.note(HELP)
            elif word == "/base" or (word == "/adapter" and rest):
                self.use(rest.strip() if rest and word == "/adapter" else BASE)
                show.note(f"{self.adapter} answers from now on")
            elif word == "/adapter":
                show.note(", ".join(f"{n} (answers now)" if n == self.adapter else n for n in (*self.names, BASE)))
            elif word == "/reset":
                self.reset()
                show.note("the conversation is forgotten")
            elif word == "/compare":
                show.beside(self.compare(rest.strip()))
            elif word.startswith("/"):
                show.note(f"There is no command {word}.\n{HELP}")
            else:
                self._reply(line, show)
        except (AdapterNameError, ConfigError) as e:
            show.note(str(e))
        return True

    def _reply(self, line: str, show: Show) -> None:
        room = getattr(getattr(self.model, "config", None), "max_position_embeddings", None)
        show.begin(self.adapter)
        try:
            reply = self.say(line, show.write)
        except KeyboardInterrupt:
            show.end()
            show.note("interrupted; what it said so far is kept")
            return
        show.end()
        used = len(encode_prompt(self.tokenizer, self.messages, self.system))
        if room is not None and used > room:
            show.note(f"the conversation has {used} tokens, and the model was made for {room}: /reset")
        elif reply.finish == "length":
            show.note(f"cut after {self.max_new_tokens} tokens (--max-new-tokens)")

    @property
    def _who(self) -> str | None:
        return self.adapter if self.names else None

    def _keep(self, text: str) -> None:
        """Add an answer to the conversation; without one, the message it was for goes too."""
        if text:
            self.messages.append({"role": "assistant", "content": text})
        else:
            self.messages.pop()
