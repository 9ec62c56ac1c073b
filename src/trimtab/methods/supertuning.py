"""Super-tuning (Ilin et al. 2026, https://arxiv.org/abs/2607.09287).   W' = W + S,   S sparse;   Supra: + s B A.

The trained entries of S stand where W is largest (or smallest) in magnitude; s = alpha / r. This is PEFT's choice and
one that the paper compares with: its own weighs the magnitudes by the norms of the inputs, which takes data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.core.architectures import ATTENTION
from trimtab.core.config import LayerConfig, PeftType, help_field
from trimtab.core.families import Sparse, wide
from trimtab.core.method import Call, Leaf, Leaves
from trimtab.core.site import Site
from trimtab.errors import ConfigError


@dataclass
class SupertuningConfig(LayerConfig):
    """The configuration of a super-tuning adapter; with a rank `r` it is a Supra adapter."""

    sparsity: float = help_field("The share of a weight's entries that are not trained.", 0.99)
    select_top: bool = help_field("Train the entries that are largest in magnitude; else the smallest.", True)
    r: int | None = help_field("The rank of LoRA's part; None: there is none.", None)
    lora_alpha: float | None = help_field("LoRA's scale is lora_alpha / r; None: 2 r.", None)
    lora_dropout: float = help_field("Dropout on the input of LoRA's part, in training.", 0.0)
    init_weights: bool = help_field("Start from S = 0 and B = 0; else random.", True)
    save_precomputed_indices: bool = help_field("Keep the entries' places in the file; else find them again.", True)

    exclude_modules: ClassVar[None] = None  # type: ignore[misc]
    layers_to_transform: ClassVar[None] = None  # type: ignore[misc]
    layers_pattern: ClassVar[None] = None  # type: ignore[misc]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.SUPERTUNING
        if not 0 <= self.sparsity < 1:
            raise ConfigError(f"sparsity must be in [0.0, 1.0), got {self.sparsity}")
        if self.r is not None and self.r <= 0:
            raise ConfigError(f"r must be a positive integer or None, got {self.r}")
        if self.r is None and self.lora_alpha is not None:
            raise ConfigError("lora_alpha is set but r is None - Supra mode requires an explicit r.")
        if self.r is not None and self.lora_alpha is None:
            self.lora_alpha = 2 * self.r


class Supertuning(Sparse):
    """A sparse delta where the weight is largest, with or without one of low rank."""

    when = "sparse updates where weights are largest"
    config, prefix, targets = SupertuningConfig, "supertuning_", ATTENTION
    kinds = fused = frozenset({"linear"})
    sources = property(lambda self: (self.supertuning_values,))

    @classmethod
    def leaves(cls, site: Site, config: Any, shared: Leaves) -> Leaves:
        size, kept = site.fan_in * site.fan_out, config.save_precomputed_indices
        n = int((1 - config.sparsity) * size)
        if not n:
            raise ConfigError(
                f"sparsity={config.sparsity} leaves no trainable entries for a weight with {size} elements "
                f"('{site.name}'): lower it so that at least one entry is trained."
            )
        leaves = {
            "supertuning_values": Leaf((n,)),  # (n,)
            "supertuning_indices": Leaf((n,), train=False, file=kept, buffer=True, dtype=torch.int32),  # (n,)
        }
        if config.r is not None:
            leaves["supertuning_lora_A.weight"] = Leaf((config.r, site.fan_in))  # (r, in)
            leaves["supertuning_lora_B.weight"] = Leaf((site.fan_out, config.r))  # (out, r)
        return leaves

    def setup(self, config: Any) -> None:
        self.scaling = self.unit = config.lora_alpha / config.r if config.r else 1.0

    def reset(self, config: Any) -> None:
        W = self.site.matrix().flatten().abs()
        self.supertuning_indices.copy_(W.topk(len(self.supertuning_values), largest=config.select_top).indices)
        start = nn.init.zeros_ if config.init_weights else nn.init.normal_
        start(self.supertuning_values)
        if config.r:
            A, B = self.supertuning_lora_A, self.supertuning_lora_B
            for factor in (A, B, A):  # twice: the same seed gives the start it gives in PEFT
                nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
            if config.init_weights:
                B.zero_()

    def entries(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The places and values of S."""
        return self.supertuning_indices.long(), values

    def through(self, x: Tensor, call: Call) -> Tensor | None:
        return None if self.options.r else self.joined(x, call)  # B A formed would take more products

    def weight(self, W: Tensor) -> Tensor:
        BA = wide(self.supertuning_lora_B) @ wide(self.supertuning_lora_A) if self.options.r else 0
        return self.summed(W) + self.scaling * BA

    def after(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        y = self.added(y, x, call)
        if not self.options.r:
            return y
        A, B = self.supertuning_lora_A.to(x.dtype), self.supertuning_lora_B.to(x.dtype)
        return y + self.scaling * (call.drop(self, x, self.options.lora_dropout) @ A.T) @ B.T
