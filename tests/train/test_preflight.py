"""The pre-flight shows what is trained, and stops where nothing would be."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from trimtab.errors import DataError
from trimtab.train.data import prepare
from trimtab.train.preflight import preflight

GOOD = {"prompt": "Hi?", "completion": "Hello."}
SUMS = [{"prompt": f"{i}+{i}?", "completion": str(2 * i)} for i in range(5)]


def rendered(flight, **console) -> str:
    out = io.StringIO()
    flight.render(Console(file=out, **{"width": 100, **console}))
    return out.getvalue()


def messages(flight) -> list[str]:
    return [str(finding) for finding in flight.findings]


def test_nothing_to_say_of_good_rows(tokenizer) -> None:
    flight = preflight(prepare(SUMS, tokenizer), tokenizer, stop_ids=[tokenizer.eos_token_id], vocab_size=300)
    assert flight.findings == []
    text = rendered(flight)
    assert "the rows: 5 of 5 rows are used" in text
    assert "5 x 'prompt' and 'completion', as a conversation: 'completion' is trained, with its end" in text
    assert "fewest trained in an example: 2 (row 1)" in text
    assert "chat template: the tokenizer's chat template, by rendering prefixes" in text
    assert text.count("of them trained\n") == 3  # examples


def test_without_colours_brackets_say_what_is_trained(tokenizer) -> None:
    flight = preflight(prepare(SUMS, tokenizer), tokenizer)
    assert "⟦2<|im_end|>⟧" in rendered(flight)
    assert "⟦2<|im_end|>⟧" in rendered(flight, force_terminal=True, no_color=True)
    ascii = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    console = Console(file=ascii, width=100)
    flight.render(console)
    ascii.seek(0)
    assert "[[2<|im_end|>]]" in ascii.read()
    coloured = rendered(flight, force_terminal=True, color_system="standard")
    assert "\x1b[1;32m2<|im_end|>\x1b[0m" in coloured
    assert "⟦" not in coloured


def test_what_is_in_a_row_cannot_steer_the_terminal(tokenizer) -> None:
    row = {"prompt": "[red]\x1b[2Jx", "completion": "\x07[/bold] y\rz"}
    text = rendered(preflight(prepare([row], tokenizer), tokenizer))
    assert "[red]\\x1b[2Jx" in text
    assert "⟦\\x07[/bold] y\\rz<|im_end|>⟧" in text
    assert not re.search("[\x00-\x08\x0b-\x1f]", text)


def test_long_examples_are_shown_by_their_ends(tokenizer) -> None:
    row = {"prompt": "a" * 5000, "completion": "b" * 4000 + "."}
    text = rendered(preflight(prepare([row], tokenizer), tokenizer)).replace("\n  ", "")
    assert "characters more" in text
    assert "b.<|im_end|>⟧" in text
    assert len(text) < 2500


@pytest.mark.parametrize("width", [20, 40, 80, 120])
def test_it_fits_any_width(width, tokenizer) -> None:
    text = rendered(preflight(prepare(SUMS, tokenizer), tokenizer), width=width)
    assert max(map(len, text.splitlines())) <= width


def test_warnings_name_the_rows(tokenizer) -> None:
    rows = [{"text": "x" * 50}, {"text": "short"}, {"text": ""}]
    flight = preflight(prepare(rows, tokenizer, max_length=20, too_long="truncate", skip_bad=True), tokenizer)
    assert messages(flight) == [
        "1 row(s) left out, because they are bad: row 3: no token of it would be trained (is the answer empty?)",
        "1 row(s) cut, because they are too long: row 1",
        "1 example(s) in which no end token is trained, so the model may never stop: row 1",
    ]
    assert flight.warnings == flight.findings
    assert "warning: 1 row(s) cut, because they are too long: row 1" in rendered(flight)
    rows = [{"text": "x" * 50}] * 6 + [{"text": "short"}]
    flight = preflight(prepare(rows, tokenizer, max_length=20, too_long="drop"), tokenizer)
    assert messages(flight) == ["6 row(s) left out, because they are too long: row 1; row 2; row 3 and 3 more"]


def test_an_end_at_which_the_model_does_not_stop(tokenizer) -> None:
    flight = preflight(prepare(SUMS, tokenizer), tokenizer, stop_ids={1, 2})
    [finding] = flight.findings
    assert finding.level == "warning"
    assert "answers end with '<|im_end|>', at which the model's generation does not stop" in finding.message


def test_a_template_that_forgets_bos(tokenizer_factory) -> None:
    from tests.train.test_prepare import with_bos

    tokenizer = with_bos(tokenizer_factory())
    [finding] = preflight(prepare([GOOD, {"text": "a"}], tokenizer), tokenizer).findings
    assert finding.message == "1 example(s) begin without BOS, which the tokenizer gives every text"


def test_it_aborts_rather_than_train_on_nothing(tokenizer) -> None:
    prepared = prepare(SUMS, tokenizer)
    silent = replace(prepared.examples[3], labels=[-100] * len(prepared.examples[3].ids))
    prepared.examples[3] = silent
    with pytest.raises(DataError, match=r"cannot be trained on:\n  no token would be trained: row 4$"):
        preflight(prepared, tokenizer)
    prepared.examples[:] = []
    with pytest.raises(DataError, match="there are no rows"):
        preflight(prepared, tokenizer)


def test_it_aborts_on_what_the_model_cannot_take(tokenizer) -> None:
    prepared = prepare(SUMS, tokenizer)
    with pytest.raises(DataError, match="token ids that the model's embedding of 200 rows does not have: row 1; row 2"):
        preflight(prepared, tokenizer, vocab_size=200)
    bos = tokenizer.bos_token_id
    twice = replace(prepared.examples[1], ids=[bos, bos, 5], labels=[bos, bos, 5])
    prepared.examples[1] = twice
    with pytest.raises(DataError, match="two BOS tokens at the beginning: row 2"):
        preflight(prepared, tokenizer)
