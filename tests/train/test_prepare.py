"""Every row is used, or the report says what became of it."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from trimtab.errors import DataError
from trimtab.train import encode, masks
from trimtab.train.data import prepare
from trimtab.train.rows import load_rows

GOOD = {"prompt": "Hi?", "completion": "Hello."}


def text_of(ids, tokenizer) -> str:
    return tokenizer.decode([id for id in ids if id != -100])


def test_the_report(tokenizer, tmp_path) -> None:
    rows = [GOOD, {"text": "A document."}, {**GOOD, "topic": "greeting"}, {"messages": [*_turns("A?", "a.")]}]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prepared = prepare(load_rows(tmp_path / "r.jsonl"), tokenizer)
    report = prepared.report
    assert prepared.places == [f"r.jsonl, line {i}" for i in range(1, 5)]
    assert [e.row for e in prepared.examples] == [0, 1, 2, 3]
    assert report.kinds == {"prompt and completion": 2, "text": 1, "messages": 1}
    assert report.rows == report.used == 4
    assert report.unused == ["topic"]
    assert report.supervised == [7, 11, 7, 3]  # of the text all but its first token, which nothing predicts
    assert report.tokens == sum(len(e.ids) for e in prepared.examples)
    assert report.longest == max(len(e.ids) for e in prepared.examples)
    assert report.template == "the tokenizer's chat template, by rendering prefixes"
    assert report.ends == {tokenizer.eos_token_id: 4}
    assert report.without_end == report.truncated == report.dropped == report.skipped == []
    assert report.example == "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n⟦Hello.<|im_end|>⟧"
    facts = json.loads(json.dumps(report.facts()))
    assert (facts["examples"], facts["supervised"], facts["fewest_supervised"]) == (4, 28, 3)


def _turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 9, contents)]


def test_a_csv_of_two_columns_needs_nothing_but_its_name(tokenizer, tmp_path) -> None:
    (tmp_path / "r.csv").write_text("Frage,Antwort\n2+2?,4\n3+3?,6\n")
    prepared = prepare(load_rows(tmp_path / "r.csv"), tokenizer)
    assert prepared.report.columns == {"question": "Frage", "answer": "Antwort"}
    assert [text_of(e.labels, tokenizer) for e in prepared.examples] == ["4<|im_end|>", "6<|im_end|>"]
    assert prepared.places[1] == "r.csv, line 3"


BAD = [
    ({"prompt": "Hi?", "completion": ""}, "the completion is empty"),
    ({"text": ""}, "no token of it would be trained"),
    ({"question": "Hi?"}, "its keys are 'question'"),
    ({"prompt": "Hi?", "completion": 3}, "they must both be strings"),
    ({"prompt": "Hi?", "completion": "half a \ud83d"}, "is no valid Unicode"),
    ({"messages": _turns("Hi?")}, "no assistant turn"),
    ({"messages": [*_turns("Hi?"), {"role": "assistant", "content": "x", "weight": 0}]}, "no assistant turn"),
    ({"input_ids": [5, 6], "labels": [-100, -100]}, "no token of it would be trained"),
    ({"input_ids": [5, 9999]}, "'input_ids' holds 9999, and the tokenizer has"),
    ({"prompt": "x" * 90, "completion": "y"}, "tokens, more than 80"),
    ("a string", "it is a str, not a dictionary"),
]


@pytest.mark.parametrize(("row", "reason"), BAD, ids=[reason for _, reason in BAD])
def test_a_bad_row_is_named_and_can_be_skipped(row, reason, tokenizer) -> None:
    with pytest.raises(DataError, match=rf"1 row\(s\) cannot be trained on:\n  row 2: .*{reason}"):
        prepare([GOOD, row], tokenizer, max_length=80)
    report = prepare([GOOD, row], tokenizer, max_length=80, skip_bad=True).report
    assert [fault.where for fault in report.skipped] == ["row 2"]
    assert (report.rows, report.used) == (2, 1)


def test_nothing_left_is_an_error_even_where_bad_rows_are_skipped(tokenizer) -> None:
    with pytest.raises(DataError, match=r"row 1: .*empty"):
        prepare([{"prompt": "a", "completion": ""}], tokenizer, skip_bad=True)
    with pytest.raises(DataError, match="no rows to train on"):
        prepare([], tokenizer)


def test_bad_lines_and_bad_rows_are_counted_together(tokenizer, tmp_path) -> None:
    (tmp_path / "r.jsonl").write_text("x\n" + json.dumps(GOOD) + '\n{"a": 1}\n')
    report = prepare(load_rows(tmp_path / "r.jsonl", skip_bad=True), tokenizer, skip_bad=True).report
    assert [fault.where for fault in report.skipped] == ["r.jsonl, line 1", "r.jsonl, line 3"]
    assert (report.rows, report.used) == (3, 1)


# --- length ---


def test_what_is_too_long_is_dropped_or_cut_and_reported(tokenizer) -> None:
    rows = [{"text": "x" * 50}, {"text": "short"}]
    dropped = prepare(rows, tokenizer, max_length=20, too_long="drop")
    assert dropped.report.dropped == ["row 1"]
    assert (dropped.report.used, dropped.report.rows) == (1, 2)
    cut = prepare(rows, tokenizer, max_length=20, too_long="truncate")
    assert cut.report.truncated == cut.report.without_end == ["row 1"]  # and its end token with it
    assert [len(e.ids) for e in cut.examples] == [20, 6]
    ends = prepare([{"prompt": "x" * 90, "completion": "yes"}], tokenizer, max_length=20, too_long="keep_end")
    assert text_of(ends.examples[0].labels, tokenizer) == "yes<|im_end|>"
    assert ends.report.truncated == ["row 1"]
    assert ends.report.without_end == []
    example = ends.examples[0]
    assert tokenizer.decode(example.ids[example.prompt_length :]) == "yes<|im_end|>"


def test_the_tokenizers_own_limit_counts(tokenizer) -> None:
    tokenizer.model_max_length = 10
    with pytest.raises(DataError, match="it has 13 tokens, more than 10"):
        prepare([{"text": "x" * 12}], tokenizer)
    assert prepare([{"text": "x" * 12}], tokenizer, max_length=13).report.longest == 13


def with_bos(tokenizer):
    """As Llama's: the tokenizer adds <s> to what it is given."""
    bos = tokenizer.convert_tokens_to_ids("<s>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return tokenizer


def test_the_beginning_is_cut_behind_bos(tokenizer_factory) -> None:
    tokenizer = with_bos(tokenizer_factory(None, eos="</s>"))
    row = {"prompt": "0123456789", "completion": "yes"}
    [example] = prepare([row], tokenizer, max_length=8, too_long="keep_end").examples
    assert tokenizer.decode(example.ids) == "<s>789yes</s>"
    assert tokenizer.decode(example.ids[: example.prompt_length]) == "<s>789"
    assert text_of(example.labels, tokenizer) == "yes</s>"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=st.text("xyz", max_size=20), answer=st.text("ab", min_size=1, max_size=20), limit=st.integers(2, 60))
def test_nothing_is_longer_than_the_limit_or_cut_in_silence(prompt, answer, limit, tokenizer) -> None:
    row = {"prompt": prompt, "completion": answer}
    [whole] = prepare([row], tokenizer).examples
    for too_long in ("truncate", "keep_end"):
        if too_long == "truncate" and whole.prompt_length >= limit:
            with pytest.raises(DataError, match=f"cut to {limit} tokens it has nothing left to train on"):
                prepare([row], tokenizer, max_length=limit, too_long=too_long)
            continue
        prepared = prepare([row], tokenizer, max_length=limit, too_long=too_long)
        [example] = prepared.examples
        assert len(example.ids) == len(example.labels) == min(limit, len(whole.ids))
        assert bool(prepared.report.truncated) == (len(whole.ids) > limit)
        assert 0 <= example.prompt_length <= len(example.ids)
        assert example.trained


# --- what is trained ---


def test_prompts_are_trained_where_all_is(tokenizer_factory) -> None:
    tokenizer = tokenizer_factory(None, eos="</s>")
    [example] = prepare([GOOD], tokenizer, train_on="all").examples
    assert example.labels == example.ids
    assert tokenizer.decode(example.ids[: example.prompt_length]) == "Hi?"


def test_plain_strings_go_past_the_chat_template(tokenizer) -> None:
    prepared = prepare([GOOD], tokenizer, plain=True)
    assert tokenizer.decode(prepared.examples[0].ids) == "Hi?Hello.<|im_end|>"
    assert prepared.report.notes == {encode.TOUCHING: ["row 1"]}
    assert prepared.report.template == "none is needed"
    prepared = prepare([{"question": "Hi?", "answer": "Hello."}], tokenizer, plain=True)
    assert tokenizer.decode(prepared.examples[0].ids) == "Hi?\n\nHello.<|im_end|>"
    assert prepared.report.notes == {}


def test_a_rendered_text_is_not_given_a_second_bos(tokenizer_factory) -> None:
    tokenizer = with_bos(tokenizer_factory(None, eos="</s>"))
    for text in ("Hi.", "<s>Hi."):
        prepared = prepare([{"text": text}], tokenizer)
        assert tokenizer.decode(prepared.examples[0].ids) == "<s>Hi.</s>"
        assert prepared.report.bos == 1


def test_an_end_that_is_not_trained_is_reported(tokenizer_factory) -> None:
    # The marks of this template leave the end token to the next message, as some do.
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    prepared = prepare([GOOD, {"text": "a"}], tokenizer_factory(template))
    assert prepared.report.without_end == ["row 1"]
    # A trained newline behind the end token is no harm.
    ended = template.replace("{% endgeneration %}", "<|im_end|>{{ '\n' }}{% endgeneration %}")
    assert prepare([GOOD], tokenizer_factory(ended)).report.without_end == []


def test_a_system_message_from_outside_and_from_the_row(tokenizer) -> None:
    [example] = prepare([GOOD], tokenizer, system="Be brief.").examples
    assert tokenizer.decode(example.ids).startswith("<|im_start|>system\nBe brief.<|im_end|>")
    [example] = prepare([{**GOOD, "system": "Be long."}], tokenizer, system="Be brief.").examples
    assert tokenizer.decode(example.ids).startswith("<|im_start|>system\nBe long.<|im_end|>")


def test_a_system_message_that_has_no_place_is_said(tokenizer_factory) -> None:
    report = prepare([GOOD], tokenizer_factory(None, eos="</s>"), system="Be brief.").report
    assert "there is no conversation that the system message could be in" in report.notes


@pytest.mark.parametrize("option", ["too_long", "train_on", "template"])
def test_a_word_that_is_none_is_refused(option, tokenizer) -> None:
    with pytest.raises(DataError, match=f"{option} is 'drp'; it can be '"):
        prepare([GOOD], tokenizer, **{option: "drp"})


def test_notes_name_their_rows(tokenizer) -> None:
    thinking = {"messages": [*_turns("A?"), {"role": "assistant", "content": "a.", "thinking": "hm"}]}
    report = prepare([GOOD, thinking, thinking], tokenizer).report
    assert report.notes == {masks.LEFT_OUT: ["row 2", "row 3"]}
