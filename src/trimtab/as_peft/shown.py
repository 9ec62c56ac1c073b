"""What layers and tuners of peft show of classes that only the alias has; `names` hangs it on ours."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from trimtab.as_peft.quantised import resolve_quantization_backend
from trimtab.layer.adapted import AdaptedLayer
from trimtab.shell.tuner import tuner_class


def _allocator(tuner: Any) -> Any:
    """The budget of the adapter that trains; loops of one's own read its schedule."""
    name = _trained(tuner)
    return import_module("trimtab.as_peft.routing").RankAllocator(tuner.model, tuner.peft_config[name], name)


def _trained(tuner: Any) -> str:
    names: list[str] = tuner.active_adapters
    return names[0]


def show() -> None:
    """Give our classes these attributes."""
    layer, ranks = AdaptedLayer, tuner_class("ADALORA")
    setattr(layer, "quantization_backend", property(lambda self: resolve_quantization_backend(self.frozen)))  # noqa: B010
    setattr(ranks, "rankallocator", property(_allocator))  # noqa: B010
    setattr(ranks, "trainable_adapter_name", property(_trained))  # noqa: B010
