"""MiSS (Kang & Yin 2024, https://arxiv.org/abs/2409.15371).   W' = W + (D D ...)ᵀ;   bat: W' = W + W D + D, by blocks.

D (r, out) is repeated along the input; "mini" repeats it along the output as well. "bat" cuts W into blocks (r, r).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.core.architectures import ATTENTION
from trimtab.core.config import LayerConfig, PeftType, help_field
from trimtab.core.families import Delta, wide
from trimtab.core.method import Call, Leaf, Leaves, require_rank
from trimtab.core.site import Site
from trimtab.errors import ConfigError


@dataclass
class MissConfig(LayerConfig):
    """The configuration of a MiSS adapter."""

    r: int = help_field("The rank: the period of the update along the input.", 64)
    miss_dropout: float = help_field("Dropout on the adapter's input, in training.", 0.0)
    mini_r: int = help_field("The period along the output, with init_weights='mini'.", 1)
    init_weights: bool | Literal["bat", "mini"] = help_field(
        "Start from D = 0, in the form of MiSS (True), 'bat' or 'mini'; False: a random D.", True
    )
    bias: str = help_field("Which biases of the base are trained too: none, all or MiSS_only.", "none")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.MISS


class Miss(Delta):
    """A small matrix that is repeated over the whole weight."""

    when = "LoRA's place with one matrix and a faster step"
    config, prefix, targets = MissConfig, "miss_", ATTENTION
    kinds = fused = frozenset({"linear"})

    @classmethod
    def leaves(cls, site: Site, config: Any, shared: Leaves) -> Leaves:
        r, out, into = config.r, site.fan_out, site.fan_in
        require_rank(r)
        if r > into:
            raise ConfigError(f"`r` ({r}) must be less than or equal to in_features ({into}) of '{site.name}'.")
        if config.init_weights == "bat":
            if into % r or out % r:
                raise ConfigError(
                    f"The weight matrix must be fully divisible into [r, r] blocks: '{site.name}' is ({out}, {into}), "
                    f"`r` is {r}."
                )
            return {"miss_block": Leaf((out // r, r, r))}  # (out / r, r, r)
        if config.init_weights == "mini":
            require_rank(config.mini_r, "mini_r")
            if out % config.mini_r:
                raise ConfigError(f"`mini_r` ({config.mini_r}) must divide the {out} outputs of '{site.name}'.")
            return {"miss_block": Leaf((r, config.mini_r))}  # (r, mini_r)
        return {"miss_block": Leaf((r, out))}  # (r, out)

    def setup(self, config: Any) -> None:
        self.bat = self.reads = config.init_weights == "bat"

    def reset(self, config: Any) -> None:
        if config.init_weights:
            self.miss_block.zero_()
        else:
            nn.init.kaiming_uniform_(self.miss_block, a=math.sqrt(5))

    def form(self, D: Tensor) -> Tensor:
        """dW (out, in), in fp32 at least; that of "bat" follows from the base's own W, whatever stands between."""
        D, out, into = wide(D), self.site.fan_out, self.site.fan_in
        if not self.bat:
            return D.T.repeat(out // D.shape[1], -(-into // len(D)))[:, :into]
        n, r, _ = D.shape
        W = self.site.matrix().to(D.dtype).view(n, r, into // r, r)
        return ((W.flatten(1, 2) @ D).view_as(W) + D[:, :, None]).reshape(out, into)

    def weight(self, W: Tensor) -> Tensor:
        return W + self.form(self.miss_block)

    def after(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        D, x = self.miss_block, call.drop(self, x, self.options.miss_dropout)
        if self.bat:
            return self.plus_delta(y, x, self.form, D)
        x = F.pad(x, (0, short)) if (short := -x.shape[-1] % len(D)) else x  # (padding by nothing copies)
        x = x.unflatten(-1, (-1, len(D))).sum(-2)  # what one D sees, summed
        if (times := y.shape[-1] // D.shape[1]) == 1:
            return self.site.add(y, x, D.T.to(x.dtype))
        return y + (x @ D.to(x.dtype)).repeat(*[1] * (x.ndim - 1), times)
