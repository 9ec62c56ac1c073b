"""BD-LoRA (Wang et al. 2025, https://arxiv.org/abs/2510.23346).   W' = W + s B A,   A or B block-diagonal.

The layers that are cut by rows among GPUs have a block-diagonal B, those that are cut by columns a block-diagonal A, so
that an adapter cut alike needs no traffic of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.core.config import help_field
from trimtab.core.families import LowRank, wide
from trimtab.core.method import Call, Leaf, Leaves
from trimtab.core.site import Site
from trimtab.core.targets import matches
from trimtab.errors import ConfigError
from trimtab.init import start


@dataclass
class BdLoraConfig:
    """Settings of BD-LoRA."""

    target_modules_bd_a: list[str] | None = help_field("The modules whose A is block-diagonal.", None)
    target_modules_bd_b: list[str] | None = help_field("The modules whose B is block-diagonal.", None)
    nblocks: int = help_field("The number of blocks.", 1)
    match_strict: bool = help_field("Every adapted module must be of one of the two kinds.", True)


def blocks_at(site: Site, config: Any) -> tuple[int, int]:
    """How many blocks A and B have at a site."""
    own, n = config.use_bdlora, config.use_bdlora.nblocks
    in_A, in_B = (
        matches(set(t or ()), site.name) is not None for t in (own.target_modules_bd_a, own.target_modules_bd_b)
    )
    if own.match_strict and not (in_A or in_B):
        raise ConfigError(
            f"Target {site.name} matches neither A nor B block-diagonal patterns.If this is intentional, set "
            "match_strict=False in BdLoraConfig during initialization."
        )
    if in_A and in_B:
        raise ConfigError(f"'{site.name}' is in both `target_modules_bd_a` and `target_modules_bd_b`.")
    width = site.fan_in if in_A else site.fan_out
    if (in_A or in_B) and (n < 1 or width % n or config.r % n):
        raise ConfigError(f"'{site.name}': {width} features and rank {config.r} should be divisible by {n} blocks.")
    return (n if in_A else 1), (n if in_B else 1)


def diagonal(M: Tensor, n: int) -> Tensor:
    """Blocks, stacked along the first axis, as the block-diagonal matrix they stand for."""
    return M if n == 1 else torch.block_diag(*M.chunk(n, 0))


class BdLora(LowRank):
    """A pair one of whose factors is kept as the blocks of its diagonal."""

    when = "serving on several GPUs without communication"
    example = {"use_bdlora": {"nblocks": 2, "target_modules_bd_a": ["q_proj", "v_proj"]}}
    prefix = "lora_"
    bias = LowRank.lifted
    kinds = fused = frozenset({"linear"})

    @classmethod
    def leaves(cls, site: Site, config: Any, shared: Leaves) -> Leaves:
        a, b = blocks_at(site, config)
        return cls.pair(site, config.r, config.lora_bias and b == 1) | {  # as PEFT's: blocks have no bias
            "lora_A.weight": Leaf((config.r, site.fan_in // a)),  # (r, in / a)
            "lora_B.weight": Leaf((site.fan_out, config.r // b)),  # (out, r / b)
        }

    def setup(self, config: Any) -> None:
        self.scale(config.r, config.lora_alpha, config.scaling(), config.lora_dropout)
        self.a, self.b = blocks_at(self.site, config)

    def reset(self, config: Any) -> Tensor | None:
        return start(
            config.init_lora_weights if config.init_lora_weights == "gaussian" else bool(config.init_lora_weights), self
        )

    def whole(self) -> tuple[Tensor, Tensor]:
        """(A (r, in), B (out, r))."""
        return diagonal(self.lora_A, self.a), diagonal(self.lora_B, self.b)

    def weight(self, W: Tensor) -> Tensor:
        A, B = self.whole()
        return W + self.scaling * wide(B) @ wide(A)

    def after(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        x = call.drop(self, x, self.dropout)
        A, B = (M.to(x.dtype) for M in self.whole())
        return self.site.add(y, self.site.apply(x, A) * self.scaling, B, shift=self.shift)
