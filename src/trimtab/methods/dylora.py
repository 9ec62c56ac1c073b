"""DyLoRA (Valipour et al. 2022, https://arxiv.org/abs/2210.07558, algorithm 1).   W' = W + alpha/b B[:, :b] A[:b].

In training every forward draws a rank b for all layers, so that the adapter can be used at any rank up to r afterwards:
`rank` says which. Its tensors have LoRA's names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.core.architectures import ATTENTION
from trimtab.core.config import LayerConfig, PeftType, help_field, match_pattern
from trimtab.core.dropout import mixed
from trimtab.core.families import LowRank, wide
from trimtab.core.method import Call, Leaves, require_rank
from trimtab.core.site import Site
from trimtab.errors import ConfigError
from trimtab.init import start


@dataclass
class DyLoraConfig(LayerConfig):
    """The configuration of a DyLoRA adapter."""

    r: int = help_field("The largest rank.", 8)
    min_rank: int = help_field("The smallest rank that training draws.", 1)
    rank: int | None = help_field("The rank in use outside training; r when None.", None)
    lora_alpha: float = help_field("The scale at rank b is lora_alpha / b.", 8)
    lora_dropout: float = help_field("Dropout on the adapter's input, in training.", 0.0)
    frozen: bool = help_field("Train only the last of the b components drawn (the paper's faster variant).", False)
    alpha_pattern: dict[str, float] = help_field("Module name or regular expression -> its own alpha.", factory=dict)
    init_lora_weights: bool = help_field("Start from B = 0; else random.", True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.DYLORA
        require_rank(self.r)
        for name in ("min_rank", "rank"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= self.r:
                raise ConfigError(f"`{name}` should be from 1 to r ({self.r}), not {value}.")

    def resolve(self, name: str) -> DyLoraConfig:
        """This config with the alpha that the pattern gives the module `name`."""
        found = match_pattern(self.alpha_pattern, name)
        if found is None:
            return self
        own = self.shallow()
        own.lora_alpha = self.alpha_pattern[found]
        return own


class DyLora(LowRank):
    """A low-rank pair whose components are sorted by training."""

    when = "the rank is to be chosen after training"
    config, prefix, targets = DyLoraConfig, "lora_", ATTENTION
    kinds = fused = frozenset({"linear", "embedding", "conv"})

    @classmethod
    def leaves(cls, site: Site, config: Any, shared: Leaves) -> Leaves:
        return cls.pair(site, config.r)

    def setup(self, config: Any) -> None:
        self.b = config.rank or config.r
        self.scale(config.r, config.lora_alpha, config.lora_alpha / self.b, config.lora_dropout)

    def reset(self, config: Any) -> Tensor | None:
        return start(config.init_lora_weights, self)

    @classmethod
    def facts(cls, config: Any, inputs: Mapping[str, Any], training: bool) -> dict[str, Any]:
        return {"rank": int(torch.randint(config.min_rank, config.r + 1, ()))} if training else {}

    def drawn(self, call: Call) -> int:
        """The rank of a forward in training, the same at every site: of the run's own random numbers, if it has any."""
        if call.seed is None:
            return call.fact(self, "rank") or self.b
        least = self.options.min_rank
        return least + mixed(call.seed, least) % (self.options.r - least + 1)

    def weight(self, W: Tensor) -> Tensor:
        A, B = self.matrices
        return W + self.scaling * (wide(B)[..., : self.b] @ wide(A)[: self.b])

    def after(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        A, B = self.matrices
        b = self.drawn(call) if self.training else self.b
        A, B = A[:b], B[:, :b]
        if self.training and self.options.frozen:
            A, B = torch.cat([A[: b - 1].detach(), A[b - 1 :]]), torch.cat([B[:, : b - 1].detach(), B[:, b - 1 :]], 1)
        x = call.drop(self, x, self.dropout)
        s = self.scaling * self.b / b
        h = self.site.apply(x, A.to(x.dtype) if x.is_floating_point() else A)
        return self.site.add(y, s * h, B.to(h.dtype))
