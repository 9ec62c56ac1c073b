"""What peft's loops for a model and a shadow beside it pass around: their caches and states in pairs.

Here one cache serves both networks, and the states go by the call; these are for programs that make their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import Cache

# What changes rows or tokens: done to both caches.
TOGETHER = ("reset", "reorder_cache", "crop", "batch_repeat_interleave", "batch_select_indices")
# Questions, and what they are answered with where there is no base cache. Others go to it as they are.
EMPTY = {"is_initialized": False, "is_sliding": [], "max_batch_size": 0, "max_cache_len": 0}


@dataclass(eq=False, slots=True)
class ShadowCarrier:
    """The states (rows, tokens, dim) of a model and of its shadow at one place."""

    hidden: Tensor
    shadow: Tensor


class ShadowCache(Cache):  # type: ignore[misc]
    """The cache of a model and that of its shadow: to the model it is its own.

    Attributes:
        base, shadow: the two, or None.
    """

    is_compileable = False

    def __init__(self, base: Any = None, shadow: Any = None) -> None:
        self.base, self.shadow = base, shadow

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or self.__dict__.get("base") is None:
            raise AttributeError(name)
        return getattr(self.base, name)

    def __len__(self) -> int:
        return 0 if self.base is None else len(self.base)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Add keys and values of a layer of the model; all it has of it."""
        return self.base.update(key_states, value_states, layer_idx, *args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many tokens the model's has."""
        return 0 if self.base is None else self.base.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """(Length, offset) of the keys that so many new tokens see."""
        return (query_length, 0) if self.base is None else self.base.get_mask_sizes(query_length, layer_idx)

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """How many tokens it can hold; -1: any number."""
        return -1 if self.base is None else self.base.get_max_cache_shape(layer_idx)

    def has_previous_state(self, layer_idx: int | None = None) -> bool:
        """Whether a recurrent layer has a state."""
        return False if self.base is None else self.base.has_previous_state(layer_idx)


def both(name: str) -> Any:
    def act(self: Any, *args: Any, **kwargs: Any) -> None:
        for held in (self.base, self.shadow):
            if held is not None:
                getattr(held, name)(*args, **kwargs)

    act.__doc__ = f"`{name}` of both caches."
    return act


def asked(name: str, empty: Any) -> Any:
    return property(lambda self: empty if self.base is None else getattr(self.base, name))


def passed(name: str) -> Any:
    return lambda self, *args, **kwargs: getattr(self.base, name)(*args, **kwargs)


for name in TOGETHER:
    setattr(ShadowCache, name, both(name))
for name, empty in EMPTY.items():
    setattr(ShadowCache, name, asked(name, empty))
for name in ("update_conv_state", "update_recurrent_state", "update_indexer"):
    setattr(ShadowCache, name, passed(name))
