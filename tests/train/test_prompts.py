"""What a row asks is what training generates its answer from."""

from __future__ import annotations

import pytest

from trimtab.errors import DataError
from trimtab.train.data import encode_row
from trimtab.train.prompts import asked_in, encode_prompt, prompt_of, prompts_of

ROWS = [
    {"prompt": "a", "completion": "b"},
    {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
    {"instruction": "a", "input": "x", "output": "b"},
    {"instruction": "a", "output": "b"},
    {"messages": [{"role": r, "content": c} for r, c in (("system", "s"), ("user", "a"), ("assistant", "b"))]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda r: "+".join(r))
def test_a_rows_prompt_is_what_training_generates_from(row, tokenizer) -> None:
    example = encode_row(row, tokenizer)
    assert encode_prompt(tokenizer, prompt_of(row)) == example.ids[: example.prompt_length]


def test_a_row_that_asks_nothing_is_named(tmp_path) -> None:
    (tmp_path / "x.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    with pytest.raises(DataError, match="row 2: a row asks nothing"):
        prompts_of(tmp_path / "x.jsonl")
    assert prompts_of(tmp_path / "x.jsonl", limit=1) == ["a"]
    assert asked_in(tmp_path / "x.jsonl", 2) == []
    with pytest.raises(DataError, match="no file"):
        prompts_of(tmp_path / "y.jsonl")
    (tmp_path / "x.jsonl").write_text("")
    with pytest.raises(DataError, match="no rows"):
        prompts_of(tmp_path / "x.jsonl")


def test_system_and_raw(tokenizer) -> None:
    whole = tokenizer.decode(encode_prompt(tokenizer, "hi", system="be brief"))
    assert whole == "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(encode_prompt(tokenizer, "hi", raw=True)) == "hi"
    tokenizer.chat_template = None
    assert tokenizer.decode(encode_prompt(tokenizer, "hi")) == "hi"
