"""LoHa (Hyeon-Woo et al. 2021, https://arxiv.org/abs/2108.06098, prop. 1).   W' = W + s (w1_a w1_b) ∘ (w2_a w2_b).

s = alpha / r. Convolutions may keep each factor as t ×₁ w_a ×₂ w_b, with a core t (r, r, kernel) (proposition 3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from trimtab.core.architectures import ATTENTION
from trimtab.core.config import LayerConfig, PeftType, help_field, match_pattern
from trimtab.core.families import Delta, kept_rows, skipped, tucker, wide
from trimtab.core.method import Call, Leaf, Leaves, require_rank
from trimtab.core.site import Site


@dataclass
class LoHaConfig(LayerConfig):
    """The configuration of a LoHa adapter."""

    r: int = help_field("The rank of each factor; of their product up to r².", 8)
    alpha: float = help_field("The scale is alpha / r.", 8)
    rank_dropout: float = help_field("The share of rows of dW that are left out, in training.", 0.0)
    module_dropout: float = help_field("The share of forwards in which a layer goes unadapted, in training.", 0.0)
    use_effective_conv2d: bool = help_field("Keep the factors of convolutions with a kernel as cores.", False)
    init_weights: bool = help_field("Start from dW = 0; else random.", True)
    rank_pattern: dict[str, int] = help_field("Module name or regular expression -> its own rank.", factory=dict)
    alpha_pattern: dict[str, float] = help_field("Module name or regular expression -> its own alpha.", factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LOHA

    def resolve(self, name: str) -> LoHaConfig:
        """This config with the rank and alpha that the patterns give the module `name`."""
        own = self.shallow()
        own.r = self.rank_pattern.get(match_pattern(self.rank_pattern, name) or "", self.r)
        own.alpha = self.alpha_pattern.get(match_pattern(self.alpha_pattern, name) or "", self.alpha)
        return own


class LoHa(Delta):
    """A delta of full size as the elementwise product of two of low rank."""

    when = "image models; a high rank from few parameters"
    config, prefix, targets = LoHaConfig, "hada_", ATTENTION
    kinds = fused = frozenset({"linear", "conv"})
    views = ("r", "alpha", "scaling")
    elsewhere = ("hada_t1", "hada_t2")

    @classmethod
    def leaves(cls, site: Site, config: Any, shared: Leaves) -> Leaves:
        require_rank(config.r)
        r, out, into, kernel = config.r, site.fan_out, site.fan_in // site.groups, [*site.kernel]
        if not config.use_effective_conv2d or math.prod(kernel) == 1:
            return {
                "hada_w1_a": Leaf((out, r)),  # (out, r)
                "hada_w1_b": Leaf((r, into)),  # (r, in)
                "hada_w2_a": Leaf((out, r)),  # (out, r)
                "hada_w2_b": Leaf((r, into)),  # (r, in)
            }
        channels = into // math.prod(kernel)
        kernel += [1] * (len(kernel) == 1)  # as PEFT keeps it
        return {
            "hada_w1_a": Leaf((r, out)),  # (r, out)
            "hada_w1_b": Leaf((r, channels)),  # (r, channels)
            "hada_w2_a": Leaf((r, out)),  # (r, out)
            "hada_w2_b": Leaf((r, channels)),  # (r, channels)
            "hada_t1": Leaf((r, r, *kernel)),  # (r, r, ...)
            "hada_t2": Leaf((r, r, *kernel)),  # (r, r, ...)
        }

    def setup(self, config: Any) -> None:
        self.r, self.alpha, self.scaling = config.r, config.alpha, config.alpha / config.r
        self.unit = self.scaling  # what `set_scale` multiplies

    @property
    def names(self) -> list[str]:
        """The factors, and the cores where there are any."""
        return list(self.declared)

    def reset(self, config: Any) -> None:
        for name in self.names:
            if name == "hada_w2_b" and config.init_weights:
                self.hada_w2_b.zero_()
            else:
                nn.init.kaiming_uniform_(getattr(self, name), a=math.sqrt(5))

    def form(self, *tensors: Tensor, rows: Tensor | None = None) -> Tensor:
        """dW (out, in), its rows weighed by `rows`, in fp32 at least, from the factors in the order of `names`."""
        w1_a, w1_b, w2_a, w2_b, *cores = (wide(t) for t in tensors)
        w1_a = self.scaling * w1_a  # small: the change itself would be scaled in one more tensor of its size
        if cores:
            w1, w2 = (tucker(t, a, b).flatten(1) for t, a, b in zip(cores, (w1_a, w2_a), (w1_b, w2_b), strict=True))
        else:
            w1, w2 = w1_a @ w1_b, w2_a @ w2_b
        dW = self.site.dense(w1 * w2)
        return dW if rows is None else dW * rows[:, None]

    weight = Delta.summed
    sources = property(lambda self: [getattr(self, n) for n in self.names])

    def through(self, x: Tensor, call: Call) -> Tensor | None:
        if self.training and (self.options.module_dropout or self.options.rank_dropout):
            return None
        return self.with_delta(x, self.form, *self.sources)

    def after(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        if skipped(self, call, self.options.module_dropout):
            return y
        rows = kept_rows(self, call, self.options.rank_dropout, rescale=True)
        return self.plus_delta(y, x, lambda *t: self.form(*t, rows=rows), *self.sources)
