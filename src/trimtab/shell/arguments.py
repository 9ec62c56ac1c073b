"""What functions are given by mistake, and what was meant."""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from trimtab.core.config import PeftConfig
from trimtab.errors import ArgumentError

# What a model is told that gets an adapter beside those it has, by a function that puts one into any model.
SEVERAL = (
    "Already found a `peft_config` attribute in the model. This will lead to having multiple adapters in the model. "
    "Make sure to know what you are doing!"
)


def require_model(model: Any, call: str) -> None:
    """Raise unless the argument is a model."""
    if isinstance(model, nn.Module):
        return
    if isinstance(model, PeftConfig):
        raise ArgumentError(f"{call} takes the model first, and then the config: they are swapped here.")
    if isinstance(model, str | os.PathLike):
        raise ArgumentError(
            f"{call} takes the model itself, not its path or name: load it first, with "
            f"AutoModelForCausalLM.from_pretrained('{model}') or the class of transformers that fits."
        )
    raise ArgumentError(f"{call} takes a model (a torch.nn.Module), not {_called(model)}.")


def require_config(config: Any, call: str) -> None:
    """Raise unless the argument is an adapter's config."""
    if isinstance(config, PeftConfig):
        return
    if isinstance(config, nn.Module):
        raise ArgumentError(f"{call} takes a config here, and this is a model: are two arguments swapped?")
    if isinstance(config, dict):
        how = "PeftConfig.from_dict(...)" if "peft_type" in config else "LoraConfig(**...), or that of another method"
        raise ArgumentError(f"{call} takes a config, not a dict: make one of it, with {how}.")
    if isinstance(config, str | os.PathLike):
        raise ArgumentError(
            f"{call} takes a config, not a path or name: '{config}' may be one for PeftConfig.from_pretrained, or, "
            "to load an adapter, for PeftModel.from_pretrained(model, path) or model.load_adapter(path, name)."
        )
    if isinstance(config, type) and issubclass(config, PeftConfig):
        raise ArgumentError(f"{call} takes a config, not its class: write {config.__name__}().")
    raise ArgumentError(f"{call} takes a config (LoraConfig ...), not {_called(config)}.")


def require_source(model_id: Any, call: str) -> None:
    """Raise unless the argument can be a folder or a Hub id."""
    if isinstance(model_id, str | os.PathLike):
        return
    if isinstance(model_id, nn.Module):
        raise ArgumentError(
            f"{call} takes the adapter's folder or Hub id here, and this is a model. Are two swapped? A model "
            "and an adapter's folder go to PeftModel.from_pretrained(model, folder)."
        )
    raise ArgumentError(f"{call} takes the adapter's folder or Hub id, not {_called(model_id)}.")


def _called(value: Any) -> str:
    kind = type(value)
    return (
        repr(value)
        if value is None or isinstance(value, int | float | bool)
        else f"{kind.__module__}.{kind.__qualname__}"
    )
