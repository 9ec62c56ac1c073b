"""Uni-LoRA (Li et al. 2025, https://arxiv.org/abs/2506.00799).   W' = W + B A,   [A, B of all layers] = P θ.

P has one entry a row, at random and equally often in each column, scaled so that its columns have length 1: every
number of every A and B is one of the d trained numbers θ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from trimtab.core.architectures import ATTENTION
from trimtab.core.config import LayerConfig, PeftType, help_field
from trimtab.core.families import wide
from trimtab.core.method import Call, Leaf, Leaves, Method, require_rank
from trimtab.core.site import Site
from trimtab.errors import ConfigError


@dataclass
class UniLoraConfig(LayerConfig):
    """The configuration of a Uni-LoRA adapter."""

    r: int = help_field("The rank.", 4)
    proj_seed: int = help_field("The seed of which number of θ stands where.", 42)
    theta_d_length: int = help_field("The length d of θ: the number of trained parameters.", 256)
    unilora_dropout: float = help_field("Dropout on the adapter's input, in training.", 0.0)
    fan_in_fan_out: bool = help_field("The weight is stored (in, out), as in GPT-2; found out by itself.", False)
    bias: str = help_field("Which biases of the base are trained too: none, all or unilora_only.", "none")
    init_theta_d_bound: float = help_field("θ starts uniform within this bound.", 0.02)
    init_weights: bool = help_field("Start as that says; else from a standard normal θ.", True)
    save_indices: bool = help_field("Keep P in the file; else it is drawn again on load.", False)

    exclude_modules: ClassVar[None] = None  # type: ignore[misc]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.UNILORA
        if self.bias not in ("none", "all", "unilora_only"):
            raise ConfigError(f"`bias` should be 'none', 'all', or 'unilora_only', got {self.bias}.")
        require_rank(self.r)
        require_rank(self.theta_d_length, "theta_d_length")


class UniLora(Method):
    """LoRA's pairs, all of them read out of one short vector."""

    when = "one vector for all layers: the smallest file"
    config, prefix, targets = UniLoraConfig, "unilora_", ATTENTION
    kinds = fused = frozenset({"linear"})
    views = ("r",)

    @classmethod
    def share(cls, config: Any, sites: Sequence[Site]) -> Leaves:
        return {"unilora_theta_d": Leaf((config.theta_d_length,))}  # (d,)

    @classmethod
    def start_shared(cls, config: Any, sites: Sequence[Site], shared: Mapping[str, Tensor]) -> None:
        if config.init_weights:
            shared["unilora_theta_d"].uniform_(-config.init_theta_d_bound, config.init_theta_d_bound)
        else:
            shared["unilora_theta_d"].normal_()

    @classmethod
    def leaves(cls, site: Site, config: Any, shared: Leaves) -> Leaves:
        fixed: dict[str, Any] = {"train": False, "buffer": True, "file": config.save_indices}
        return {
            "unilora_indices_A": Leaf((config.r, site.fan_in), dtype=torch.int64, **fixed),  # (r, in)
            "unilora_indices_B": Leaf((site.fan_out, config.r), dtype=torch.int64, **fixed),  # (out, r)
            "unilora_scales_A": Leaf((config.r, site.fan_in), **fixed),  # (r, in)
            "unilora_scales_B": Leaf((site.fan_out, config.r), **fixed),  # (out, r)
        }

    def setup(self, config: Any) -> None:
        self.r = config.r

    def reset(self, config: Any) -> None:
        sizes = [config.r * (site.fan_in + site.fan_out) for site in self.peers]
        indices, scales = projection(config.proj_seed, config.theta_d_length, sum(sizes))
        start = sum(sizes[: self.position])
        for name in "AB":
            which: Tensor = getattr(self, f"unilora_indices_{name}")
            part = slice(start, start + which.numel())
            which.copy_(indices[part].view_as(which))
            getattr(self, f"unilora_scales_{name}").copy_(scales[part].view_as(which))
            start = part.stop

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """(A (r, in), B (out, r)), in fp32 at least."""
        theta = wide(self.shared("unilora_theta_d"))
        A, B = theta[self.unilora_indices_A], theta[self.unilora_indices_B]
        return A * self.unilora_scales_A, B * self.unilora_scales_B

    def weight(self, W: Tensor) -> Tensor:
        A, B = self.factors
        return W + B @ A

    def after(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        A, B = self.factors
        x = call.drop(self, x, self.options.unilora_dropout)
        return y + self.site.mix(self.site.apply(x, A.to(x.dtype)), B.to(x.dtype))


@lru_cache(maxsize=1)  # for one layer after the other
def projection(seed: int, d: int, total: int) -> tuple[Tensor, Tensor]:
    """(which column of P the entry of each of `total` rows is in, its value), as PEFT draws them: files have no P."""
    draw = np.random.default_rng(seed)
    rest = draw.choice(d, total % d, replace=False)
    indices = torch.from_numpy(draw.permutation(np.concatenate([np.repeat(np.arange(d), total // d), rest])))
    return indices, indices.bincount(minlength=d).float().rsqrt()[indices]
