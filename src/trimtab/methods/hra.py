"""HRA (Yuan et al. 2024, https://arxiv.org/abs/2405.17484, eq. 1).   W' = W H_1 ... H_r.

H_i = I - 2 u_i u_iᵀ / ||u_i||². The chain of reflections is W - W U T Uᵀ with a small triangular T, so it costs two
skinny products, not r passes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.architectures import ATTENTION
from trimtab.core.config import LayerConfig, PeftType, help_field
from trimtab.core.families import wide
from trimtab.core.method import Call, Leaf, Leaves, Method, require_rank
from trimtab.core.report import warn
from trimtab.core.site import Site
from trimtab.errors import ConfigError


@dataclass
class HRAConfig(LayerConfig):
    """The configuration of an HRA adapter."""

    r: int = help_field("The number of reflections; an even one can start from the identity.", 8)
    apply_GS: bool = help_field("Make the reflections' axes orthogonal (Gram and Schmidt).", False)
    init_weights: bool = help_field("Start from the identity: each axis twice; else random.", True)
    bias: str = help_field("Which biases of the base are trained too: none, all or hra_only.", "none")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.HRA


class HRA(Method):
    """The layer's input reflected r times."""

    when = "orthogonal updates of a chosen size"
    config, prefix, targets = HRAConfig, "hra_", ATTENTION
    kinds = frozenset({"linear", "conv"})
    fused = frozenset({"linear"})  # patches overlap: convolutions reflect them by way of the weight

    @classmethod
    def leaves(cls, site: Site, config: Any, shared: Leaves) -> Leaves:
        require_rank(config.r)
        if config.apply_GS and config.r > site.fan_in:
            raise ConfigError(f"'{site.name}' has {site.fan_in} inputs: no {config.r} axes there are orthogonal.")
        return {"hra_u": Leaf((site.fan_in, config.r))}  # (in, r)

    def reset(self, config: Any) -> None:
        u = self.hra_u
        if not config.init_weights or config.r % 2 or config.apply_GS:
            if config.init_weights:
                reason = "with orthogonal axes" if config.apply_GS else "when r is odd"
                warn(f"The symmetric initialization can NOT be performed {reason}! HRA starts at random.", UserWarning)
            nn.init.kaiming_uniform_(u, a=math.sqrt(5))
        else:
            half = torch.empty_like(u[:, ::2])
            nn.init.kaiming_uniform_(half, a=math.sqrt(5))
            u.copy_(half.repeat_interleave(2, 1))

    def factors(self) -> tuple[Tensor, Tensor]:
        """(U (in, r), T (r, r)) with H_1 ... H_r = I - U T Uᵀ, in fp32 at least."""
        U = wide(self.hra_u)
        I = torch.eye(U.shape[1], dtype=U.dtype, device=U.device)
        if self.options.apply_GS:
            return torch.linalg.qr(U).Q, 2 * I
        U = U / U.norm(dim=0)
        return U, torch.linalg.solve_triangular(I / 2 + (U.mT @ U).triu(1), I, upper=True)

    def weight(self, W: Tensor) -> Tensor:
        U, T = (M.to(W.dtype) for M in self.factors())
        return W - (W @ (U @ T)) @ U.mT

    def before(self, x: Tensor, call: Call) -> Tensor:
        U, T = self.factors()
        return x - (x @ U.to(x.dtype)) @ (U @ T).mT.to(x.dtype)
