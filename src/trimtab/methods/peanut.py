"""PEANuT (Zhong et al. 2024, https://arxiv.org/abs/2410.01870, section 3).   W' = W + s B f(W).

f(W) = σ(D_k ... σ(E_1 σ(A W))) is a small network of the frozen weight itself: `depth` square layers E and as many D,
each D's output plus what its E was given, stand between A and B.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.architectures import ATTENTION
from trimtab.core.config import LayerConfig, PeftType, help_field
from trimtab.core.families import wide
from trimtab.core.method import Call, Leaf, Leaves, Method
from trimtab.core.site import Site
from trimtab.errors import ConfigError


@cache
def activation(name: str) -> Callable[[Tensor], Tensor]:
    """An activation by the name transformers gives it.

    Raises:
        ConfigError: it gives none that name.
    """
    if name == "relu":
        return torch.relu
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        raise ConfigError(f"Unsupported `act_fn`: {name}. Must be one of {sorted(ACT2FN)}.")
    function: Callable[[Tensor], Tensor] = ACT2FN[name]
    return function


@dataclass
class PeanutConfig(LayerConfig):
    """The configuration of a PEANuT adapter."""

    r: int = help_field("The width of the network.", 32)
    depth: int = help_field("Square layers on each side of its middle.", 0)
    act_fn: str = help_field("The activation σ, by the name transformers gives it.", "relu")
    scaling: float = help_field("The scale s.", 1.0)
    init_weights: bool = help_field("Start from B = 0; else random.", True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.PEANUT
        if self.r <= 0:
            raise ConfigError("`r` must be a positive integer.")
        if not isinstance(self.depth, int) or self.depth < 0:
            raise ConfigError("`depth` can only be a non-negative integer.")
        activation(self.act_fn)


class Peanut(Method):
    """An update of rank r whose right factor is a network of the frozen weight: the base's own, also in a stack."""

    when = "updates that follow from the weight, not linearly"
    reads = True
    config, prefix, targets = PeanutConfig, "peanut_", ATTENTION
    kinds = fused = frozenset({"linear", "conv", "embedding"})

    @classmethod
    def leaves(cls, site: Site, config: Any, shared: Leaves) -> Leaves:
        r = config.r
        square = [f"peanut_{side}.{{}}.{i}.weight" for side in ("encoders", "decoders") for i in range(config.depth)]
        return {
            "peanut_A.weight": Leaf((r, site.fan_out)),  # (r, out)
            "peanut_B.weight": Leaf((site.fan_out, r)),  # (out, r)
            **{name: Leaf((r, r)) for name in square},  # (r, r)
        }

    def setup(self, config: Any) -> None:
        self.scaling = self.unit = config.scaling
        self.act = activation(config.act_fn)

    def reset(self, config: Any) -> None:
        A, B, *square = (self.tensor(leaf) for leaf in self.declared)
        for tensor in (A, B, *square, A, *square):  # twice, as PEFT draws them
            nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))
        if config.init_weights:
            B.zero_()
        else:
            nn.init.kaiming_uniform_(B, a=math.sqrt(5))

    def network(self) -> Tensor:
        """f(W) (r, in), in fp32 at least."""
        A, _, *square = (wide(self.tensor(leaf)) for leaf in self.declared)
        z, given = self.act(A @ wide(self.site.matrix())), []
        for E in square[: self.options.depth]:
            given.append(z)
            z = self.act(E @ z)
        for D in square[self.options.depth :]:
            z = self.act(D @ z) + given.pop()
        return z

    def weight(self, W: Tensor) -> Tensor:
        return W + self.scaling * wide(self.peanut_B) @ self.network()

    def after(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        h = self.site.apply(x, self.network().to(y.dtype)) * self.scaling
        return self.site.add(y, h, self.peanut_B.to(y.dtype))
