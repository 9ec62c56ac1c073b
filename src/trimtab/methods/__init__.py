"""Floor 1: one file a method. The registry: one line a method, loaded when first used."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from trimtab.core.config import PeftConfig
from trimtab.core.method import Method
from trimtab.errors import ConfigError

# peft_type: (file, method, config)
METHODS: dict[str, tuple[str, str, str]] = {
    "LORA": ("lora", "Lora", "LoraConfig"),
    "TRAINABLE_TOKENS": ("trainable_tokens", "TrainableTokens", "TrainableTokensConfig"),
}


def config_class(peft_type: str) -> type[PeftConfig]:
    """The config class of a method, by its `peft_type`."""
    file, _, config = _row(peft_type)
    cls: type[PeftConfig] = getattr(import_module(f"{__name__}.{file}"), config)
    return cls


def method_class(config: PeftConfig) -> type[Method]:
    """The method a config asks for: its type's own, or one of that type's variants."""
    file, method, _ = _row(str(getattr(config.peft_type, "value", config.peft_type)))
    module = import_module(f"{__name__}.{file}")
    for field, variant in getattr(module, "VARIANTS", {}).items():
        if getattr(config, field):
            name, _, cls = variant.partition(":")
            return load(name, cls)
    return load(file, method)


def load(file: str, name: str) -> Any:
    """An object of a method's file."""
    return getattr(import_module(f"{__name__}.{file}"), name)


def _row(peft_type: str) -> tuple[str, str, str]:
    if peft_type not in METHODS:
        raise ConfigError(f"The method '{peft_type}' is not known here. Known: {', '.join(METHODS)}.")
    return METHODS[peft_type]


PeftConfig.class_of = staticmethod(config_class)
