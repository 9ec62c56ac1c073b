"""BitFit (Ben Zaken et al. 2021, https://arxiv.org/abs/2106.10199, section 3).   b' = b + Δb: biases alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from trimtab.core.config import LayerConfig, PeftType, help_field
from trimtab.core.method import BIASED, Call, Leaf, Leaves, Method
from trimtab.core.site import Site
from trimtab.errors import ConfigError


@dataclass
class BitFitConfig(LayerConfig):
    """The configuration of BitFit. Without `target_modules` every bias of the model is trained, norms' included."""

    init_weights: bool = help_field("Start from Δb = 0; else random.", True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.BITFIT


class BitFit(Method):
    """What is added to a bias (out,); a linear layer or a convolution without one is given one."""

    when = "almost nothing may be trained, in models with biases"
    config, prefix, targets = BitFitConfig, "bitfit_", {"*": BIASED}
    kinds, fused = frozenset({"linear", "conv", "vector"}), frozenset({"linear", "conv"})

    @classmethod
    def leaves(cls, site: Site, config: Any, shared: Leaves) -> Leaves:
        if site.kind == "vector" and site.bias() is None:
            raise ConfigError(f"'{site.name}' is a norm that has no bias to train.")
        return {"bitfit_b": Leaf((site.fan_out,))}  # (out,)

    def reset(self, config: Any) -> None:
        self.bitfit_b.normal_(std=0 if config.init_weights else 0.02)

    def weight(self, W: Tensor) -> Tensor:
        return W

    def bias(self, b: Tensor | None) -> Tensor | None:
        delta: Tensor = self.bitfit_b
        return delta if b is None else b + delta.to(b.dtype)

    def after(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        return y + self.site.spread(self.bitfit_b.to(y.dtype))
