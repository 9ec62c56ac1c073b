"""Floor 3: ways to start a low-rank pair. One function a file; the table below is all that knows them by name.

Each takes the method (its `site`, `r`, `scaling` and factors) and fills A and B in place; one that moves part of the
base's weight into the pair returns what is left, W - s·B·A.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from trimtab.core.report import warn
from trimtab.errors import ConfigError

# name: (function, whether it changes the base's weights)
STARTS: dict[Any, tuple[str, bool]] = {
    True: ("default", False),
    False: ("random", False),
    "gaussian": ("gaussian", False),
    "orthogonal": ("orthogonal", False),
    "pissa": ("pissa", True),
    "olora": ("olora", True),
    "eva": ("default", False),  # until `initialize_lora_eva_weights` has seen data
    "corda": ("corda", True),
    "lora_ga": ("lora_ga", True),
    "loftq": ("loftq", True),
}
# name: (the field of the config that has its settings, what PEFT calls it; None: it is silent about it)
SETTINGS = {"eva": ("eva_config", "EVA"), "corda": ("corda_config", "CorDA"), "lora_ga": ("lora_ga_config", None)}
LINEAR = ("eva", "corda", "lora_ga", "loftq")  # these start layers that have one matrix; others plainly


def complete(config: Any) -> None:
    """Give a config the settings of its initialisation that are left out; speak up about those that do nothing."""
    for name, (field, called) in SETTINGS.items():
        given, wanted = getattr(config, field), config.init_lora_weights == name
        if given is not None and not wanted:
            warn(f"`{field}` specified but will be ignored when `init_lora_weights` is not '{name}'.", UserWarning)
        elif wanted and given is None:
            _, _, cls = config.nested[field].partition(":")
            setattr(config, field, getattr(import_module(f"{__name__}.{name}"), cls)())
            if called:
                warn(f"`init_lora_weights` is '{name}' but `{field}` is not specified. Using default {called} config.")
    if config.init_lora_weights == "loftq" and not config.loftq_config:
        raise ConfigError("`loftq_config` must be specified when `init_lora_weights` is 'loftq'.")
    if config.loftq_config and config.init_lora_weights != "loftq":
        warn("`loftq_config` specified but will be ignored when `init_lora_weights` is not 'loftq'.", UserWarning)
        config.loftq_config = {}
    if not isinstance(config.loftq_config, dict):
        if config.loftq_config is not None and not dataclasses.is_dataclass(config.loftq_config):
            raise ConfigError(f"`loftq_config` should be a LoftQConfig or a dict, not {config.loftq_config!r}.")
        config.loftq_config = {} if config.loftq_config is None else vars(config.loftq_config).copy()


def mutates(name: bool | str) -> bool:
    """Whether the initialisation changes the base's weights. Raises for a name that does not act."""
    key = "pissa" if isinstance(name, str) and name.startswith("pissa_niter_") else name
    if key not in STARTS:
        raise ConfigError(f"Unknown initialization init_lora_weights={name!r}. Known: {[*STARTS]}, 'pissa_niter_[n]'.")
    return STARTS[key][1]


@torch.no_grad()
def start(name: bool | str, method: Any) -> Tensor | None:
    """Fill the pair of `method` as `init_lora_weights` says; the base's new W (out, in) where it changes."""
    mutates(name)
    if "lora_B_bias" in method.places:
        bound = 0 if name else method.r**-0.5
        method.lora_B_bias.uniform_(-bound, bound)
    if isinstance(name, str) and (method.site.kind == "embedding" or (name in LINEAR and method.site.kind != "linear")):
        name = True  # PEFT starts an embedding's pair plainly whatever the name, and files rely on it
    if isinstance(name, str) and name.startswith("pissa_niter_"):
        rounds = name.removeprefix("pissa_niter_")
        if not rounds.isdigit():
            raise ConfigError(f"init_lora_weights={name!r}: the part after 'pissa_niter_' should be a whole number.")
        return _function("pissa")(method, int(rounds))
    return _function(STARTS[name][0])(method)


def _function(name: str) -> Callable[..., Tensor | None]:
    if name in ("default", "random", "gaussian"):
        return getattr(import_module(f"{__name__}.basic"), name)
    return getattr(import_module(f"{__name__}.{name}"), name)
