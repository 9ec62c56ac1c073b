"""HiRA (Huang et al. 2025, https://openreview.net/forum?id=TwJrTz9cRS, eq. 6).   W' = W + W ∘ (B A)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from trimtab.core.architectures import ATTENTION
from trimtab.core.config import LayerConfig, PeftType, help_field, match_pattern
from trimtab.core.families import Delta, wide
from trimtab.core.method import Leaf, Leaves, require_rank
from trimtab.core.site import Site


@dataclass
class HiraConfig(LayerConfig):
    """The configuration of a HiRA adapter."""

    r: int = help_field("The rank of B A; that of the update is as high as W's allows.", 32)
    hira_dropout: float = help_field("Dropout on the adapter's input, in training.", 0.0)
    fan_in_fan_out: bool = help_field("The weight is stored (in, out), as in GPT-2; found out by itself.", False)
    init_weights: bool | Literal["gaussian"] | None = help_field(
        "Start from B = 0 with a uniform (True) or a gaussian A; None or False: random.", True
    )
    rank_pattern: dict[str, int] = help_field("Module name or regular expression -> its own rank.", factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.HIRA

    def resolve(self, name: str) -> HiraConfig:
        """This config with the rank that the pattern gives the module `name`."""
        own = self.shallow()
        own.r = self.rank_pattern.get(match_pattern(self.rank_pattern, name) or "", self.r)
        return own


class Hira(Delta):
    """The base's own weight, each entry scaled by one of a matrix of low rank."""

    when = "high-rank updates at LoRA's size; knowledge-heavy tasks"
    reads = True
    config, prefix, targets = HiraConfig, "hira_", ATTENTION
    kinds = fused = frozenset({"linear", "embedding", "conv"})
    views = ("r",)

    @classmethod
    def leaves(cls, site: Site, config: Any, shared: Leaves) -> Leaves:
        require_rank(config.r)
        A, B = names_at(site)
        return {
            A: Leaf(site.down(config.r)),  # (r, in)
            B: Leaf(site.up(config.r)),  # (out, r)
        }

    def setup(self, config: Any) -> None:
        self.r = config.r

    def reset(self, config: Any) -> None:
        A, B = self.factors
        for factor in (A, B):  # also where one is replaced below: the same seed gives the start it gives in PEFT
            factor.normal_()
        if not config.init_weights:
            return
        if self.site.kind == "embedding":
            A.zero_()
            B.normal_()
            return
        B.zero_()
        if config.init_weights == "gaussian":
            A.normal_(std=1 / self.r)
        else:
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """(A, B) as the layer holds them now."""
        A, B = names_at(self.site)
        return getattr(self, A), getattr(self, B)

    def form(self, A: Tensor, B: Tensor) -> Tensor:
        """dW (out, in), in fp32 at least; it follows from the base's own W, whatever stands between."""
        M = wide(self.site.upper(B)) @ wide(self.site.lower(A))
        return M.mul_(self.site.matrix())

    weight, through, after = Delta.summed, Delta.joined, Delta.added
    sources, dropped = factors, "hira_dropout"


def names_at(site: Site) -> tuple[str, str]:
    """What the pair is called at a site."""
    return ("hira_embedding_A", "hira_embedding_B") if site.kind == "embedding" else ("hira_A", "hira_B")
