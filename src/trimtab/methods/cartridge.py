"""Cartridges (Eyuboglu et al. 2025, https://arxiv.org/abs/2506.06266, section 3.2).   Attention to [Z_k; K], [Z_v; V].

Z starts as the keys and values of a text (`initialize_kv_prefix_from_text`) or at random; its first tokens stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.config import PeftType, PromptLearningConfig, help_field
from trimtab.core.method import Call
from trimtab.core.model_method import PromptMethod
from trimtab.errors import ConfigError


@dataclass
class CartridgeConfig(PromptLearningConfig):
    """The configuration of a trained cache."""

    num_frozen_tokens: int = help_field("So many of the first virtual tokens are not trained.", 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.CARTRIDGE
        if self.num_frozen_tokens < 0:
            raise ConfigError(f"`num_frozen_tokens` must be >= 0, got {self.num_frozen_tokens}.")
        if self.num_virtual_tokens is not None and self.num_frozen_tokens > self.num_virtual_tokens:
            raise ConfigError(
                f"`num_frozen_tokens` must be <= `num_virtual_tokens`, got num_frozen_tokens={self.num_frozen_tokens} "
                f"and num_virtual_tokens={self.num_virtual_tokens}."
            )


class Cartridge(PromptMethod):
    """Keys and values (virtual tokens, layers · 2 · dim), the first of them frozen."""

    when = "a long text is to be held in a trained cache"
    example = {"num_virtual_tokens": 20}
    config, cached, frozen = CartridgeConfig, True, ("frozen_embedding",)

    def build(self, config: Any) -> None:
        kept, width = config.num_frozen_tokens, config.num_layers * 2 * config.token_dim
        if kept:
            self.frozen_embedding = nn.Parameter(torch.empty(kept, width))  # (frozen, width)
        self.trainable_embedding = nn.Parameter(torch.empty(config.num_virtual_tokens - kept, width))  # (n, width)

    def reset(self, config: Any, base: Any) -> None:
        for part in self.parameters():
            nn.init.normal_(part)

    def prompt(self, call: Call) -> Tensor:
        parts = dict(self.named_parameters())
        return torch.cat([parts[n] for n in ("frozen_embedding", "trainable_embedding") if n in parts])

    def restore(self, name: str, value: Tensor) -> None:
        first = len(value) - len(self.trainable_embedding)
        self.trainable_embedding.data.copy_(value[first:])
        if first:
            self.frozen_embedding.data.copy_(value[:first])
