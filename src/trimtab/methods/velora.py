"""VeLoRA (Miles et al. 2024, https://arxiv.org/abs/2405.17991, section 3).   W' = W + s B A,   dA from compressed x.

Each token x is cut into sub-tokens x_m, and of each only its projection z_m = x_m · v on one unit vector v is kept for
the backward pass. A is trained as if it had been given the tokens rebuilt from those, c z_m v.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.core.config import help_field
from trimtab.core.families import LowRank
from trimtab.core.method import Call, Leaf, Leaves
from trimtab.core.site import Site
from trimtab.errors import ConfigError
from trimtab.init import mutates, start

STARTS = ("batch_average", "batch_average_once", "random")


@dataclass
class VeloraConfig:
    """Settings of VeLoRA."""

    num_groups: int = help_field("Into how many groups the features of an input are cut.", 64)
    scale: float = help_field("The scale of the rebuilt input.", 1.0)
    init_type: Literal["batch_average", "batch_average_once", "random"] = help_field(
        "The direction: the mean group of each batch, of the first one, or random.", "batch_average"
    )

    def __post_init__(self) -> None:
        for name in ("num_groups", "scale"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"`{name}` should be positive, got {getattr(self, name)}.")
        if self.init_type not in STARTS:
            raise ConfigError(f"Unsupported `init_type` {self.init_type!r}. Supported values are {', '.join(STARTS)}.")


def subtokens(x: Tensor, m: int) -> Tensor:
    """x (..., in) as m pieces (..., m, ceil(in / m)), the last filled up with zeros."""
    size = -(-x.shape[-1] // m)
    return F.pad(x, (0, m * size - x.shape[-1])).unflatten(-1, (m, size))


def rebuilding(x: Tensor, A: Tensor, z: Tensor, v: Tensor, m: int, scale: float) -> Tensor:
    """A x (..., r), whose backward pass gives A what the rebuilt tokens would have given it."""
    # A times a rebuilt token is Σ_m z_m (A_m · v): that needs z alone, and its gradient is A's.
    rebuilt = F.linear(z, subtokens(A, m) @ (scale * v))
    return F.linear(x, A.detach()) + (rebuilt - rebuilt.detach())


class Velora(LowRank):
    """A pair of which A is trained on what is left of its input."""

    when = "activations take too much memory"
    example = {"velora_config": {}}
    prefix = "lora_"
    kinds = fused = frozenset({"linear"})
    mutates = staticmethod(lambda config: mutates(config.init_lora_weights))
    combine, combined_config, bias = LowRank.combined, LowRank.settle, LowRank.lifted

    @classmethod
    def leaves(cls, site: Site, config: Any, shared: Leaves) -> Leaves:
        size = -(-site.fan_in // config.velora_config.num_groups)
        leaves = cls.pair(site, config.r, config.lora_bias)
        return leaves | {"lora_velora_embed": Leaf((size,), train=False, buffer=True)}  # (d,)

    def setup(self, config: Any) -> None:
        self.scale(config.r, config.lora_alpha, config.scaling(), config.lora_dropout)

    def reset(self, config: Any) -> Tensor | None:
        if config.velora_config.init_type == "random":
            self.lora_velora_embed.copy_(F.normalize(torch.randn_like(self.lora_velora_embed), dim=0))
        else:
            self.lora_velora_embed.zero_()
        return start(config.init_lora_weights, self)

    @torch.no_grad()
    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """z (..., m) of x (..., in), and the v (d,) that it is made with."""
        own, v = self.options.velora_config, self.lora_velora_embed
        pieces = subtokens(x, own.num_groups)
        if own.init_type == "batch_average" or (own.init_type == "batch_average_once" and not v.any()):
            v.copy_(F.normalize(pieces.to(v.dtype).flatten(0, -2).mean(0), dim=0))
        v = v.to(x.dtype, copy=True)  # the next forward may change it before this one's backward pass
        return pieces @ v, v

    def weight(self, W: Tensor) -> Tensor:
        return W + self.delta()

    def after(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        x = call.drop(self, x, self.dropout)
        if not self.training:
            h, B = self.update(x)
            return self.site.add(y, h, B, shift=self.shift)
        own, (A, B) = self.options.velora_config, (M.to(x.dtype) for M in self.matrices)
        h = rebuilding(x, A, *self.project(x), own.num_groups, own.scale)
        return self.site.add(y, h * self.scaling, B, shift=self.shift)
