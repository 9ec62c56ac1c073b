"""Layers that a user's own class makes (`LoraConfig._register_custom_module`), on their way into a model."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from trimtab.core.targets import inside
from trimtab.errors import ConfigError
from trimtab.graft.adapters import Adapter
from trimtab.graft.base import Base
from trimtab.graft.selection import maker
from trimtab.layer.foreign import Foreign
from trimtab.layer.plan import Board


def foreign_layer(base: Base, path: str, adapter: Adapter, board: Board, layers: Collection[str]) -> Any:
    """The layer at a path, which now has the adapter: the one that is there, or a new one.

    Args:
        layers: the paths of the adapted layers there are.
    """
    around = [p for p in {*layers, *base.foreign, *adapter.layout.foreign} if p != path]
    if path in base.saved or any(inside([path], p) or inside([p], path) for p in around):
        raise ConfigError(
            f"'{path}', whose layer is of a class of its own, is, or lies in or around, what adapters change or train "
            "whole: one of them only can be adapted."
        )
    name, config = adapter.name, adapter.config
    own, last = config.resolve(path), path.rpartition(".")[2]
    layer = base.foreign.get(path)
    if layer is not None:
        adapter.foreign[path] = layer  # first: what fails half way is taken out again
        layer.update_layer(name, own.r, lora_alpha=own.lora_alpha, target_name=last, config=config)
        return layer
    module = base.modules[path]
    first = next(module.parameters(), None)
    made = maker(config, module)
    if not (issubclass(made, Foreign) and issubclass(made, nn.Module)):
        raise ConfigError(
            f"{made.__name__}, registered for a {type(module).__name__} ('{path}'), must inherit from nn.Module and "
            "from peft.tuners.lora.layer.LoraLayer."
        )
    layer = made(
        module,
        name,
        config=config,
        device_map={"": first.device} if first is not None else None,
        r=own.r,
        lora_alpha=own.lora_alpha,
        target_name=last,
        loaded_in_8bit=False,
        loaded_in_4bit=False,
        ephemeral_gpu_offload=config.runtime_config.ephemeral_gpu_offload,
        parameter_name=None,
        tied_adapter={},
    )
    layer.board, layer.own = board, None  # from now on it follows the model
    layer.train(module.training)
    adapter.foreign[path] = layer
    return layer
