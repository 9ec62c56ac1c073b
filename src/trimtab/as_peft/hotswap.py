"""peft.utils.hotswap: as strict as PEFT, where `trimtab.hotswap_adapter` loads anew what has no place."""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from trimtab.core.config import PeftConfig
from trimtab.core.io import split_hub_arguments
from trimtab.files.store import load_peft_weights
from trimtab.shell.hotswap import CONFIG_KEYS_TO_CHECK, prepare_model_for_compiled_hotswap
from trimtab.shell.hotswap import check_configs as check_hotswap_configs_compatible
from trimtab.shell.hotswap import swap as hotswap_adapter_from_state_dict
from trimtab.shell.locate import locate_graft

__all__ = [
    "CONFIG_KEYS_TO_CHECK",
    "check_hotswap_configs_compatible",
    "hotswap_adapter",
    "hotswap_adapter_from_state_dict",
    "prepare_model_for_compiled_hotswap",
]


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | os.PathLike[str],
    adapter_name: str,
    torch_device: str | None = None,
    **kwargs: Any,
) -> None:
    """Give a loaded adapter the numbers, ranks and scales of the one in a folder or on the Hub.

    Raises:
        ConfigError: the two differ in more than ranks and scales.
        RuntimeError: the new one adapts layers that the old one does not.
    """
    hub, _ = split_hub_arguments(kwargs)
    adapter = locate_graft(model)[0].require(adapter_name)
    config = PeftConfig.from_pretrained(model_name_or_path, **hub)
    check_hotswap_configs_compatible(adapter.config, config)
    tensors = load_peft_weights(model_name_or_path, torch_device, **hub)
    hotswap_adapter_from_state_dict(model, tensors, adapter_name, config)
