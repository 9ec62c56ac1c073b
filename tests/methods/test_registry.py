"""Methods from outside: what `register_method` takes and refuses. docs/extending.md, which a test runs, uses one."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from trimtab import register_method
from trimtab.core.config import LayerConfig, PeftConfig
from trimtab.core.method import Method
from trimtab.errors import ConfigError
from trimtab.methods import config_class, known, method_class, prefix_of


@dataclass
class OwnConfig(LayerConfig):
    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "OWN_TEST"


class Own(Method):
    config, prefix = OwnConfig, "own_"


class Nameless(Method):
    prefix = "nameless_"


class Other(Method):
    config, prefix = OwnConfig, "other_"


def test_a_method_from_outside_is_known_by_its_type() -> None:
    register_method("OWN_TEST", Own)
    register_method("OWN_TEST", Own)  # a module that is imported twice
    assert config_class("OWN_TEST") is OwnConfig
    assert method_class(OwnConfig()) is Own
    assert prefix_of("OWN_TEST") == "own_"
    assert "OWN_TEST" in known()
    read = PeftConfig.from_dict({"peft_type": "OWN_TEST", "target_modules": ["up"]})
    assert type(read) is OwnConfig
    assert read.target_modules == {"up"}


def test_names_that_are_taken_and_half_methods_are_refused() -> None:
    register_method("OWN_TEST", Own)
    with pytest.raises(ConfigError, match="There is a method 'LORA' already"):
        register_method("LORA", Own)
    with pytest.raises(ConfigError, match="There is a method 'OWN_TEST' already"):
        register_method("OWN_TEST", Other)
    with pytest.raises(ConfigError, match="needs a `config` class and a `prefix`"):
        register_method("HALF", Nameless)
    assert "HALF" not in known()


def test_types_of_older_files_are_named() -> None:
    with pytest.raises(ConfigError, match="'BONE' is what the method MISS was called"):
        PeftConfig.from_dict({"peft_type": "BONE", "r": 8})
