"""VeLoRA (Miles et al. 2024, https://arxiv.org/abs/2405.17991, section 3).   W' = W + s B A,   dA from compressed x.

What the backward pass needs of the input x is kept compressed: x is cut into groups of equal size, and of each group z
only its length along one direction v is kept. A's gradient is that of the rebuilt groups, c (z·v) v.
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


def grouped(x: Tensor, n: int) -> Tensor:
    """The features of x (..., in) as groups (..., n, ceil(in / n)), filled up with zeros."""
    size = -(-x.shape[-1] // n)
    return F.pad(x, (0, n * size - x.shape[-1])).unflatten(-1, (n, size))


class Compressed(torch.autograd.Function):
    """x Aᵀ, which keeps x for A's gradient as its groups' lengths along v."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, v: Tensor, n: int, c: float) -> Tensor:
        """The product; `v` (d,) is a unit vector, `c` the scale of what is rebuilt."""
        ctx.save_for_backward(grouped(x, n) @ v if ctx.needs_input_grad[1] else None, A, v)
        ctx.c, ctx.width = c, x.shape[-1]
        return F.linear(x, A)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Exact for x, of the rebuilt x for A."""
        (dh,), (lengths, A, v) = gradients, ctx.saved_tensors
        dx = dh @ A if ctx.needs_input_grad[0] else None
        if lengths is None:
            return dx, None, None, None, None
        # (dhᵀ lengths) v, without the rebuilt input.
        d = dh.flatten(0, -2).T @ lengths.flatten(0, -2)  # (r, n)
        return dx, ctx.c * (d[..., None] * v).flatten(1)[:, : ctx.width], None, None, None


class Velora(LowRank):
    """A pair of which A is trained on what is left of its input."""

    when = "activations take too much memory"
    example = {"velora_config": {}}
    prefix = "lora_"
    kinds = fused = frozenset({"linear"})
    mutates = staticmethod(lambda config: mutates(config.init_lora_weights))

    @classmethod
    def leaves(cls, site: Site, config: Any, shared: Leaves) -> Leaves:
        size = -(-site.fan_in // config.velora_config.num_groups)
        return cls.pair(site, config.r) | {"lora_velora_embed": Leaf((size,), train=False, buffer=True)}  # (d,)

    def setup(self, config: Any) -> None:
        self.scale(config.r, config.lora_alpha, config.scaling(), config.lora_dropout)

    def reset(self, config: Any) -> Tensor | None:
        if config.velora_config.init_type == "random":
            self.lora_velora_embed.copy_(F.normalize(torch.randn_like(self.lora_velora_embed), dim=0))
        else:
            self.lora_velora_embed.zero_()
        return start(config.init_lora_weights, self)

    @torch.no_grad()
    def direction(self, x: Tensor) -> Tensor:
        """v (d,) for an input in training."""
        own, held = self.options.velora_config, self.lora_velora_embed
        if own.init_type == "batch_average" or (own.init_type == "batch_average_once" and not held.any()):
            mean = grouped(x.to(held.dtype), own.num_groups).flatten(0, -2).mean(0)
            held.copy_(F.normalize(mean if mean.any() else torch.ones_like(mean), dim=0))
        return held.to(x.dtype, copy=True)

    def weight(self, W: Tensor) -> Tensor:
        return W + self.delta()

    def after(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        x = call.drop(self, x, self.dropout)
        if not self.training:
            h, B = self.update(x)
            return self.site.add(y, h, B)
        own, (A, B) = self.options.velora_config, (M.to(x.dtype) for M in self.matrices)
        h = Compressed.apply(x, A, self.direction(x), own.num_groups, own.scale)
        return self.site.add(y, h * self.scaling, B)
