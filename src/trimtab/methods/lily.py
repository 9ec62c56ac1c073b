"""Lily (Zhong et al. 2024, https://arxiv.org/abs/2407.09946).   y += s (Σ_e w_e B_e) A x,   w = mean(softmax(R A x)).

Of the layers that one entry of `target_modules` names, `stride_A` neighbours share an A, and all share the B_e; each
has a router R of its own. The mean is over all tokens of a forward, so that one pair serves them; since it follows the
input, W' = W + s B A is another one in every forward, and nothing can be merged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.architectures import ATTENTION
from trimtab.core.config import LayerConfig, PeftType, help_field
from trimtab.core.families import wide
from trimtab.core.method import Call, Leaf, Leaves, Method, no_weight, require_rank
from trimtab.core.site import Site
from trimtab.core.targets import matches
from trimtab.errors import ConfigError


@dataclass
class LilyConfig(LayerConfig):
    """The configuration of a Lily adapter."""

    r: int = help_field("The rank; as few pairs serve many layers, two to four times a LoRA's.", 32)
    stride_A: int = help_field("How many neighbouring layers share an A.", 1)
    num_B: int = help_field("How many B there are to mix.", 2)
    scaling: float = help_field("The scale s itself: it does not follow the rank.", 1.0)
    init_weights: bool = help_field("Start from B = 0; else from random B.", True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LILY
        require_rank(self.r)
        if self.stride_A < 1:
            raise ConfigError("`stride_A` must be at least 1.")
        if self.num_B < 2:
            raise ConfigError("`num_B` must be at least 2 for the router to be trained.")


class Lily(Method):
    """A shared pair of low rank whose B is mixed anew for every input."""

    when = "layers are to share and mix their updates; not merged"
    config, prefix, targets = LilyConfig, "lily_", ATTENTION
    kinds = fused = frozenset({"linear"})
    mergeable = False
    views = ("r", "scaling")

    @classmethod
    def leaves(cls, site: Site, config: Any, shared: Leaves) -> Leaves:
        return {
            "lily_A.weight": Leaf((config.r, site.fan_in)),  # (r, in)
            "lily_B.weight": Leaf((config.num_B * config.r, site.fan_out)),  # (num_B · r, out)
            "lily_router.weight": Leaf((config.num_B, config.r)),  # (num_B, r)
        }

    @classmethod
    def joint(cls, config: Any, sites: Sequence[Site]) -> Mapping[str, Sequence[int]]:
        families: dict[Any, list[int]] = {}
        keeps_A, keeps_B = [], []
        for i, site in enumerate(sites):
            family = families.setdefault((matches(config.target_modules, site.name), site.fan_in, site.fan_out), [])
            family.append(i)
            keeps_A.append(family[(len(family) - 1) // config.stride_A * config.stride_A])
            keeps_B.append(family[0])
        return {"lily_A.weight": keeps_A, "lily_B.weight": keeps_B}

    def setup(self, config: Any) -> None:
        self.r, self.scaling = config.r, config.scaling
        self.unit = self.scaling  # what `set_scale` multiplies

    def reset(self, config: Any) -> None:
        for M in (self.lily_A, self.lily_B, self.lily_router):
            nn.init.kaiming_uniform_(M, a=math.sqrt(5))
        if config.init_weights:
            self.lily_B.zero_()

    def weight(self, W: Tensor) -> Tensor:
        raise no_weight(self)

    def after(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        h = self.site.apply(x, self.lily_A.to(x.dtype))
        w = wide(nn.functional.linear(h, self.lily_router.to(h.dtype))).softmax(-1).flatten(0, -2).mean(0)
        B = torch.einsum("e,ero->or", w, wide(self.lily_B).unflatten(0, (-1, self.r)))
        return y + self.site.mix(h, self.scaling * B.to(h.dtype))
