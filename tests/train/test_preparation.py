"""The rows of a run, from what is named to what is learned: splits, kinds, packing, and what is said of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.train.conftest import make_model, make_tokenizer
from trimtab.errors import DataError, TrainError
from trimtab.train.batches import Batches
from trimtab.train.config import TrainConfig
from trimtab.train.preparation import prepare_data
from trimtab.train.report import console_for
from trimtab.train.run import Outcome, run_training

QUIET = console_for(quiet=True)


@pytest.fixture
def settings(base_folder, sums):
    return {"model": str(base_folder), "data": str(sums / "train.jsonl"), "precision": "fp32", "learning_rate": 1e-2}


def run(settings: dict, output: Path, **changes) -> Outcome:
    return run_training(TrainConfig(**{**settings, "output": str(output), **changes}), QUIET)


def said(settings: dict, output: Path, **changes) -> str:
    """What a run prints, on one line."""
    console = console_for()
    with console.capture() as captured:
        run_training(TrainConfig(**{**settings, "output": str(output), **changes}), console)
    return " ".join(captured.get().split())


def test_a_folder_has_rows_to_learn_and_rows_to_be_tested_on(sums, tokenizer) -> None:
    data = prepare_data(TrainConfig(data=str(sums), eval_data=str(sums)), tokenizer)
    assert (len(data.examples), len(data.held_out)) == (24, 8)
    assert data.train.places[23] == "train.jsonl, line 24"
    other = prepare_data(TrainConfig(data=str(sums), split="valid", eval_data=str(sums), eval_split="train"), tokenizer)
    assert (len(other.examples), len(other.held_out)) == (8, 24)


def test_what_is_held_out_keeps_its_places(sums, tokenizer) -> None:
    data = prepare_data(TrainConfig(data=str(sums / "train.jsonl"), val_size=0.25), tokenizer)
    assert len(data.held_out) == 6
    numbers = sorted(int(place.split()[-1]) for part in (data.train, data.valid) for place in part.places)
    assert numbers == list(range(1, 25))


def test_rows_that_are_in_both_are_counted(settings, sums, tmp_path) -> None:
    text = said(settings, tmp_path / "a", eval_data=str(sums / "train.jsonl"), max_steps=1)
    assert "24 of the 24 held-out rows are among those that are learned" in text


def test_before_the_first_step_it_shows_what_is_learned(settings, tmp_path) -> None:
    text = said(settings, tmp_path / "a", max_steps=1)
    assert "train.jsonl: 24 of 24 rows are used" in text
    assert "⟦0<|im_end|>⟧" in text
    assert "fewest trained in an example: 2 (train.jsonl, line 1)" in text
    assert "chat template: the tokenizer's chat template, by rendering prefixes" in text


def test_bad_rows_end_the_run_or_are_counted(settings, tmp_path) -> None:
    rows = [{"prompt": "1+1=", "completion": "2"}, {"prompt": "2+2=", "completion": ""}, {"promt": "3"}]
    (tmp_path / "bad.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n{no\n")
    settings["data"] = str(tmp_path / "bad.jsonl")
    with pytest.raises(DataError, match=r"bad\.jsonl, line 4: not JSON"):
        run(settings, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    text = said(settings, tmp_path / "b", skip_bad_rows=True)
    assert "1 of 4 rows are used" in text
    assert "3 row(s) left out, because they are bad: bad.jsonl, line 4" in text


def test_long_rows_are_errors_or_counted(settings, tmp_path) -> None:
    settings["max_length"] = 26
    with pytest.raises(DataError, match=r"train\.jsonl, line 11: it has \d+ tokens, more than 26"):
        run(settings, tmp_path / "a")
    assert "row(s) left out, because they are too long" in said(settings, tmp_path / "b", too_long="drop", max_steps=1)
    assert "row(s) cut, because they are too long" in said(settings, tmp_path / "c", too_long="keep_end", max_steps=1)


def test_a_template_that_raises_names_the_row(settings, tmp_path) -> None:
    tokenizer = make_tokenizer("{{ raise_exception('no such role') }}")
    make_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(DataError, match=r"train\.jsonl, line 1: .*no such role"):
        run(settings, tmp_path / "a", model=str(tmp_path / "base"))
    assert not (tmp_path / "a").exists()


def test_ids_that_the_model_does_not_have_end_the_run(settings, tmp_path) -> None:
    config = make_model().config
    config.vocab_size = 258
    type(make_model())(config).save_pretrained(tmp_path / "small")
    make_tokenizer().save_pretrained(tmp_path / "small")
    with pytest.raises(DataError, match="token ids that the model's embedding of 258 rows does not have"):
        run(settings, tmp_path / "a", model=str(tmp_path / "small"))
    assert not (tmp_path / "a").exists()


def test_what_is_learned_can_be_chosen(sums, tokenizer) -> None:
    config = TrainConfig(data=str(sums))
    trained = {
        what: sum(e.trained for e in prepare_data(TrainConfig(data=str(sums), train_on=what), tokenizer).examples)
        for what in ("completions", "last", "all")
    }
    assert trained["completions"] == trained["last"] < trained["all"]
    plain = prepare_data(TrainConfig(data=str(sums), plain=True), tokenizer).examples[0]
    assert tokenizer.decode(plain.ids) == "0+0=0<|im_end|>"
    assert config.train_on == "completions"


def test_packed_rows_learn_what_they_do_alone(settings, tmp_path) -> None:
    whole = {"max_steps": 3, "per_device_train_batch_size": 24, "max_grad_norm": 0}
    alone = run(settings, tmp_path / "a", **whole)
    packed = run(settings, tmp_path / "b", packing=True, max_length=100, **whole)
    assert [x for _, x in packed.result.losses] == pytest.approx([x for _, x in alone.result.losses], rel=1e-5)
    assert packed.result.tokens == alone.result.tokens, "each row once"


def test_packed_rows_are_all_there_in_every_epoch(sums, tokenizer) -> None:
    examples = prepare_data(TrainConfig(data=str(sums)), tokenizer).examples
    batches = Batches(examples, batch_size=2, epochs=2, packed=100)
    steps = [batches[i] for i in range(len(batches))]
    assert sorted(i for step in steps for b in step for i in b.rows) == sorted([*range(24)] * 2)
    assert all(b.size == b.tokens <= 100 for step in steps for b in step)
    assert max(len(step) for step in steps) == 2
    tensors = batches.tensors(steps[0][0])
    assert tensors.keys() == {"input_ids", "position_ids", "labels"}
    assert tensors["input_ids"].shape == (1, steps[0][0].tokens)


def test_what_cannot_be_packed_is_refused(settings, tmp_path) -> None:
    with pytest.raises(TrainError, match="Train without packing"):
        run(settings, tmp_path / "a", packing=True, method="prompt_tuning")
    assert not (tmp_path / "a").exists()
