"""LoKr (Yeh et al. 2023, https://arxiv.org/abs/2309.14859, section 3.3).   W' = W + s w1 ⊗ w2.

s = alpha / r. w2, and with `decompose_both` w1, is a product w_a w_b of rank r where that is smaller; convolutions may
keep w2 as t ×₁ w_a ×₂ w_b, with a core t (r, r, kernel).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trimtab.core.architectures import ATTENTION
from trimtab.core.config import LayerConfig, PeftType, help_field, match_pattern
from trimtab.core.families import kept_rows, skipped, tucker, wide
from trimtab.core.method import Call, Leaf, Leaves, Method, require_rank
from trimtab.core.site import Site


@dataclass
class LoKrConfig(LayerConfig):
    """The configuration of a LoKr adapter."""

    r: int = help_field("The rank of a factor that is decomposed.", 8)
    alpha: float = help_field("The scale is alpha / r.", 8)
    rank_dropout: float = help_field("The share of rows of dW that are left out, in training.", 0.0)
    module_dropout: float = help_field("The share of forwards in which a layer goes unadapted, in training.", 0.0)
    use_effective_conv2d: bool = help_field("Keep w2 of convolutions with a kernel by a core.", False)
    decompose_both: bool = help_field("Decompose w1 as well.", False)
    decompose_factor: int = help_field("The size of w1, where it divides the layer's; -1: near the root.", -1)
    rank_dropout_scale: bool = help_field("Scale up the rows that rank dropout keeps.", False)
    init_weights: bool | Literal["lycoris"] = help_field("Start from w1 = 0; 'lycoris': w2 = 0; False: random.", True)
    rank_pattern: dict[str, int] = help_field("Module name or regular expression -> its own rank.", factory=dict)
    alpha_pattern: dict[str, float] = help_field("Module name or regular expression -> its own alpha.", factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LOKR

    def resolve(self, name: str) -> LoKrConfig:
        """This config with the rank and alpha that the patterns give the module `name`."""
        own = self.shallow()
        own.r = self.rank_pattern.get(match_pattern(self.rank_pattern, name) or "", self.r)
        own.alpha = self.alpha_pattern.get(match_pattern(self.alpha_pattern, name) or "", self.alpha)
        return own


class LoKr(Method):
    """A delta of full size as a Kronecker product of two small matrices."""

    when = "image models; the smallest files of its kin"
    config, prefix, targets = LoKrConfig, "lokr_", ATTENTION
    kinds = fused = frozenset({"linear", "conv"})
    views = ("r", "alpha", "scaling")
    settings = ("rank_dropout", "rank_dropout_scale", "module_dropout")
    elsewhere = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")

    @classmethod
    def leaves(cls, site: Site, config: Any, shared: Leaves) -> Leaves:
        require_rank(config.r)
        r, kernel, factor = config.r, [*site.kernel], config.decompose_factor
        l, k = factors_of(site.fan_out, factor)
        m, n = factors_of(site.fan_in // math.prod(kernel) // site.groups, factor)
        leaves = {"lokr_w1": Leaf((l, m))}  # (l, m)
        if config.decompose_both and r < max(l, m) / 2:
            leaves = {"lokr_w1_a": Leaf((l, r)), "lokr_w1_b": Leaf((r, m))}  # (l, r), (r, m)
        if r >= max(k, n) / 2:
            return leaves | {"lokr_w2": Leaf((k, n, *kernel))}  # (k, n, ...)
        if not config.use_effective_conv2d or math.prod(kernel) == 1:
            size = n * math.prod(kernel)
            return leaves | {"lokr_w2_a": Leaf((k, r)), "lokr_w2_b": Leaf((r, size))}  # (k, r), (r, size)
        kernel += [1] * (len(kernel) == 1)  # as PEFT keeps it
        leaves |= {"lokr_w2_a": Leaf((r, k)), "lokr_w2_b": Leaf((r, n))}  # (r, k), (r, n)
        return leaves | {"lokr_t2": Leaf((r, r, *kernel))}  # (r, r, ...)

    def setup(self, config: Any) -> None:
        self.r, self.alpha, self.scaling = config.r, config.alpha, config.alpha / config.r
        self.unit = self.scaling  # what `set_scale` multiplies

    def reset(self, config: Any) -> None:
        zero = {True: ("lokr_w1", "lokr_w1_a"), False: ()}.get(config.init_weights, ("lokr_w2", "lokr_w2_b"))
        for name in self.declared:
            if name in zero:
                getattr(self, name).zero_()
            else:
                nn.init.kaiming_uniform_(getattr(self, name), a=math.sqrt(5))

    def factors(self) -> tuple[Tensor, Tensor]:
        """w1 (l, m) and w2 (k, n, kernel), as exact as the tensors are."""
        has = self.declared
        w1 = self.lokr_w1 if "lokr_w1" in has else self.lokr_w1_a @ self.lokr_w1_b
        if "lokr_t2" in has:
            w2 = tucker(self.lokr_t2, self.lokr_w2_a, self.lokr_w2_b)
        else:
            w2 = self.lokr_w2 if "lokr_w2" in has else self.lokr_w2_a @ self.lokr_w2_b
        channels = self.site.fan_in // math.prod(self.site.kernel) // self.site.groups
        return w1, w2.reshape(len(w2), channels // w1.shape[1], -1)

    def delta(self) -> Tensor:
        """s·w1 ⊗ w2 (out, in)."""
        w1, w2 = (wide(w) for w in self.factors())
        if len(self.site.kernel) == 1 and "lokr_w2" in self.declared:  # whole w2 of 1-d convolutions: so files have it
            return self.site.dense(torch.kron(self.scaling * w1, w2).reshape(self.site.fan_out, -1))
        return self.site.dense(kron(self.scaling * w1, w2).flatten(1))

    def weight(self, W: Tensor) -> Tensor:
        return W + self.delta()

    def after(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        config = self.options
        if skipped(self, call, config.module_dropout):
            return y
        if self.site.kind == "linear":  # (w1 ⊗ w2) vec(X) = vec(w1 X w2ᵀ), with no matrix of full size
            w1, w2 = (w.to(x.dtype) for w in self.factors())
            h = torch.matmul(x.unflatten(-1, (w1.shape[1], -1)), w2[..., 0].T)
            h = torch.matmul(self.scaling * w1, h).flatten(-2)
        else:
            h = self.site.apply(x, self.delta().to(x.dtype))
        rows = kept_rows(self, call, config.rank_dropout, config.rank_dropout_scale)
        return y + (h if rows is None else h * self.site.spread(rows.to(h)))


def kron(w1: Tensor, w2: Tensor) -> Tensor:
    """w1 ⊗ w2, of w1 (l, m) and w2 (k, n, *kernel): (l k, m n, *kernel)."""
    return torch.einsum("lm,kn...->lkmn...", w1, w2).flatten(2, 3).flatten(0, 1)


def factors_of(size: int, factor: int) -> tuple[int, int]:
    """(m, n) with m n = size: m = `factor` where it divides, else the largest m <= n (that is at most `factor`)."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = math.isqrt(size) if factor < 0 else min(factor, math.isqrt(size))
    m = max((d for d in range(1, limit + 1) if size % d == 0), default=1)
    return m, size // m
