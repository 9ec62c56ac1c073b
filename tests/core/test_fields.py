"""Every field of a config takes what its annotation says, and says so where it is given something else."""

from __future__ import annotations

import dataclasses
import enum
import json
import re
from pathlib import Path
from typing import Any, Literal

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models import toy
from trimtab import LoraConfig, PeftConfig, PrefixTuningConfig, PromptTuningConfig, TaskType, get_peft_model
from trimtab.core.config import PeftConfig as Base
from trimtab.core.fields import described, fitted
from trimtab.errors import ConfigError
from trimtab.methods import METHODS, config_class

NAN = float("nan")


# ---------------------------------------------------------------------- what is refused
WRONG: list[tuple[str, Any, str]] = [
    ("modules_to_save", 1, "should be a list of strings or None, not 1"),
    ("modules_to_save", "score", r"not 'score' \(as a list: \['score'\]\)"),
    ("modules_to_save", [1], r"should be a list of strings or None, not \[1\]"),
    ("modules_to_save", {"a": 1}, "should be a list of strings"),
    ("modules_to_save", b"score", "should be a list of strings"),
    ("target_modules", 7, "should be a list of strings, a string or None, not 7"),
    ("target_modules", ["q", None], "should be a list of strings, a string or None"),
    ("target_modules", NAN, "not nan"),
    ("exclude_modules", True, "not True"),
    ("layers_to_transform", ["1"], "should be a list of whole numbers, a whole number or None"),
    ("layers_to_transform", 1.5, "not 1.5"),
    ("layers_pattern", 3, "not 3"),
    ("r", "8", r"`r` should be a whole number, not '8' \(without the quotes\)"),
    ("r", None, "`r` should be a whole number, not None"),
    ("r", True, "not True"),
    ("r", 1.5, "not 1.5"),
    ("r", [8], r"not \[8\]"),
    ("r", float("inf"), "not inf"),
    ("lora_alpha", None, r"`lora_alpha` should be a number \(finite, to 1e10\), not None"),
    ("lora_alpha", "16", r"not '16' \(without the quotes\)"),
    ("lora_alpha", NAN, "not nan"),
    ("lora_alpha", False, "not False"),
    ("lora_dropout", "0.1", r"should be a number \(finite, to 1e10\), not '0.1' \(without the quotes\)"),
    ("lora_dropout", NAN, "not nan"),
    ("lora_dropout", -0.5, "should be a share from 0 to 1, not -0.5"),
    ("lora_dropout", 2, "should be a share from 0 to 1, not 2"),
    ("lora_alpha", 1e30, r"not 1e\+30"),
    ("lora_alpha", 10**30, "not 1000"),
    ("r", 10**30, "should be a whole number"),
    ("r", 1e30, "should be a whole number"),
    ("lora_dropout", 10**400, r"should be a number \(finite, to 1e10\)"),
    ("bias", "some", "should be one of 'none', 'all', 'lora_only', not 'some'"),
    ("bias", None, "not None"),
    ("use_rslora", "yes", "should be True or False, not 'yes'"),
    ("use_dora", 2, "not 2"),
    ("fan_in_fan_out", [], r"not \[\]"),
    ("init_lora_weights", [1], "should be True or False or a string"),
    ("rank_pattern", NAN, "should be a dict of strings to whole numbers, not nan"),
    ("rank_pattern", ["q"], r"not \['q'\]"),
    ("rank_pattern", {"q": "8"}, r"not \{'q': '8'\}"),
    ("alpha_pattern", NAN, "not nan"),
    ("alpha_pattern", {"q": None}, "not {'q': None}"),
    ("alpha_pattern", {"q": NAN}, "not {'q': nan}"),
    ("trainable_token_indices", ["a"], "not"),
    ("trainable_token_indices", {"embed": "1"}, "not"),
    ("target_parameters", 3, "not 3"),
    ("base_model_name_or_path", 3, "should be a string or None, not 3"),
    ("revision", ["main"], "should be a string or None"),
    ("inference_mode", "no", "should be True or False"),
    ("auto_mapping", "x", "should be a dict"),
    ("layer_replication", [[0, 2, 3]], "should be a list of lists of 2 whole numbers or None"),
    ("task_type", 3, "should be a string"),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value", "message"), WRONG, ids=[f"{f}={v!r}"[:40] for f, v, _ in WRONG])
def test_a_wrong_type_names_the_field_what_it_is_and_what_it_takes(
    field: str, value: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=rf"LoraConfig: `{field}` should be .*{message}|{message}") as caught:
        LoraConfig(**{field: value})
    assert f"`{field}` should be" in str(caught.value)
    try:
        text = json.dumps({"peft_type": "LORA", field: value})
    except TypeError:  # what JSON cannot hold
        return
    (tmp_path / "adapter_config.json").write_text(text)
    for read in (PeftConfig.from_pretrained, LoraConfig.from_pretrained):
        with pytest.raises(ConfigError, match=re.escape(f"'{tmp_path / 'adapter_config.json'}'")) as caught:
            read(tmp_path)
        assert f"`{field}` should be" in str(caught.value)


def test_all_faults_at_once() -> None:
    with pytest.raises(ConfigError, match=r"LoraConfig: `modules_to_save` .*; `r` .*; `lora_alpha` .*None\."):
        LoraConfig(r="8", lora_alpha=None, modules_to_save=1)


def test_a_key_of_a_dict_is_checked_too() -> None:
    with pytest.raises(ConfigError, match=r"`rank_pattern` .*, not \{1: 8\}"):
        LoraConfig(rank_pattern={1: 8})


def test_a_long_value_is_cut() -> None:
    with pytest.raises(ConfigError) as caught:
        LoraConfig(r="8" * 1000)
    assert len(str(caught.value)) < 200


def test_a_value_set_later_is_checked_when_the_adapter_is_built() -> None:
    config = LoraConfig(target_modules=["up"])
    config.r = "8"
    with pytest.raises(ConfigError, match="`r` should be a whole number, not '8'"):
        get_peft_model(toy(), config)


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({"target_modules": "(q"}, r"`target_modules`: '\(q' is no regular expression"),
        ({"target_modules": "*.q_proj"}, "`target_modules`"),
        ({"target_modules": ["q"], "exclude_modules": "["}, "`exclude_modules`"),
        ({"target_modules": ["q"], "rank_pattern": {"*.q_proj": 4}}, r"`rank_pattern`: '\*\.q_proj'"),
        ({"target_modules": ["q"], "alpha_pattern": {"a(": 4}}, "`alpha_pattern`"),
        ({"target_modules": ["q"], "layers_to_transform": 1, "layers_pattern": "h("}, "`layers_pattern`"),
        ({"target_modules": ["q"], "layers_to_transform": 1, "layers_pattern": ["h", "a{9999999999}"]}, "`layers_patt"),
    ],
)
def test_what_is_no_regular_expression(fields: dict[str, Any], shown: str) -> None:
    with pytest.raises(ConfigError, match=shown):
        LoraConfig(**fields)


# ---------------------------------------------------------------------- what is taken
class Kind(str, enum.Enum):
    A = "a"
    B = "b"


@dataclasses.dataclass
class Settings:
    steps: int = 1


TAKEN: list[tuple[Any, Any, Any]] = [
    (list[str], ("a", "b"), ("a", "b")),
    (list[str], {"a"}, {"a"}),
    (list[str], frozenset("a"), frozenset("a")),
    (list[str], {"a": 1}.keys(), ["a"]),
    (list[int], numpy.array([1, 2]), [1, 2]),
    (list[int], [numpy.int64(3)], [3]),
    (list[int], range(3), [0, 1, 2]),
    (int, numpy.int32(8), 8),
    (int, torch.tensor(8), 8),
    (int, 8.0, 8),
    (int | float, 8.0, 8.0),
    (float, 1, 1),
    (float, numpy.float32(0.5), 0.5),
    (bool, numpy.bool_(True), True),
    (bool, 1, True),
    (bool, None, False),
    (bool | None, None, None),
    (bool | int, 1, 1),
    (bool | str, 0, False),
    (str, Kind.A, Kind.A),
    (str | None, Path("a") / "b", "a/b"),
    (Kind, "b", "b"),
    (Kind | str, "anything", "anything"),
    (Literal["x", 1], 1, 1),
    (dict[str, int], {"a": numpy.int64(2)}, {"a": 2}),
    (dict[str, Any] | None, {"a": object}, {"a": object}),
    (list[tuple[int, int]] | None, [[0, 2], [1, 3]], [[0, 2], [1, 3]]),
    (Settings, {"steps": 3}, Settings(3)),
    (Settings | dict | None, Settings(2), Settings(2)),
    (Any, object, object),
]  # fmt: skip


@pytest.mark.parametrize(("hint", "value", "read"), TAKEN, ids=[f"{h}-{v!r}"[:60] for h, v, _ in TAKEN])
def test_what_a_type_takes(hint: Any, value: Any, read: Any) -> None:
    found = fitted(value, hint)
    assert found == read
    assert type(found) is type(read)


def test_what_fits_is_not_copied() -> None:
    value = {"a": [1, 2]}
    assert fitted(value, dict[str, list[int]]) is value


PLAIN = st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=3)
VALUE = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2)
)


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(LoraConfig)])
@settings(derandomize=True, max_examples=40)
@given(VALUE)
def test_any_value_of_any_field_is_taken_or_refused_by_name(field: str, value: Any) -> None:
    try:
        LoraConfig(**{"target_modules": ["q"], field: value})
    except ConfigError as error:
        said = str(error)
    else:
        said = field
    assert field in said or "task type" in said


@pytest.mark.parametrize("peft_type", sorted(METHODS))
def test_every_default_is_of_its_own_type(peft_type: str) -> None:
    needed = {"ADALORA": {"total_step": 9}, "CPT": {"task_type": "CAUSAL_LM"}}
    config = config_class(peft_type)(**needed.get(peft_type, {}))
    assert isinstance(config, Base)
    for f in dataclasses.fields(config):
        assert described(f.type if not isinstance(f.type, str) else str)


def test_numbers_of_numpy_reach_the_file_as_numbers(tmp_path: Path) -> None:
    LoraConfig(
        r=numpy.int64(4), lora_alpha=numpy.float64(8), rank_pattern={"q": numpy.int64(2)}, layers_to_transform=(1, 2),
        target_modules=numpy.array(["q", "v"]), task_type=TaskType.CAUSAL_LM,
    ).save_pretrained(tmp_path)  # fmt: skip
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (raw["r"], raw["lora_alpha"], raw["rank_pattern"], raw["target_modules"], raw["layers_to_transform"]) == (
        4, 8.0, {"q": 2}, ["q", "v"], [1, 2],
    )  # fmt: skip
    assert PromptTuningConfig(num_virtual_tokens=numpy.int64(3)).num_virtual_tokens == 3
    with pytest.raises(ConfigError, match="PrefixTuningConfig: `num_virtual_tokens`"):
        PrefixTuningConfig(num_virtual_tokens="3")


# ---------------------------------------------------------------------- dataclasses in a config
@dataclasses.dataclass
class Nested(LoraConfig):
    settings: Settings | None = None


def test_a_dict_for_a_dataclass_becomes_one() -> None:
    assert Nested(settings={"steps": 5}).settings == Settings(5)
    assert Nested(settings=Settings(6)).to_json()["settings"] == {"steps": 6}
    with pytest.raises(ConfigError, match=r"`settings` should be .* keys of Settings, which has no \['stops'\]"):
        Nested(settings={"stops": 5})
