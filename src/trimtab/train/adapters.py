"""The adapter of a run: which method a name means, the fields its config takes, and the config itself."""

from __future__ import annotations

import dataclasses
from typing import Any

from trimtab.core.config import PeftConfig, TaskType
from trimtab.errors import ConfigError
from trimtab.methods import METHODS, config_class
from trimtab.train.config import FIELDS, TrainConfig
from trimtab.train.names import nearest
from trimtab.train.values import types_of

# What holds unless told otherwise, where PEFT's own default is none that one would train with.
RANK, ALPHA_OVER_R, VIRTUAL_TOKENS = 16, 2, 20


def method_of(name: str) -> tuple[str, dict[str, Any]]:
    """(peft_type, fields) of a method as people call it: "lora", "ln-tuning", and "dora" for LoRA with use_dora.

    Raises:
        ConfigError: no such method.
    """
    plain = name.lower().replace("-", "_")
    if plain.upper() in METHODS:
        return plain.upper(), {}
    usual = str(FIELDS["method"].default).upper()
    if f"use_{plain}" in _fields(usual):
        return usual, {f"use_{plain}": True}
    known = [n.lower() for n in METHODS]
    raise ConfigError(f"There is no method {name}{nearest(plain, known) or '.'} Known: {', '.join(known)}.")


def method_fields(name: str) -> dict[str, Any]:
    """{field: type} of what a method's config takes, without what follows from the run itself."""
    peft_type, _ = method_of(name)
    hints = types_of(config_class(peft_type))
    return {field: hints[field] for field in _fields(peft_type)}


def adapter_settings(config: TrainConfig) -> dict[str, Any]:
    """The fields of the method's config: those that were given, and what a run takes unless told otherwise.

    Methods with a rank adapt all linear layers, the others what they usually do.
    """
    peft_type, given = method_of(config.method)
    given |= config.adapter
    fields = _fields(peft_type)
    defaults: dict[str, Any] = {"num_virtual_tokens": VIRTUAL_TOKENS}
    if {"r", "lora_alpha"} <= fields and "init_r" not in fields:
        rank = given.get("r", RANK)
        defaults |= {"r": rank, "lora_alpha": ALPHA_OVER_R * rank}
    if "r" in fields and "target_parameters" not in given:
        defaults["target_modules"] = "all-linear"
    return {**{k: v for k, v in defaults.items() if k in fields}, **given}


def adapter_config(config: TrainConfig, steps: int) -> Any:
    """The method's config.

    Args:
        steps: optimiser steps of the run, for methods with a schedule.

    Raises:
        ConfigError: values that the method refuses.
    """
    peft_type, _ = method_of(config.method)
    cls, given = config_class(peft_type), adapter_settings(config)
    if "total_step" in _fields(peft_type):
        given.setdefault("total_step", steps)
    try:
        return cls(task_type=TaskType.CAUSAL_LM, **given)
    except (TypeError, ValueError) as e:
        raise e if isinstance(e, ConfigError) else ConfigError(f"{cls.__name__}: {e}") from e


def _fields(peft_type: str) -> set[str]:
    common = {f.name for f in dataclasses.fields(PeftConfig)}
    cls = config_class(peft_type)
    return {f.name for f in dataclasses.fields(cls) if f.init and f.name not in common} - set(cls.runtime)
