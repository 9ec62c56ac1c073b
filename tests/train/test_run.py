"""A run from its config to a saved adapter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.train.conftest import make_model
from trimtab import AutoPeftModelForCausalLM
from trimtab.errors import AdapterFileError, BaseModelError, ConfigError, DataError, TrainError
from trimtab.train.data import encode_rows, read_rows
from trimtab.train.evaluate import evaluate_loss
from trimtab.train.folder import read_run
from trimtab.train.provenance import check_provenance, read_provenance
from trimtab.train.report import console_for
from trimtab.train.run import Outcome, run_training

QUIET = console_for(quiet=True)


@pytest.fixture
def settings(base_folder, sums):
    return {
        "model": str(base_folder), "data": str(sums / "train.jsonl"), "eval_data": str(sums / "valid.jsonl"),
        "precision": "fp32", "learning_rate": 2e-2, "num_train_epochs": 2,
    }  # fmt: skip


def run(settings: dict, output: Path, **changes) -> Outcome:
    config, _ = read_run({**settings, "output": str(output), **changes})
    return run_training(config, QUIET)


def test_what_a_run_leaves(settings, tmp_path, tokenizer) -> None:
    outcome = run(settings, tmp_path / "run", r=4)
    assert {p.name for p in outcome.folder.iterdir()} == {
        "run.yaml", "metrics.jsonl", "loss.png", "adapter", "checkpoint-3", "checkpoint-6",
    }  # fmt: skip
    assert outcome.result.eval_losses[-1][1] < outcome.result.eval_losses[0][1]
    model = AutoPeftModelForCausalLM.from_pretrained(outcome.adapter)
    valid = encode_rows(read_rows(settings["eval_data"]), tokenizer)
    assert evaluate_loss(model, valid).loss == pytest.approx(outcome.result.eval_losses[-1][1], rel=1e-6)
    assert model.active_peft_config.scaling() == 2.0


def test_its_file_runs_the_same_again(settings, tmp_path) -> None:
    first = run(settings, tmp_path / "a", precision="auto", method="dora", r=2)
    saved = yaml.safe_load((tmp_path / "a" / "run.yaml").read_text())
    assert saved["precision"] in ("fp32", "bf16"), "what was measured"
    assert (saved["r"], saved["lora_alpha"], saved["target_modules"]) == (2, 4, "all-linear"), "what was taken"
    again = run(saved, tmp_path / "b")
    assert again.result.losses == first.result.losses
    tensors = [load_file(x / "adapter_model.safetensors") for x in (first.adapter, again.adapter)]
    assert all(torch.equal(value, tensors[1][key]) for key, value in tensors[0].items())


def test_a_csv_of_two_columns_needs_no_more_than_its_name(settings, tmp_path) -> None:
    (tmp_path / "sums.csv").write_text("Frage,Antwort\n" + "".join(f"{i}+{i}=,{2 * i}\n" for i in range(24)))
    del settings["eval_data"]
    a = run({**settings, "data": str(tmp_path / "sums.csv")}, tmp_path / "a", max_steps=3)
    b = run(settings, tmp_path / "b", max_steps=3)
    assert a.result.losses == b.result.losses


def test_rows_held_out_by_share_or_by_number(settings, tmp_path) -> None:
    del settings["eval_data"]
    for size, count in ((0.25, 6), (5, 5)):
        outcome = run(settings, tmp_path / str(size), val_size=size, max_steps=1)
        card = read_provenance(outcome.adapter)
        assert card["data"]["rows"] == 24 - count
        assert len(outcome.result.scores) == 2
    with pytest.raises(DataError, match="would hold out 24 of 24"):
        run(settings, tmp_path / "c", val_size=24)


def test_answers_are_scored_too_and_may_decide_what_is_best(settings, tmp_path) -> None:
    outcome = run(
        settings, tmp_path / "run", eval_generate="exact_match,json_valid", metric_for_best_model="exact_match",
        load_best=True,
    )  # fmt: skip
    assert all(set(scores) == {"loss", "exact_match", "json_valid"} for _, scores in outcome.result.scores)
    assert outcome.result.best == (3, 0.0), "no later one is better"
    assert read_provenance(outcome.adapter)["kept_step"] == 3
    with pytest.raises(ConfigError, match="There is no metric 'bleu'"):
        run(settings, tmp_path / "run", eval_generate="bleu", overwrite_output_dir=True)
    assert outcome.adapter.exists(), "the run that was there is as it was"


def test_labels_of_one_token_are_scored_without_generation(settings, tmp_path) -> None:
    rows = [{"prompt": f"is {i} even?", "completion": "yn"[i % 2]} for i in range(16)]
    (tmp_path / "labels.jsonl").write_text("\n".join(map(json.dumps, rows)))
    labels = {**settings, "data": str(tmp_path / "labels.jsonl"), "eval_data": str(tmp_path / "labels.jsonl")}
    outcome = run(labels, tmp_path / "a", metric_for_best_model="accuracy", load_best=True, num_train_epochs=4)
    assert all(set(scores) == {"loss", "accuracy"} for _, scores in outcome.result.scores)
    assert outcome.result.best[1] == max(scores["accuracy"] for step, scores in outcome.result.scores if step)
    with pytest.raises(DataError, match="accuracy is of answers of one token"):
        run(settings, tmp_path / "b", metric_for_best_model="accuracy")


def test_checkpointing_and_batches_of_any_size_change_no_loss(settings, tmp_path) -> None:
    plain = run(settings, tmp_path / "a", max_steps=3)
    saved = run(settings, tmp_path / "b", max_steps=3, gradient_checkpointing=True)
    assert [x for _, x in saved.result.losses] == pytest.approx([x for _, x in plain.result.losses])
    split = run(settings, tmp_path / "c", max_steps=1, per_device_train_batch_size=12, gradient_accumulation_steps=2)
    whole = run(settings, tmp_path / "d", max_steps=1, per_device_train_batch_size=24)
    assert split.result.losses[0][1] == pytest.approx(whole.result.losses[0][1], rel=1e-6)
    with pytest.raises(ConfigError, match="does not act yet"):
        run(settings, tmp_path / "e", megatron_config={"a": 1})


@pytest.mark.parametrize("more", [{"method": "multitask_prompt_tuning"}, {"method": "poly", "n_tasks": 2}])
def test_methods_whose_rows_say_their_task_are_refused(more, settings, tmp_path) -> None:
    with pytest.raises(ConfigError, match="is trained on rows that say their task"):
        run(settings, tmp_path / "a", **more)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(("width", "rate"), [(32, 1e-3), (576, 1e-3), (2048, 4.9e-4), (4096, 2.9e-4), (8192, 1.7e-4)])
def test_the_learning_rate_follows_the_width_unless_it_is_given(width, rate) -> None:
    from types import SimpleNamespace

    from trimtab.train.model import rate_by_width

    embedding = torch.nn.Embedding(2, width)
    assert rate_by_width(SimpleNamespace(get_input_embeddings=lambda: embedding)) == rate


def test_plan_writes_nothing(settings, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    config, _ = read_run({**settings, "output": str(tmp_path / "run"), "rank_pattern": {"q_proj": 4},
                          "modules_to_save": "lm_head", "plan": True})  # fmt: skip
    run_training(config, console_for())
    assert not (tmp_path / "run").exists()
    said = capsys.readouterr().out
    for words in ("model.layers.*.self_attn.q_proj  x 2  Linear", "rank_pattern q_proj", "modules_to_save lm_head",
                  "trainable parameters", "of memory", "for 6 steps", "Nothing was trained"):  # fmt: skip
        assert words in " ".join(said.split("\n")) or words in said, words


@pytest.mark.parametrize("method", ["prompt_tuning", "ln_tuning", "vera"])
def test_the_plan_of_other_methods(method, settings, tmp_path, capsys) -> None:
    config, _ = read_run({**settings, "output": str(tmp_path / "run"), "method": method, "plan": True})
    run_training(config, console_for())
    said = capsys.readouterr().out
    assert {"prompt_tuning": "20 virtual tokens", "ln_tuning": "LlamaRMSNorm", "vera": "all-linear"}[method] in said


# --- three words, three meanings -----------------------------------------------------------------------------------


def test_continue_from_starts_with_the_weights_of_an_adapter(settings, tmp_path) -> None:
    first = run(settings, tmp_path / "a", r=4)
    second = run(settings, tmp_path / "b", continue_from=str(first.adapter))
    assert second.result.step == 6, "a run of its own"
    assert second.result.eval_losses[0][1] == pytest.approx(first.result.eval_losses[-1][1], rel=1e-6)
    assert AutoPeftModelForCausalLM.from_pretrained(second.adapter).active_peft_config.r == 4
    with pytest.raises(ConfigError, match=r"r cannot be given together with continue_from"):
        run(settings, tmp_path / "c", continue_from=str(first.adapter), r=8)


def test_on_top_of_merges_an_adapter_and_trains_another(settings, tmp_path) -> None:
    first = run(settings, tmp_path / "a", r=4)
    second = run(settings, tmp_path / "b", on_top_of=str(first.adapter), r=2)
    assert second.result.eval_losses[0][1] == pytest.approx(first.result.eval_losses[-1][1], rel=1e-5)
    model = AutoPeftModelForCausalLM.from_pretrained(second.adapter)
    assert model.active_peft_config.base_model_name_or_path == str(tmp_path / "b" / "base"), "what it fits"
    again = run(settings, tmp_path / "b", on_top_of=str(first.adapter), r=2, resume=True)
    assert again.result.losses == second.result.losses


def test_an_adapter_given_as_the_model(settings, tmp_path) -> None:
    first = run(settings, tmp_path / "a", max_steps=1)
    with pytest.raises(BaseModelError, match=r"is an adapter, not a model.*continue_from.*on_top_of"):
        run(settings, tmp_path / "b", model=str(first.adapter))


# --- where an adapter is from ---------------------------------------------------------------------------------------


def test_provenance_tells_the_base_from_another(settings, tmp_path, base_folder) -> None:
    outcome = run(settings, tmp_path / "a", max_steps=1)
    content = read_provenance(outcome.adapter)
    assert content["base_model"]["name"] == str(base_folder)
    assert content["config"]["learning_rate"] == 2e-2
    assert content["scores"].keys() == {"loss"}
    assert content["versions"]["torch"] == torch.__version__
    same = make_model()
    assert check_provenance(outcome.adapter, same) == []
    assert check_provenance(outcome.adapter, same.bfloat16()) == [], "a number format is no other model"
    assert check_provenance(outcome.adapter, AutoPeftModelForCausalLM.from_pretrained(outcome.adapter)) == []
    (said,) = check_provenance(outcome.adapter, make_model(seed=1), "other")
    assert f"was trained on {base_folder}; you loaded other, and" in said
    assert check_provenance(tmp_path, same) == [], "nothing is known"


def test_the_card_tells_of_the_run_and_keeps_its_data(settings, tmp_path) -> None:
    outcome = run(settings, tmp_path / "a", r=4)
    card = (outcome.adapter / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == settings["model"]
    assert card.count("## Training") == 1
    for words in ("r 4, lora_alpha 8", "24 learned, 8 held out", "learning rate 0.02", "| loss |", "step 6"):
        assert words in card, words


def test_an_adapter_of_another_base(settings, tmp_path) -> None:
    outcome = run(settings, tmp_path / "a", max_steps=1)
    other = make_model(seed=1)
    other.save_pretrained(tmp_path / "other")
    from tests.train.conftest import make_tokenizer

    make_tokenizer().save_pretrained(tmp_path / "other")
    config, _ = read_run({**settings, "model": str(tmp_path / "other"), "output": str(tmp_path / "b"),
                          "continue_from": str(outcome.adapter), "max_steps": 1})  # fmt: skip
    console = console_for()
    with console.capture() as captured:
        run_training(config, console)
    assert "you loaded" in captured.get()
    config.model, wide = str(tmp_path / "wide"), other.config
    wide.hidden_size, wide.head_dim = 64, 32
    type(other)(wide).save_pretrained(tmp_path / "wide")
    make_tokenizer().save_pretrained(tmp_path / "wide")
    config.overwrite_output_dir = True
    with pytest.raises(AdapterFileError, match=r"was trained on .*; you loaded .*size mismatch"):
        run_training(config, QUIET)
    assert (tmp_path / "b" / "adapter").exists(), "the run that was there is as it was"


# --- input that cannot work ------------------------------------------------------------------------------------------


def test_models_and_rows_that_are_not_there(settings, tmp_path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_bytes((Path(settings["model"]) / "config.json").read_bytes())
    with pytest.raises(BaseModelError, match=r"The model .*empty cannot be loaded: .*no file named"):
        run(settings, tmp_path / "a", model=str(empty))
    with pytest.raises(ConfigError, match="Name the rows to learn"):
        read_run({"model": "x"})
    (tmp_path / "bad.jsonl").write_text(json.dumps({"prompt": "a", "completion": ""}) + "\n")
    with pytest.raises(DataError, match=r"bad.jsonl, line 1: no token of it would be trained"):
        run(settings, tmp_path / "a", data=str(tmp_path / "bad.jsonl"))
    with pytest.raises(DataError, match="has no column 'q'; it has"):
        run(settings, tmp_path / "a", prompt_field="q")
    assert not (tmp_path / "a").exists(), "nothing half done"


def test_an_output_that_cannot_be_written(settings, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainError, match="cannot be written to"):
        run(settings, tmp_path / "file" / "run")


def test_a_rate_that_breaks_the_model_names_rows(settings, tmp_path) -> None:
    with pytest.raises(TrainError, match=r"at step \d.*train.jsonl, line"):
        run(settings, tmp_path / "a", learning_rate=1e30, max_grad_norm=0, num_train_epochs=20, warmup_ratio=0)
