"""A run's settings: one set of names for files, flags and Python, read strictly."""

from __future__ import annotations

import dataclasses

import pytest
import yaml

from trimtab import LoraConfig
from trimtab.errors import ConfigError
from trimtab.methods import METHODS
from trimtab.train.adapters import USUAL, adapter_config
from trimtab.train.config import FIELDS, SHOWN, TrainConfig, read_config, read_file
from trimtab.train.methods import method_fields
from trimtab.train.names import ALIASES


def test_every_field_has_its_help_and_every_alias_leads_to_a_setting() -> None:
    known = {*FIELDS, *method_fields("lora", USUAL)}
    assert all(f.metadata["help"].endswith(".") for f in FIELDS.values())
    assert {ours for ours, _ in ALIASES.values()} <= known
    assert not set(ALIASES) & set(FIELDS), "a name of ours is no alias"
    assert set(SHOWN) <= {f.name for f in dataclasses.fields(LoraConfig)}
    assert not set(FIELDS) & {name for method in METHODS for name in method_fields(method, USUAL)}, (
        "one name, two meanings"
    )


def test_values_are_read_as_their_types_whatever_they_come_from() -> None:
    text = {"learning_rate": "1e-4", "max_steps": "7", "packing": "yes", "eval_generate": "exact_match",
            "eval_data": "v.csv", "max_length": "none", "r": "4", "target_modules": "q_proj,v_proj",
            "rank_pattern": "{q_proj: 8}", "init_lora_weights": "false", "report_to": "none"}  # fmt: skip
    plain = {"learning_rate": 1e-4, "max_steps": 7, "packing": True, "eval_generate": ["exact_match"],
             "eval_data": "v.csv", "max_length": None, "r": 4, "target_modules": ["q_proj", "v_proj"],
             "rank_pattern": {"q_proj": 8}, "init_lora_weights": False, "report_to": []}  # fmt: skip
    assert read_config(text)[0] == read_config(plain)[0] == TrainConfig(**plain)
    one = TrainConfig(target_modules="q_proj")
    assert one.adapter["target_modules"] == ["q_proj"], "a plain name is no pattern of whole paths"
    assert TrainConfig(target_modules="all-linear").adapter["target_modules"] == "all-linear"
    assert TrainConfig(target_modules=r".*\.q_proj").adapter["target_modules"] == r".*\.q_proj"
    assert TrainConfig(init_lora_weights="pissa").adapter["init_lora_weights"] == "pissa"


def test_a_file_of_it_reads_back_as_the_same() -> None:
    config = TrainConfig(data="a, b.csv", system="", r=8, rank_pattern={"q": 4}, method="dora", learning_rate=3e-5,
                         report_to=["wandb"], modules_to_save=["lm_head"])  # fmt: skip
    content = yaml.safe_load(config.to_yaml())
    assert read_config(content)[0] == config
    assert content["system"] == ""
    assert next(iter(content)) == "model"
    assert not {"plan", "resume", "overwrite_output_dir"} & set(content)


def test_later_sources_win_and_other_names_are_told() -> None:
    config, notices = read_config({"lora_r": 8, "epochs": 2}, {"num-train-epochs": 5, "bf16": True})
    assert (config.adapter["r"], config.num_train_epochs, config.precision) == (8, 5.0, "bf16")
    assert notices == ["lora_r is read as r.", "epochs is read as num_train_epochs.", "bf16 is read as precision."]
    assert read_config({"completion_only_loss": False, "lora_target": "all"})[0].train_on == "all"
    assert read_config({"lora_target": "all"})[0].adapter == {"target_modules": "all-linear"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"learning_rat": 1}, "learning_rat is no setting of a run.*did you mean learning_rate?"),
        ({"lora_dropuot": 1}, "did you mean lora_dropout?"),
        ({"method": "ia3", "lora_alpha": 3}, "lora_alpha is no setting of a run, and none of the method ia3"),
        ({"method": "lra"}, "There is no method lra; did you mean lora?"),
        ({"learning_rate": "fast"}, "learning_rate: expected a number, not 'fast'"),
        ({"learning_rate": float("nan")}, "learning_rate: expected a number"),
        ({"max_length": "long"}, "max_length: expected a whole number, not 'long'"),
        ({"max_steps": 2.5}, "max_steps: expected a whole number, not 2.5"),
        ({"packing": "perhaps"}, "packing: expected true or false, not 'perhaps'"),
        ({"lr_scheduler_type": "cosin"}, "one of linear, cosine, constant, not 'cosin'; did you mean cosine?"),
        ({"r": "x"}, "r: expected a whole number or auto, not 'x'"),
        ({"model": None}, "model needs a value: text"),
        ({"per_device_train_batch_size": 0}, "must be at least 1, not 0"),
        ({"warmup_ratio": 10}, "a number of steps is warmup_steps"),
        ({"r": 4, "lora_rank": 8}, "r is given twice, as r and as lora_rank"),
        ({"resume": True, "overwrite_output_dir": True}, "give one of them"),
        ({"continue_from": "a", "on_top_of": "b"}, "give one"),
        ({"load_best": True}, "takes rows to be tested on"),
        ({"eval_data": "v", "metric_for_best_model": "exact_match"}, "give eval_generate: exact_match, too"),
    ],
)
def test_what_cannot_be_is_named(given, message) -> None:
    with pytest.raises(ConfigError, match=message):
        read_config(given, where="run.yaml")


def test_all_faults_come_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        read_config({"lerning_rate": 1, "r": "x", "seed": "y"}, where="run.yaml")
    assert str(caught.value).startswith("run.yaml: 3 faults:")
    assert all(word in str(caught.value) for word in ("lerning_rate", "r: expected", "seed: expected"))


def test_files_that_are_none(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"no\.yaml cannot be read: No such file"):
        read_file(tmp_path / "no.yaml")
    for name, content, message in (
        ("a.yaml", "a: [", "is no YAML: .*line"),
        ("b.yaml", "- 1", "must be a mapping"),
        ("c.toml", "a = ", "is no TOML"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(ConfigError, match=message):
            read_file(tmp_path / name)
    (tmp_path / "d.toml").write_text("r = 3\n")
    (tmp_path / "e.json").write_text('{"r": 3}')
    assert read_file(tmp_path / "d.toml") == read_file(tmp_path / "e.json") == {"r": 3}


def test_methods_by_any_name_with_sensible_defaults() -> None:
    def made(**given):
        return adapter_config(TrainConfig(**given), steps=50)

    lora = made()
    assert (lora.r, lora.lora_alpha, lora.target_modules, lora.task_type) == (16, 32, "all-linear", "CAUSAL_LM")
    assert made(r=4).scaling() == 2.0, "alpha follows r"
    assert made(r=4, lora_alpha=4).scaling() == 1.0
    assert made(method="DoRA").use_dora
    assert made(method="rslora").use_rslora
    assert made(method="ln-tuning").target_modules is None, "it keeps its own targets"
    assert made(method="adalora").total_step == 50
    assert made(method="adalora", total_step=99).total_step == 99
    assert made(method="prompt_tuning").num_virtual_tokens == 20
    for name in METHODS:
        needed = {"ADAPTION_PROMPT": {"adapter_len": 3, "adapter_layers": 1}}.get(name, {})
        if name == "MULTITASK_PROMPT_TUNING":
            with pytest.raises(ConfigError, match="rows that say their task"):
                made(method=name)
            continue
        assert made(method=name, adapter=needed).peft_type == name
    with pytest.raises(ConfigError, match="lora_bias=True is not supported for DoRA"):
        made(method="dora", lora_bias=True)


def test_the_folder_of_a_run_is_named_after_its_rows() -> None:
    assert str(TrainConfig(data="some/rows.jsonl").folder) == "runs/rows"
    assert str(TrainConfig(data="some/rows.jsonl", output="x").folder) == "x"
