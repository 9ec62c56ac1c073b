"""Configs and their JSON."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest

from trimtab import LoraConfig, PeftConfig, PeftType, TaskType, TrainableTokensConfig
from trimtab.core.config import FORMAT_VERSION
from trimtab.errors import AdapterFileError, ConfigError, PeftWarning

# A value that is not the default, for every field of LoraConfig.
VALUES: dict[str, Any] = {
    "task_type": "CAUSAL_LM",
    "auto_mapping": {"base_model_class": "A", "parent_library": "b"},
    "peft_version": FORMAT_VERSION,
    "base_model_name_or_path": "some/base",
    "revision": "main",
    "inference_mode": True,
    "target_modules": ["b", "a"],
    "exclude_modules": ["d", "c"],
    "modules_to_save": ["e"],
    "layers_to_transform": [1, 2],
    "layers_pattern": ["h"],
    "r": 3,
    "lora_alpha": 5,
    "lora_dropout": 0.25,
    "fan_in_fan_out": True,
    "bias": "all",
    "use_rslora": True,
    "init_lora_weights": "pissa_niter_4",
    "rank_pattern": {"a": 4},
    "alpha_pattern": {"b": 6},
    "megatron_config": {"x": 1},
    "megatron_core": "m.n",
    "trainable_token_indices": {"e": [1]},
    "loftq_config": {"loftq_bits": 4},
    "eva_config": {"rho": 3.0},
    "corda_config": {"corda_method": "kpm"},
    "lora_ga_config": {"scale": "unit"},
    "use_dora": True,
    "alora_invocation_tokens": [7, 8],
    "velora_config": {"num_groups": 8},
    "kasa_config": {"beta": 0.5},
    "monteclora_config": {"num_samples": 3},
    "arrow_config": {"top_k": 2},
    "use_bdlora": {"nblocks": 2},
    "use_qalora": True,
    "qalora_group_size": 8,
    "layer_replication": [[0, 2], [1, 3]],
    "lora_bias": True,
    "target_parameters": ["p"],
    "ensure_weight_tying": True,
}
TOGETHER = {"use_dora": {"megatron_config": None}, "lora_bias": {"init_lora_weights": True, "use_dora": False}}


def test_every_field_has_a_value_here() -> None:
    fields = {f.name for f in dataclasses.fields(LoraConfig)} - {"peft_type", "runtime_config"}
    assert fields == set(VALUES)


@pytest.mark.parametrize("field", VALUES)
def test_every_field_goes_through_json(field: str, tmp_path: Path) -> None:
    more = {"target_modules": ["a"], "layers_to_transform": [1]} if field.startswith("layers_") else {}
    if field.removesuffix("_config") in ("eva", "corda", "lora_ga", "loftq"):
        more = {"init_lora_weights": field.removesuffix("_config")}  # else they do nothing
    config = LoraConfig(**{**more, field: VALUES[field]})
    config.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    if field in LoraConfig.nested:
        assert raw[field].items() >= VALUES[field].items()
        assert type(PeftConfig.from_pretrained(tmp_path).to_dict()[field]) is dict
        return
    assert raw[field] == (sorted(VALUES[field]) if field in ("target_modules", "exclude_modules") else VALUES[field])
    again = PeftConfig.from_pretrained(tmp_path)
    assert type(again) is LoraConfig
    expected = config.to_dict() | {"peft_version": FORMAT_VERSION}
    assert json.loads(json.dumps(again.to_json())) == json.loads(
        json.dumps({k: sorted(v) if isinstance(v, set) else v for k, v in expected.items() if k != "runtime_config"})
    )


def test_the_file_is_sorted_and_the_same_each_time(tmp_path: Path) -> None:
    texts = set()
    for i, names in enumerate((["q", "k", "v"], ["v", "q", "k"])):
        LoraConfig(target_modules=names).save_pretrained(tmp_path / str(i))
        texts.add((tmp_path / str(i) / "adapter_config.json").read_text())
    (text,) = texts
    raw = json.loads(text)
    assert list(raw) == sorted(raw)
    assert text == json.dumps(raw, indent=2, sort_keys=True)
    assert raw["target_modules"] == ["k", "q", "v"]
    assert raw["peft_type"] == "LORA"
    assert raw["peft_version"] == FORMAT_VERSION
    assert "runtime_config" not in raw


def write(folder: Path, **content: Any) -> Path:
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder


def test_unknown_keys_are_reported_kept_and_written_back(tmp_path: Path) -> None:
    write(tmp_path, peft_type="LORA", r=4, target_modules=["q"], future_field={"a": [1]}, peft_version="9.9.9")
    with pytest.warns(PeftWarning, match=r"future_field.*newer version.*9\.9\.9"):
        config = PeftConfig.from_pretrained(tmp_path)
    assert config.unknown == {"future_field": {"a": [1]}}
    copy = config.copy()
    copy.save_pretrained(tmp_path / "again")
    raw = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert raw["future_field"] == {"a": [1]}
    assert raw["r"] == 4


def test_a_loaded_config_keeps_its_version(tmp_path: Path) -> None:
    config = PeftConfig.from_pretrained(write(tmp_path, peft_type="LORA", peft_version="0.9.0"))
    assert config.peft_version == "0.9.0"
    config.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["peft_version"] == "0.9.0"
    assert PeftConfig.from_pretrained(write(tmp_path, peft_type="LORA")).peft_version == FORMAT_VERSION


@pytest.mark.parametrize("fields", [{"r": "8"}, {"bias": "some"}, {"task_type": "X"}, {"target_modules": "("}])
def test_faults_of_a_file_name_it(fields: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=str(tmp_path)):
        PeftConfig.from_pretrained(write(tmp_path, peft_type="LORA", **fields))


def test_a_setting_of_one_run_in_the_file_is_ignored_aloud(tmp_path: Path) -> None:
    write(tmp_path, peft_type="LORA", runtime_config={"ephemeral_gpu_offload": True})
    with pytest.warns(PeftWarning, match="`runtime_config`.*ignored"):
        config = LoraConfig.from_pretrained(tmp_path)
    assert config.runtime_config.ephemeral_gpu_offload is False


def test_only_peft_type_is_needed(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = PeftConfig.from_pretrained(write(tmp_path, peft_type="LORA"))
    assert config == LoraConfig()


def test_overrides(tmp_path: Path) -> None:
    write(tmp_path, peft_type="LORA", r=4)
    assert PeftConfig.from_pretrained(tmp_path, r=16, lora_alpha=1).r == 16


def test_the_file_decides_the_class(tmp_path: Path) -> None:
    write(tmp_path, peft_type="TRAINABLE_TOKENS", token_indices=[3])
    assert type(LoraConfig.from_pretrained(tmp_path)) is TrainableTokensConfig
    assert PeftConfig.from_peft_type(peft_type="LORA", r=2) == LoraConfig(r=2)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '"x"', "\x00\x01", "[" * 99999, '{"r": ' + "1" * 9999])
def test_a_file_that_is_no_config(text: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(AdapterFileError, match=r"adapter_config\.json' is not a readable adapter config"):
        PeftConfig.from_pretrained(tmp_path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match=r"Can't find 'adapter_config\.json' at"):
        PeftConfig.from_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match="there is no such folder"):
        PeftConfig.from_pretrained(tmp_path / "absent")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"r": 1}, "no `peft_type`"),
        ({"peft_type": "NOPE"}, "'NOPE' is not known here"),
        ({"peft_type": ["LORA"]}, "not known here"),
    ],
)
def test_no_or_unknown_method(content: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        PeftConfig.from_pretrained(write(tmp_path, **content))
    assert str(tmp_path) in str(caught.value)


def test_unknown_task_type() -> None:
    with pytest.raises(ConfigError, match=r"Invalid task type: 'CAUSAL'\. Must be one of .* CAUSAL_LM"):
        LoraConfig(task_type="CAUSAL")
    assert LoraConfig(task_type=TaskType.CAUSAL_LM).task_type == "CAUSAL_LM"


def test_types_are_strings_too() -> None:
    assert LoraConfig().peft_type == "LORA"
    assert PeftType("LORA") is PeftType.LORA
    assert not LoraConfig().is_prompt_learning
    assert not LoraConfig().is_adaption_prompt


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bias": "some"}, "`bias` should be"),
        ({"use_dora": True, "lora_bias": True}, "lora_bias=True is not supported for DoRA"),
        ({"lora_bias": True, "init_lora_weights": "pissa"}, "only supported with init_lora_weights=True or False"),
        ({"use_dora": True, "megatron_config": {"a": 1}}, "DoRA does not support megatron_core"),
    ],
)
def test_fields_that_contradict_each_other(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoraConfig(**fields)


def test_saving_where_a_file_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(AssertionError, match="should be a directory, not a file"):
        LoraConfig().save_pretrained(tmp_path / "file")


def test_copies_are_deep() -> None:
    config = LoraConfig(target_modules=["a"], rank_pattern={"a": 2})
    other = config.copy()
    other.target_modules.add("b")
    other.rank_pattern["b"] = 3
    assert config == LoraConfig(target_modules=["a"], rank_pattern={"a": 2})


@pytest.mark.parametrize("field", LoraConfig.nested)
@pytest.mark.parametrize("value", ["x", 3, [1], True])
def test_settings_of_a_class_of_their_own_are_that_or_a_dict(field: str, value: Any) -> None:
    """Found among damaged folders: a string in the place of Arrow's settings failed at the first forward."""
    said = rf"LoraConfig: `{field}` should be a \w+Config or a dict, not {re.escape(repr(value))}"
    with pytest.raises(ConfigError, match=said):
        LoraConfig(target_modules=["a"], **{field: value})
    with pytest.raises(ConfigError, match=f"`{field}`: .*no_such"):
        LoraConfig(target_modules=["a"], **{field: {"no_such": 1}})
