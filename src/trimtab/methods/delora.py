"""DeLoRA (Bini et al. 2025, https://arxiv.org/abs/2503.18225).   W' = W + B D A diag(‖W_j‖),   D_i = λ / (r‖A_i‖‖B_i‖).

A_i are the rows of A, B_i the columns of B and W_j those of the base's weight, whose norms are kept: λ is the one
bound on the size of the change, whatever A and B are. The norms of columns are PEFT's and those of its authors' code:
the paper's eq. 15 has one norm, of W.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from trimtab.core.architectures import ATTENTION
from trimtab.core.config import LayerConfig, PeftType, help_field, match_pattern
from trimtab.core.families import wide
from trimtab.core.method import Call, Leaf, Leaves, Method, require_rank
from trimtab.core.site import Site
from trimtab.errors import ConfigError

LEAST = 1e-4  # norms below count as this


@dataclass
class DeloraConfig(LayerConfig):
    """The configuration of a DeLoRA adapter."""

    r: int = help_field("The rank.", 8)
    delora_lambda: float = help_field("What λ, the bound on the change, starts from.", 15)
    module_dropout: float = help_field("Dropout on the adapter's input, in training.", 0.0)
    bias: str = help_field("Which biases of the base are trained too: none, all or delora_only.", "none")
    init_weights: bool = help_field("Start from B = 0; else from a random B.", True)
    rank_pattern: dict[str, int] | None = help_field("Module name or regular expression -> its own rank.", factory=dict)
    lambda_pattern: dict[str, float] | None = help_field(
        "Module name or regular expression -> its own λ.", factory=dict
    )

    patterns = ("rank_pattern", "lambda_pattern")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.DELORA
        if self.r <= 0:
            raise ConfigError(f"`r` must be a positive integer; got {self.r}.")

    def resolve(self, name: str) -> DeloraConfig:
        """This config with the rank and λ that the patterns give the module `name`."""
        own = self.shallow()
        ranks, lambdas = self.rank_pattern or {}, self.lambda_pattern or {}
        own.r = ranks.get(match_pattern(ranks, name) or "", self.r)
        own.delora_lambda = lambdas.get(match_pattern(lambdas, name) or "", self.delora_lambda)
        return own


class Delora(Method):
    """A pair of low rank whose directions are learned apart from the strength λ."""

    when = "training that is robust to the learning rate"
    config, prefix, targets = DeloraConfig, "delora_", ATTENTION
    kinds = fused = frozenset({"linear"})
    views = ("r",)

    @classmethod
    def leaves(cls, site: Site, config: Any, shared: Leaves) -> Leaves:
        require_rank(config.r)
        return {
            "delora_A": Leaf((config.r, site.fan_in)),  # (r, in)
            "delora_B": Leaf((site.fan_out, config.r)),  # (out, r)
            "delora_lambda": Leaf((1,)),  # (1,)
            "delora_w_norm": Leaf((site.fan_in,), train=False, buffer=True),  # (in,)
        }

    def setup(self, config: Any) -> None:
        self.r = config.r

    def reset(self, config: Any) -> None:
        nn.init.kaiming_uniform_(self.delora_A, a=math.sqrt(5))
        if config.init_weights:
            self.delora_B.zero_()
        else:
            nn.init.kaiming_uniform_(self.delora_B, a=math.sqrt(5))
        self.delora_lambda.fill_(config.delora_lambda)
        self.delora_w_norm.copy_(wide(self.site.matrix()).norm(dim=0))

    def factors(self) -> tuple[Tensor, Tensor]:
        """(A (r, in), B (out, r)) whose product is the change: normed, weighed, in fp32 at least."""
        A, B = wide(self.delora_A), wide(self.delora_B)
        lengths = A.norm(dim=1).clamp_min(LEAST) * B.norm(dim=0).clamp_min(LEAST)
        return A * self.delora_w_norm, B * (wide(self.delora_lambda) / (self.r * lengths))

    def weight(self, W: Tensor) -> Tensor:
        A, B = self.factors()
        return W + B @ A

    def after(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        A, B = self.factors()
        x = call.drop(self, x, self.options.module_dropout)
        return y + self.site.mix(self.site.apply(x, A.to(x.dtype)), B.to(x.dtype))
