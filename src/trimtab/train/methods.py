"""Methods by the names people call them, and the fields of their configs."""

from __future__ import annotations

import dataclasses
from typing import Any

from trimtab.core.config import PeftConfig
from trimtab.errors import ConfigError
from trimtab.methods import config_class, known
from trimtab.train.names import nearest
from trimtab.train.values import types_of


def method_of(name: str, usual: str) -> tuple[str, dict[str, Any]]:
    """(peft_type, fields) of a method as people call it: "lora", "ln-tuning", and "dora" for LoRA with use_dora.

    Args:
        usual: the method whose variants have names of their own.

    Raises:
        ConfigError: no such method.
    """
    plain = name.lower().replace("-", "_")
    if plain.upper() in known():
        return plain.upper(), {}
    if f"use_{plain}" in fields_of(usual.upper()):
        return usual.upper(), {f"use_{plain}": True}
    names = [n.lower() for n in known()]
    raise ConfigError(f"There is no method {name}{nearest(plain, names) or '.'} Known: {', '.join(names)}.")


def method_fields(name: str, usual: str) -> dict[str, Any]:
    """{field: type} of what a method's config takes, without what follows from the run itself."""
    peft_type, _ = method_of(name, usual)
    hints = types_of(config_class(peft_type))
    return {field: hints[field] for field in fields_of(peft_type)}


def fields_of(peft_type: str) -> set[str]:
    """The fields of a method's config, without those all configs have and those of one run."""
    common = {f.name for f in dataclasses.fields(PeftConfig)}
    cls = config_class(peft_type)
    return {f.name for f in dataclasses.fields(cls) if f.init and f.name not in common} - set(cls.runtime)
