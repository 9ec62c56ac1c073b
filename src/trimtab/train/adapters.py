"""The adapter of a run: which method a name means, the fields its config takes, and the config itself."""

from __future__ import annotations

from typing import Any

from trimtab.core.config import TaskType
from trimtab.errors import ConfigError
from trimtab.methods import METHODS, config_class, load, method_class
from trimtab.train.config import AUTO, FIELDS, TrainConfig
from trimtab.train.methods import fields_of, method_of

# What holds unless told otherwise, where PEFT's own default is none that one would train with.
RANK, ALPHA_OVER_R, VIRTUAL_TOKENS = 16, 2, 20
USUAL = str(FIELDS["method"].default)


def adapter_settings(config: TrainConfig) -> dict[str, Any]:
    """The fields of the method's config: those that were given, and what a run takes unless told otherwise.

    Methods with a rank adapt all linear layers, the others what they usually do.
    """
    peft_type, given = method_of(config.method, USUAL)
    given |= config.adapter
    fields = fields_of(peft_type)
    defaults: dict[str, Any] = {"num_virtual_tokens": VIRTUAL_TOKENS}
    if {"r", "lora_alpha"} <= fields and "init_r" not in fields:
        rank = given.get("r", RANK)
        defaults |= {"r": rank, "lora_alpha": ALPHA_OVER_R * rank}
    if (
        "r" in fields
        and "target_parameters" not in given
        and "linear" in getattr(load(*METHODS[peft_type][:2]), "kinds", ())
    ):
        defaults["target_modules"] = "all-linear"
    return {**{k: v for k, v in defaults.items() if k in fields}, **given}


def adapter_config(config: TrainConfig, steps: int) -> Any:
    """The method's config.

    Args:
        steps: optimiser steps of the run, for methods with a schedule.

    Raises:
        ConfigError: values that the method refuses.
    """
    peft_type, _ = method_of(config.method, USUAL)
    cls, given = config_class(peft_type), adapter_settings(config)
    if "total_step" in fields_of(peft_type):
        given.setdefault("total_step", steps)
    if given.get("r") == AUTO:
        raise ConfigError(f"r: {AUTO} is for `trimtab train` with its own trainer, in one process: name a rank here.")
    try:
        made = cls(task_type=TaskType.CAUSAL_LM, **given)
    except (TypeError, ValueError) as e:
        raise e if isinstance(e, ConfigError) else ConfigError(f"{cls.__name__}: {e}") from e
    if "task_ids" in method_class(made).extras and getattr(made, "n_tasks", 2) > 1:
        raise ConfigError(
            f"{config.method} is trained on rows that say their task (task_ids), which those of a run do not: "
            "train it in a loop of your own."
        )
    return made
