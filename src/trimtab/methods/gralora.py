"""GraLoRA (Jung et al. 2025, https://arxiv.org/abs/2505.20355).   W'_ij = W_ij + s B_ij A_ij for k x k blocks ij of W.

s = alpha / (r + hybrid_r); each pair has rank r / k. The hybrid adds s B A of rank hybrid_r to the whole of W.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.core.architectures import ATTENTION
from trimtab.core.config import LayerConfig, PeftType, help_field
from trimtab.core.families import wide
from trimtab.core.method import Call, Leaf, Leaves, Method, require_rank
from trimtab.core.site import Site
from trimtab.errors import ConfigError


@dataclass
class GraloraConfig(LayerConfig):
    """The configuration of a GraLoRA adapter."""

    r: int = help_field("The rank of a row of blocks: as many parameters as a LoRA of this rank.", 32)
    hybrid_r: int = help_field("The rank of a LoRA on the whole weight beside the blocks; 0: none.", 0)
    alpha: float = help_field("The scale is alpha / (r + hybrid_r).", 64)
    gralora_dropout: float = help_field("Dropout on the adapter's input, in training.", 0.0)
    gralora_k: int = help_field("The weight is cut into this many rows and columns of blocks.", 2)
    fan_in_fan_out: bool = help_field("The weight is stored (in, out), as in GPT-2; found out by itself.", False)
    bias: str = help_field("Which biases of the base are trained too: none, all or gralora_only.", "none")
    init_weights: bool = help_field("Start from B = 0; else from random B.", True)

    exclude_modules: ClassVar[None] = None  # type: ignore[misc]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.GRALORA
        require_rank(self.gralora_k, "gralora_k")
        if self.r % self.gralora_k:
            raise ConfigError(f"r should be divisible by gralora_k, but got {self.r} and {self.gralora_k}")


class Gralora(Method):
    """k x k blocks of rank r / k: together of rank r at least, with no more parameters than LoRA's."""

    when = "large ranks, where LoRA stops gaining"
    config, prefix, targets = GraloraConfig, "gralora_", ATTENTION
    kinds = fused = frozenset({"linear"})
    views = ("r", "alpha", "scaling", "hybrid_r", "gralora_k")
    settings = ("gralora_dropout",)

    @classmethod
    def leaves(cls, site: Site, config: Any, shared: Leaves) -> Leaves:
        require_rank(config.r)
        r, k, extra = config.r, config.gralora_k, config.hybrid_r
        if extra < 0:
            raise ConfigError(f"`hybrid_r` should be a non-negative integer value but the value passed is {extra}")
        for name, size in (("in_features", site.fan_in), ("out_features", site.fan_out)):
            if size % k:
                raise ConfigError(f"{name} should be divisible by gralora_k, but got {size} and {k} at '{site.name}'")
        whole = {
            "gralora_A_general.weight": Leaf((extra, site.fan_in)),  # (hybrid_r, in)
            "gralora_B_general.weight": Leaf((site.fan_out, extra)),  # (out, hybrid_r)
        }
        return {
            "gralora_A": Leaf((k, site.fan_in // k, r)),  # (gralora_k, in / gralora_k, r)
            "gralora_B": Leaf((k, r, site.fan_out // k)),  # (gralora_k, r, out / gralora_k)
            **(whole if extra else {}),
        }

    def setup(self, config: Any) -> None:
        self.r, self.alpha, self.hybrid_r, self.gralora_k = config.r, config.alpha, config.hybrid_r, config.gralora_k
        self.scaling = self.unit = config.alpha / (config.r + config.hybrid_r)

    def reset(self, config: Any) -> None:
        for A, B in zip(self.gralora_A, self.gralora_B, strict=True):
            for M, random in ((A, True), (B, not config.init_weights)):
                drawn = torch.zeros(M.shape[::-1], dtype=M.dtype, device=M.device)
                M.copy_((nn.init.kaiming_uniform_(drawn, a=math.sqrt(5)) if random else drawn).T)
        if self.hybrid_r:
            A, B = self.gralora_A_general, self.gralora_B_general
            torch.empty(A.numel() + B.numel(), device=A.device).uniform_()  # which PEFT draws before, to no end
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
            if config.init_weights:
                B.zero_()
            else:
                nn.init.kaiming_uniform_(B, a=math.sqrt(5))

    def weight(self, W: Tensor) -> Tensor:
        k = self.gralora_k
        A = wide(self.gralora_A).unflatten(2, (k, -1))  # (j, in / k, i, r / k)
        B = wide(self.gralora_B).unflatten(1, (k, -1))  # (i, j, r / k, out / k)
        dW = torch.einsum("jpir,ijrq->iqjp", A, B).reshape(W.shape)
        if self.hybrid_r:
            dW = dW + wide(self.gralora_B_general) @ wide(self.gralora_A_general)
        return W + self.scaling * dW

    def after(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        x, k, site = call.drop(self, x, self.options.gralora_dropout), self.gralora_k, self.site
        h = torch.einsum("...jp,jpr->...jr", x.unflatten(-1, (k, -1)), self.gralora_A.to(x.dtype))
        # Of each row of blocks, those of all its columns.
        h = self.scaling * h.unflatten(-1, (k, -1)).transpose(-3, -2).flatten(-2)
        dy = torch.einsum("...ir,irq->...iq", h, self.gralora_B.to(x.dtype)).flatten(-2)
        if self.hybrid_r:
            A, B = self.gralora_A_general.to(x.dtype), self.gralora_B_general.to(x.dtype)
            dy = dy + site.mix(self.scaling * site.apply(x, A), B)
        return y + dy
