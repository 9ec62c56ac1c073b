"""Exactly the assistant's words are trained, after exactly what the model is asked with."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import trl.chat_template_utils
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from trimtab.errors import DataError, MissingPackageError
from trimtab.files.sources import resolve_base
from trimtab.train import masks
from trimtab.train.data import Example, prepare
from trimtab.train.kinds import parse
from trimtab.train.masks import Template, encode_chat

Q, A = {"role": "user", "content": "A?"}, {"role": "assistant", "content": "a."}
Q2, A2 = {"role": "user", "content": "B?"}, {"role": "assistant", "content": "b."}
LOOK = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"function": {"name": "look", "arguments": {"city": "Rome"}}}],
}
SUNNY = {"role": "tool", "name": "look", "content": "sunny"}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]

MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen3's does: thinking is shown in the last answer only.
FORGETS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if loop.last and m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALLS = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] }}{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} "
    "{{ c.function.arguments | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def encode(tokenizer: Any, *messages: dict[str, Any], train_on: Any = "completions", name: Any = "own", **row: Any):
    chat = parse({"messages": list(messages), **row}, True)
    return encode_chat(chat, Template(tokenizer, name), train_on)


def shown(examples: list[Example], tokenizer: Any) -> list[str]:
    return ["".join(f"⟦{text}⟧" if t else text for text, t in e.spans(tokenizer)) for e in examples]


def turn(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}"


BOTH = (
    turn("user", "A?<|im_end|>\n")
    + turn("assistant", "{a}\n")
    + turn("user", "B?<|im_end|>\n")
    + turn("assistant", "{b}")
)


@pytest.mark.parametrize("template", [None, MARKED], ids=["prefixes", "marks"])
class TestByPrefixesAndByMarks:
    def test_a_turn_that_opts_out_is_read_and_not_trained(self, template, tokenizer_factory) -> None:
        tokenizer = tokenizer_factory(*[template] * bool(template))
        [example], _ = encode(tokenizer, Q, {**A, "weight": 0}, Q2, A2)
        assert shown([example], tokenizer) == [BOTH.format(a="a.<|im_end|>", b="⟦b.<|im_end|>⟧")]
        [example], _ = encode(tokenizer, Q, A, Q2, {**A2, "train": False})
        assert shown([example], tokenizer) == [turn("user", "A?<|im_end|>\n") + turn("assistant", "⟦a.<|im_end|>⟧")]
        with pytest.raises(DataError, match="no assistant turn to train on"):
            encode(tokenizer, Q, {**A, "train": False})

    def test_every_turn_the_last_or_all(self, template, tokenizer_factory) -> None:
        tokenizer = tokenizer_factory(*[template] * bool(template))
        examples, notes = encode(tokenizer, Q, A, Q2, A2)
        assert shown(examples, tokenizer) == [BOTH.format(a="⟦a.<|im_end|>⟧", b="⟦b.<|im_end|>⟧")]
        assert notes == set()
        examples, _ = encode(tokenizer, Q, A, Q2, A2, train_on="last")
        assert shown(examples, tokenizer) == [BOTH.format(a="a.<|im_end|>", b="⟦b.<|im_end|>⟧")]
        [example], _ = encode(tokenizer, Q, A, Q2, A2, train_on="all")
        assert shown([example], tokenizer) == ["⟦" + BOTH.format(a="a.<|im_end|>", b="b.<|im_end|>\n⟧")]
        assert tokenizer.decode(example.ids[: example.prompt_length]).endswith(turn("assistant", ""))

    def test_a_greeting_answers_nothing_and_is_not_trained(self, template, tokenizer_factory) -> None:
        tokenizer = tokenizer_factory(*[template] * bool(template))
        examples, _ = encode(tokenizer, A2, Q, A)
        expected = (
            turn("assistant", "b.<|im_end|>\n") + turn("user", "A?<|im_end|>\n") + turn("assistant", "⟦a.<|im_end|>⟧")
        )
        assert shown(examples, tokenizer) == [expected]
        with pytest.raises(DataError, match=r"no assistant turn .* answers another \(its roles: 'assistant'\)"):
            encode(tokenizer, A)


def test_where_masks_come_from_is_said(tokenizer_factory) -> None:
    assert Template(tokenizer_factory()).source() == "the tokenizer's chat template, by rendering prefixes"
    assert Template(tokenizer_factory(MARKED)).source() == "the tokenizer's chat template, by its generation marks"
    assert Template(tokenizer_factory(MARKED), "trl").source().endswith("by its generation marks")
    assert Template(tokenizer_factory(None)).source() == "none: the tokenizer has no chat template"
    qwen = tokenizer_factory(trl.chat_template_utils.qwen3_chat_template)
    assert Template(qwen, "trl").source() == "TRL's training template for Qwen3"
    for template in (None, FORGETS):
        with pytest.raises(DataError, match="training template"):
            Template(tokenizer_factory(template), "trl")


def test_without_trl_its_templates_are_refused(monkeypatch, tokenizer) -> None:
    monkeypatch.setitem(__import__("sys").modules, "trl", None)
    with pytest.raises(MissingPackageError, match=r"needs trl, not installed here: pip install .trimtab\[trl\]"):
        Template(tokenizer, "trl")


def test_answers_that_a_template_rewrites_get_examples_of_their_own(tokenizer_factory) -> None:
    tokenizer = tokenizer_factory(FORGETS)
    thinking = [Q, {**A, "reasoning_content": "hm"}, Q2, {**A2, "reasoning_content": "so"}]
    examples, notes = encode(tokenizer, *thinking)
    assert shown(examples, tokenizer) == [
        turn("user", "A?<|im_end|>\n") + turn("assistant", "⟦<think>hm</think>a.<|im_end|>⟧"),
        BOTH.format(a="a.<|im_end|>", b="⟦<think>so</think>b.<|im_end|>⟧"),
    ]
    assert notes == {masks.SPLIT}
    # An answer that is the same in both is trained once.
    examples, notes = encode(tokenizer, Q, A, Q2, {**A2, "reasoning_content": "so"})
    assert len(examples) == 1
    assert notes == set()
    examples, _ = encode(tokenizer, *thinking, train_on="last")
    assert len(examples) == 1
    prepared = prepare([{"messages": thinking}, {"messages": [Q, A]}], tokenizer)
    assert [e.row for e in prepared.examples] == [0, 0, 1]
    assert prepared.places == ["row 1", "row 1", "row 2"]
    assert prepared.report.used == 2
    assert prepared.report.notes == {masks.SPLIT: ["row 1"]}


def test_rewritten_answers_by_marks(tokenizer_factory) -> None:
    template = FORGETS.replace("<think>{{", "{% generation %}<think>{{").replace(
        "{% endif %}{{", "{% endgeneration %}{% endif %}{{"
    )
    tokenizer = tokenizer_factory(template)
    examples, notes = encode(tokenizer, Q, {**A, "thinking": "hm"}, Q2, {**A2, "thinking": "so"})
    assert [s.count("⟦<think>") for s in shown(examples, tokenizer)] == [1, 1]
    assert notes == {masks.SPLIT}


def test_a_template_that_changes_what_was_asked_is_refused(tokenizer_factory) -> None:
    # It counts the messages at the top.
    template = "{{ messages | length }}" + FORGETS
    with pytest.raises(DataError, match="what is before turn 2 otherwise once it is answered"):
        encode(tokenizer_factory(template), Q, A)


def test_a_template_that_asks_with_more_than_it_shows_is_noted(tokenizer_factory) -> None:
    # As DeepSeek-R1's does: it asks for thinking, and does not show it.
    template = FORGETS.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
    tokenizer = tokenizer_factory(template)
    examples, notes = encode(tokenizer, Q, A)
    assert shown(examples, tokenizer) == [turn("user", "A?<|im_end|>\n") + turn("assistant", "⟦a.<|im_end|>⟧")]
    assert notes == {masks.ASKED_OTHERWISE}


def test_tools_and_calls_are_shown_or_refused(tokenizer_factory, tokenizer) -> None:
    caller = tokenizer_factory(CALLS)
    examples, notes = encode(caller, Q, LOOK, SUNNY, A, tools=TOOLS)
    text = shown(examples, caller)[0]
    assert '⟦<call>look {"city": "Rome"}<|im_end|>⟧' in text
    assert text.endswith("tool\nsunny<|im_end|>\n<|im_start|>assistant\n⟦a.<|im_end|>⟧")
    assert text.startswith('[{"type": "function"')
    assert notes == set()
    with pytest.raises(DataError, match="does not show the call of the tool 'look'"):
        encode(tokenizer, Q, LOOK, SUNNY, A, tools=TOOLS)
    assert encode(tokenizer, Q, A, tools=TOOLS)[1] == {masks.NO_TOOLS}


def test_arguments_are_strings_where_the_template_joins_them(tokenizer_factory) -> None:
    # As DeepSeek-V3's does.
    tokenizer = tokenizer_factory(
        CALLS.replace("{{ c.function.arguments | tojson }}", "{{ '' + c.function.arguments }}")
    )
    examples, _ = encode(tokenizer, Q, LOOK)
    assert shown(examples, tokenizer)[0].endswith('⟦<call>look {"city": "Rome"}<|im_end|>⟧')


def test_what_a_template_leaves_out(tokenizer_factory, tokenizer) -> None:
    assert encode(tokenizer, Q, {**A, "reasoning": "hm"})[1] == {masks.LEFT_OUT}
    strips = tokenizer_factory(FORGETS.replace("{{ m['content'] }}", "{{ m['content'].split('</think>')[-1] }}"))
    assert encode(strips, Q, {**A, "content": "<think>hm</think>a."})[1] == {masks.LEFT_OUT}
    # As a template for images and text does with a string.
    silent = tokenizer_factory(FORGETS.replace("{{ m['content'] }}", "{% if m.content is not string %}x{% endif %}"))
    with pytest.raises(DataError, match="does not show what the assistant says in turn 2"):
        encode(silent, Q, A)


def test_a_template_that_raises_says_what_and_where(tokenizer_factory) -> None:
    raising = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    tokenizer = tokenizer_factory(raising + FORGETS)
    with pytest.raises(DataError, match="row 2: the chat template raises TemplateError: System role not supported"):
        prepare([{"messages": [Q, A]}, {"messages": [{"role": "system", "content": "s"}, Q, A]}], tokenizer)
    tokenizer = tokenizer_factory("{{ messages[0]['name'] + 1 }}")
    with pytest.raises(DataError, match="the chat template raises"):
        encode(tokenizer, Q, A)


def test_a_special_token_in_a_message_is_noted(tokenizer) -> None:
    assert encode(tokenizer, {**Q, "content": "A?<|im_end|>"}, A)[1] == {masks.SPECIAL}


def test_options_of_a_row_reach_its_template(tokenizer_factory) -> None:
    tokenizer = tokenizer_factory("{{ mood or '' }}" + FORGETS)
    examples, _ = encode(tokenizer, Q, A, chat_template_kwargs={"mood": "gay"})
    assert shown(examples, tokenizer)[0].startswith("gay<|im_start|>")


# --- whatever the text ---

WORDS = st.text(st.characters(codec="utf-8", exclude_characters="<"), min_size=1, max_size=12)
SPOKEN = st.lists(st.tuples(st.sampled_from(["user", "assistant", "tool"]), WORDS, st.booleans()), max_size=5)


@pytest.mark.parametrize("template", [None, MARKED], ids=["prefixes", "marks"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(turns=SPOKEN)
def test_trained_are_exactly_the_answers_and_their_ends(template, turns, tokenizer_factory) -> None:
    tokenizer = tokenizer_factory(*[template] * bool(template))
    messages = [Q] + [{"role": r, "content": c, **({} if train else {"weight": 0})} for r, c, train in turns]
    said = "".join(f"{content}<|im_end|>" for role, content, train in turns if train and role == "assistant")
    if not said:
        with pytest.raises(DataError, match="no assistant turn"):
            encode(tokenizer, *messages)
        return
    [example], _ = encode(tokenizer, *messages)
    assert tokenizer.decode([label for label in example.labels if label != -100]) == said
    assert all(label in (-100, id) for id, label in zip(example.ids, example.labels, strict=True))
    assert example.labels[-1] != -100
    last = next(c for r, c, train in reversed(turns) if train and r == "assistant")
    assert tokenizer.decode(example.ids[example.prompt_length :]) == f"{last}<|im_end|>"


@pytest.mark.slow
def test_the_same_where_tokens_merge() -> None:
    tokenizer = AutoTokenizer.from_pretrained(resolve_base("smollm2-135m-instruct"))

    @settings(max_examples=200, deadline=None)
    @given(turns=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3))
    def holds(turns) -> None:
        said = [answer for _, answer in turns]
        # A line break at the beginning merges with the one of the template, and some rare characters have no tokens.
        assume(not any(a[0].isspace() or tokenizer.decode(tokenizer(a).input_ids) != a for a in said))
        pairs = [({"role": "user", "content": a}, {"role": "assistant", "content": b}) for a, b in turns]
        [example], _ = encode(tokenizer, *(message for pair in pairs for message in pair))
        trained = tokenizer.decode([label for label in example.labels if label != -100])
        assert trained == "".join(f"{answer}<|im_end|>" for answer in said)

    holds()


# --- the templates of real models ---

FOLDER = Path(trl.chat_template_utils.__file__).parent / "chat_templates"
FAMILIES = [path.stem.removesuffix("_training") for path in sorted(FOLDER.glob("*_training.jinja"))]
REFUSED = {  # each by name
    "glm4moe": "ends its answer without an end token",
    "idefics3": "does not show what the assistant says",  # content as parts, for images
    "smolvlm": "does not show what the assistant says",
    "llava_next": "the chat template raises",
}
CONTROL = re.compile(r"<[|｜][^<>\n]{1,40}[|｜]>|<\|?\w+\|?>|\[/?[A-Z_]+\]")


@pytest.mark.parametrize("family", FAMILIES)
def test_real_templates_give_the_answers_that_trls_marks_do(family, tokenizer_factory) -> None:
    text = (FOLDER / f"{family}.jinja").read_text(encoding="utf-8")
    tokenizer = tokenizer_factory(text, eos="</s>")
    tokenizer.add_tokens(sorted(set(CONTROL.findall(text))), special_tokens=True)
    conversation = [Q, A, Q2, A2]
    if family in REFUSED:
        with pytest.raises(DataError, match=REFUSED[family]):
            encode(tokenizer, *conversation)
        return
    ours, _ = encode(tokenizer, *conversation)
    theirs, _ = encode(tokenizer, *conversation, name="trl")
    said = [text for example in ours for text, trained in example.spans(tokenizer) if trained]
    marked = [text for example in theirs for text, trained in example.spans(tokenizer) if trained]
    assert len(theirs) == 1
    assert len(said) == len(marked) == 2
    for answer, with_more in zip(said, marked):
        # The marks may begin with what the model is asked with, and end with a line break.
        if len(ours) == 1:
            assert with_more.rstrip("\n").endswith(answer)
        content = "a." if answer is said[0] else "b."
        assert content in answer
        assert not answer.endswith(content)  # an end token follows
        assert not answer.endswith("\n")
