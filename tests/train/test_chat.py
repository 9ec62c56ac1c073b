"""A conversation and its commands."""

from __future__ import annotations

import pytest
import torch

from trimtab import LoraConfig, get_peft_model
from trimtab.errors import AdapterNameError, ConfigError
from trimtab.shell.opening import Opened
from trimtab.train.chat import HELP, Chat
from trimtab.train.generate import answer


class Shown:
    def __init__(self) -> None:
        self.said: list[tuple[str, str]] = []
        self.notes: list[str] = []
        self.tables: list[list] = []
        self.interrupt_after: int | None = None

    def begin(self, name: str) -> None:
        self.said.append((name, ""))

    def write(self, text: str) -> None:
        name, before = self.said[-1]
        self.said[-1] = (name, before + text)
        if self.interrupt_after is not None and len(before + text) >= self.interrupt_after:
            raise KeyboardInterrupt

    def end(self) -> None:
        pass

    def note(self, text: str) -> None:
        self.notes.append(text)

    def beside(self, answers) -> None:
        self.tables.append(answers)


@pytest.fixture
def opened(model, tokenizer):
    torch.manual_seed(1)

    def config():
        return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)

    model = get_peft_model(model, config(), "one")
    model.add_adapter("two", config())
    return Opened(model.eval(), tokenizer, "tiny", {"one": "x", "two": "y"})


def test_a_conversation_keeps_what_was_said(opened) -> None:
    chat, shown = Chat(opened, max_new_tokens=5), Shown()
    assert chat.handle("Hello", shown)
    first = answer(opened.model, opened.tokenizer, ["Hello"], ["one"], max_new_tokens=5)[0].text
    assert chat.messages == [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": first}]
    assert shown.said[0][0] == "one"
    assert shown.said[0][1].strip() == first
    assert shown.notes == ["cut after 5 tokens (--max-new-tokens)"]
    chat.handle("And now?", shown)
    asked = [*chat.messages[:3]]
    assert chat.messages[3]["content"] == answer(opened.model, opened.tokenizer, [asked], ["one"], 5)[0].text


def test_switching(opened) -> None:
    chat, shown = Chat(opened, max_new_tokens=3), Shown()
    chat.handle("/adapter two", shown)
    chat.handle("Hello", shown)
    chat.handle("/base", shown)
    chat.handle("Hello", shown)
    assert [name for name, _ in shown.said] == ["two", "base"]
    chat.handle("/adapter", shown)
    assert shown.notes[-1] == "one, two, base (answers now)"
    chat.handle("/adapter three", shown)
    assert "There is no adapter 'three'. There is one, two, base." in shown.notes
    assert chat.adapter == "base"
    with pytest.raises(AdapterNameError):
        chat.use("three")


def test_comparing_leaves_the_conversation(opened) -> None:
    chat, shown = Chat(opened, max_new_tokens=3), Shown()
    chat.handle("/compare", shown)
    assert "no message yet" in shown.notes[0]
    chat.handle("/compare Hello there", shown)
    assert [a.adapter for a in shown.tables[0]] == ["base", "one", "two"]
    assert not chat.messages
    chat.handle("Hello there", shown)
    kept = list(chat.messages)
    chat.handle("/compare", shown)
    assert [a.text for a in shown.tables[1]] == [a.text for a in shown.tables[0]]
    assert chat.messages == kept


def test_reset_help_quit_and_what_is_no_command(opened) -> None:
    chat, shown = Chat(opened, max_new_tokens=3), Shown()
    chat.handle("Hello", shown)
    chat.handle("/reset", shown)
    assert not chat.messages
    chat.handle("/help", shown)
    assert shown.notes[-1] == HELP
    chat.handle("/nonsense", shown)
    assert "no command /nonsense" in shown.notes[-1]
    said = len(shown.said)
    assert chat.handle("   ", shown)
    assert len(shown.said) == said
    assert not chat.handle(" /quit ", shown)


def test_an_interrupted_answer_is_kept_as_far_as_it_came(opened) -> None:
    chat, shown = Chat(opened, max_new_tokens=60), Shown()
    shown.interrupt_after = 1
    assert chat.handle("Hello", shown)
    assert "interrupted" in shown.notes[-1]
    assert chat.messages[0]["content"] == "Hello"
    assert [m["role"] for m in chat.messages] in (["user", "assistant"], [])
    assert opened.model.active_adapters == ["one"]


def test_a_model_alone_and_a_system_message(opened) -> None:
    alone = Opened(opened.model.unload(), opened.tokenizer, "tiny")
    chat, shown = Chat(alone, system="be brief", max_new_tokens=3), Shown()
    chat.handle("Hello", shown)
    assert shown.said[0][0] == "base"
    assert chat.messages[0] == {"role": "user", "content": "Hello"}
    assert len(chat.compare("Hello")) == 1


def test_a_conversation_that_outgrows_the_model_is_said(opened) -> None:
    opened.model.config.max_position_embeddings = 10
    shown = Shown()
    Chat(opened, max_new_tokens=2).handle("Hello", shown)
    assert "was made for 10" in shown.notes[-1]


def test_no_template(opened) -> None:
    opened.tokenizer.chat_template = None
    with pytest.raises(ConfigError, match=r"no chat template.*trimtab generate --raw"):
        Chat(opened)
