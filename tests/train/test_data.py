"""Rows of every kind become ids and labels in which exactly the answers are trained."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from trimtab.train.data import DataError, Example, batch_plan, collate, encode_row, encode_rows, read_rows


def trained(example: Example, tokenizer) -> str:
    return tokenizer.decode([id for id in example.labels if id != -100])


def prompt(example: Example, tokenizer) -> str:
    return tokenizer.decode(example.ids[: example.prompt_length])


USER, ASSISTANT = "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n", "Hello.<|im_end|>"

ONE_TURN = [
    {"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]},
    {"prompt": "Hi?", "completion": "Hello."},
    {"prompt": [{"role": "user", "content": "Hi?"}], "completion": [{"role": "assistant", "content": "Hello."}]},
    {"instruction": "Hi?", "output": "Hello."},
    {"instruction": "Hi?", "input": "", "output": "Hello."},
    {"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hello."}]},
]


@pytest.mark.parametrize("row", ONE_TURN, ids=lambda row: "+".join(row))
def test_every_kind_of_row_trains_the_answer_and_its_end(row, tokenizer) -> None:
    example = encode_row(row, tokenizer)
    assert tokenizer.decode(example.ids) == USER + ASSISTANT
    assert trained(example, tokenizer) == ASSISTANT
    assert prompt(example, tokenizer) == USER


def test_instruction_with_input(tokenizer) -> None:
    example = encode_row({"instruction": "Sort ascending", "input": "2, 4, 0", "output": "0, 2, 4"}, tokenizer)
    assert "Sort ascending\n\n2, 4, 0<|im_end|>" in prompt(example, tokenizer)
    assert trained(example, tokenizer) == "0, 2, 4<|im_end|>"


def test_every_assistant_turn_is_trained_and_nothing_else(tokenizer) -> None:
    turns = [("system", "Be brief."), ("user", "A?"), ("assistant", "a."), ("user", "B?"), ("assistant", "b.")]
    example = encode_row({"messages": [{"role": r, "content": c} for r, c in turns]}, tokenizer)
    assert trained(example, tokenizer) == "a.<|im_end|>b.<|im_end|>"
    assert prompt(example, tokenizer).endswith("B?<|im_end|>\n<|im_start|>assistant\n")


def test_a_system_message_for_rows_that_have_none(tokenizer) -> None:
    example = encode_row({"prompt": "Hi?", "completion": "Hello."}, tokenizer, system="Be brief.")
    assert prompt(example, tokenizer) == "<|im_start|>system\nBe brief.<|im_end|>\n" + USER
    turns = [("system", "Be long."), ("user", "Hi?"), ("assistant", "Hello.")]
    row = {"messages": [{"role": r, "content": c} for r, c in turns]}
    assert encode_row(row, tokenizer, system="Be brief.") == encode_row(row, tokenizer)


def test_a_last_user_turn_is_not_kept(tokenizer) -> None:
    turns = [
        {"role": "user", "content": "A?"},
        {"role": "assistant", "content": "a."},
        {"role": "user", "content": "B?"},
    ]
    assert tokenizer.decode(encode_row({"messages": turns}, tokenizer).ids).endswith("a.<|im_end|>")


def test_a_template_that_rewrites_earlier_turns_trains_the_last_one(tokenizer_factory) -> None:
    # As Qwen3's does: only the last answer shows its thinking block.
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if loop.last and m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = tokenizer_factory(template)
    turns = [("user", "A?"), ("assistant", "a."), ("user", "B?"), ("assistant", "b.")]
    example = encode_row({"messages": [{"role": r, "content": c} for r, c in turns]}, tokenizer)
    assert trained(example, tokenizer) == "<think>\n\n</think>\n\nb.<|im_end|>"


def test_a_template_that_never_ends_an_answer_is_refused(tokenizer_factory) -> None:
    tokenizer = tokenizer_factory("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")
    with pytest.raises(DataError, match="row 1: the chat template ends its answer without an end token"):
        encode_rows([ONE_TURN[0]], tokenizer)


def test_without_a_chat_template_prompt_and_completion_are_joined_and_ended(tokenizer_factory) -> None:
    tokenizer = tokenizer_factory(chat_template=None, eos="</s>")
    example = encode_row({"prompt": "2+2=", "completion": "4"}, tokenizer)
    assert tokenizer.decode(example.ids) == "2+2=4</s>"
    assert trained(example, tokenizer) == "4</s>"
    with pytest.raises(DataError, match="no chat template"):
        encode_row(ONE_TURN[0], tokenizer)


def test_text_is_trained_whole_and_ended(tokenizer) -> None:
    example = encode_row({"text": "A document."}, tokenizer)
    assert trained(example, tokenizer) == "A document.<|im_end|>"


def test_a_tokenizer_without_end_token_is_refused(tokenizer_factory) -> None:
    tokenizer = tokenizer_factory(chat_template=None, eos=None)
    with pytest.raises(DataError, match="never stop"):
        encode_row({"text": "A document."}, tokenizer)


@pytest.fixture
def with_bos(tokenizer_factory):
    """As Llama's: the tokenizer adds <s> to what it is given, and so does the chat template."""

    def make(chat: bool):
        template = "<s>{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}</s>{% endfor %}"
        tokenizer = tokenizer_factory(template if chat else None, eos="</s>")
        bos = tokenizer.convert_tokens_to_ids("<s>")
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
        assert tokenizer("x").input_ids[0] == bos
        return tokenizer

    return make


def test_one_bos_with_a_template_and_one_without(with_bos) -> None:
    for chat in (True, False):
        tokenizer = with_bos(chat)
        example = encode_row({"prompt": "Hi?", "completion": "Hello."}, tokenizer)
        assert example.ids.count(tokenizer.bos_token_id) == 1
        assert "Hello.</s>" in trained(example, tokenizer)
        assert "Hi?" not in trained(example, tokenizer)


def test_a_second_bos_is_refused(with_bos) -> None:
    tokenizer = with_bos(True)
    tokenizer.chat_template = "<s>" + tokenizer.chat_template
    with pytest.raises(DataError, match="two BOS"):
        encode_row({"prompt": "Hi?", "completion": "Hello."}, tokenizer)


def test_faults_are_collected_and_rows_named(tokenizer) -> None:
    rows = [
        ONE_TURN[0],
        {"prompt": "Hi?", "completion": ""},
        {"question": "Hi?"},
        {"prompt": "Hi?", "completion": 3},
        {"messages": [{"role": "user", "content": "Hi?"}]},
        {"messages": []},
        {"messages": [{"user": "Hi?"}]},
    ]
    with pytest.raises(DataError) as e:
        encode_rows(rows, tokenizer)
    message = str(e.value)
    assert message.startswith("6 row(s)")
    for number, why in enumerate(
        ["completion is empty", "'question'", "must both be", "no assistant turn", "list of objects", "'user'"], start=2
    ):
        assert any(line.strip().startswith(f"row {number}:") and why in line for line in message.splitlines()), why


def test_rows_too_long_are_named_dropped_or_cut(tokenizer) -> None:
    rows = [{"text": "x" * 50}, {"text": "short"}]
    with pytest.raises(DataError, match="row 1: it has 51 tokens, more than 20"):
        encode_rows(rows, tokenizer, max_length=20)
    assert [len(e.ids) for e in encode_rows(rows, tokenizer, max_length=20, too_long="drop")] == [6]
    assert [len(e.ids) for e in encode_rows(rows, tokenizer, max_length=20, too_long="truncate")] == [20, 6]
    answer_cut_off = [{"prompt": "x" * 50, "completion": "y"}]
    with pytest.raises(DataError, match="nothing left to train on"):
        encode_rows(answer_cut_off, tokenizer, max_length=20, too_long="truncate")
    with pytest.raises(DataError, match="no rows"):
        encode_rows(rows[:1], tokenizer, max_length=20, too_long="drop")


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    asked=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="<"), min_size=1), min_size=1, max_size=3),
    answer=st.text(st.characters(codec="utf-8", exclude_characters="<"), min_size=1),
)
def test_labels_are_the_answers_whatever_the_text(asked, answer, tokenizer) -> None:
    turns = [turn for a in asked for turn in ({"role": "user", "content": a}, {"role": "assistant", "content": answer})]
    example = encode_row({"messages": turns}, tokenizer)
    assert trained(example, tokenizer) == f"{answer}<|im_end|>" * len(asked)
    assert len(example.ids) == len(example.labels)
    assert all(label in (-100, id) for id, label in zip(example.ids, example.labels, strict=True))


# --- files ---


def test_read_rows_of_each_kind_of_file(tmp_path) -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "ç,\n", "completion": "d"}]
    (tmp_path / "r.jsonl").write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "r.json").write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "r.csv").write_text('prompt,completion\na,b\n"ç,\n",d\n', encoding="utf-8")
    for suffix in ("jsonl", "json", "csv"):
        assert read_rows(tmp_path / f"r.{suffix}") == rows


def test_columns_can_be_mapped(tmp_path) -> None:
    (tmp_path / "r.jsonl").write_text('{"q": "a", "a": "b"}\n')
    assert read_rows(tmp_path / "r.jsonl", {"prompt": "q", "completion": "a"}) == [{"prompt": "a", "completion": "b"}]
    with pytest.raises(DataError, match="has no column 'question'; it has a, q"):
        read_rows(tmp_path / "r.jsonl", {"prompt": "question"})


def test_a_bad_line_is_named(tmp_path) -> None:
    (tmp_path / "r.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(DataError, match=r"r\.jsonl, line 2: not JSON: Expecting value \(column 9\)"):
        read_rows(tmp_path / "r.jsonl")
    (tmp_path / "r.parquet").write_text("")
    with pytest.raises(DataError, match=r"r\.parquet is no Parquet file"):
        read_rows(tmp_path / "r.parquet")
    (tmp_path / "l.jsonl").write_text("[1]\n")
    with pytest.raises(DataError, match="JSON object"):
        read_rows(tmp_path / "l.jsonl")


# --- batches ---


def examples(lengths: list[int]) -> list[Example]:
    return [Example(list(range(n)), [-100, *range(1, n)], 1) for n in lengths]


@given(st.lists(st.integers(2, 60), min_size=1, max_size=90), st.integers(1, 9), st.none() | st.integers(0, 5))
def test_a_plan_holds_every_row_once(lengths, size, seed) -> None:
    plan = batch_plan(examples(lengths), size, seed)
    assert sorted(i for batch in plan for i in batch) == list(range(len(lengths)))
    assert max(map(len, plan)) <= size
    assert plan == batch_plan(examples(lengths), size, seed)


def test_a_plan_wastes_little_on_padding_and_seeds_differ() -> None:
    rows = examples([10 + (37 * i) % 90 for i in range(400)])
    plan = batch_plan(rows, 8, seed=1)
    padded = sum(max(len(rows[i].ids) for i in batch) * len(batch) for batch in plan)
    assert padded < 1.06 * sum(len(e.ids) for e in rows)
    assert plan != batch_plan(rows, 8, seed=2)


def test_without_a_seed_the_longest_come_first() -> None:
    assert batch_plan(examples([3, 9, 5]), 2) == [[1, 2], [0]]


def test_collate_masks_padding_by_place() -> None:
    # The pad id is also a real token of the first row, and trained there.
    batch = collate([Example([5, 7, 7], [-100, 7, 7], 1), Example([6, 7], [-100, 7], 1)], pad_id=7)
    assert batch["input_ids"].tolist() == [[5, 7, 7], [6, 7, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 7, 7], [-100, 7, -100]]
