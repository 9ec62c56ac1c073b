"""A small model of a base model's kind beside it: built from the base's config, with room in the base's cache."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.errors import ConfigError, RouteError


def facts_of(block: nn.Module) -> Any:
    """The config of a model, as the attention in one of its blocks holds it.

    Raises:
        ConfigError: it is no block of a decoder of transformers.
    """
    configs = (getattr(module, "config", None) for module in block.modules())
    found = next((config for config in configs if hasattr(config, "num_hidden_layers")), None)
    if found is None:
        raise ConfigError(f"{type(block).__name__} is no block of a decoder of transformers.")
    return found


def facts_at(model_id: str) -> Any:
    """The config of a model in a folder or on the Hub.

    Raises:
        ConfigError: there is none.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model_id)
    except (OSError, ValueError) as error:
        raise ConfigError(f"There is no model at '{model_id}': {error}") from error


def read(model_id: str) -> Any:
    """A model from a folder or the Hub, without its head and in fp32."""
    from transformers import AutoModel

    return AutoModel.from_pretrained(model_id, dtype=torch.float32)


def mirror(base: Any, sizes: Mapping[str, int | None], embeddings: bool = True, before: int = 0) -> Any:
    """A model of the kind of a config `base`, with numbers of its own and in fp32.

    Args:
        sizes: fields of its config that differ; None leaves one.
        embeddings: False where its own are never read: it has one row of them.
        before: its layers are counted from there on.
    """
    from transformers import AutoModel

    config = copy.deepcopy(base)
    for name, value in sizes.items():
        if value is not None:
            setattr(config, name, value)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    if not embeddings:
        config.vocab_size, config.pad_token_id = 1, None
    try:
        made = AutoModel.from_config(config, dtype=torch.float32)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"There is no small model of these sizes: {error}") from error
    for module in made.modules():
        if isinstance(getattr(module, "layer_idx", None), int):
            module.layer_idx += before
    return made


def room(cache: Any, h: Tensor, block: nn.Module, small: Any) -> Any:
    """The base's cache with room for the layers of the small model behind its own; None where there is none."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    if cache is None:
        return None
    at_start = any(getattr(m, "layer_idx", None) == 0 for m in block.modules())
    if isinstance(cache, DynamicCache) and at_start:
        last = max(m.layer_idx for m in small.modules() if isinstance(getattr(m, "layer_idx", None), int))
        cache.layers += [DynamicLayer() for _ in range(last + 1 - len(cache.layers))]
        return cache
    if cache.get_seq_length() > (0 if at_start else h.shape[1]):
        raise RouteError("A shadow that starts above the first block, or beside such a cache, needs use_cache=False.")
    return None
