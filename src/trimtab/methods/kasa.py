"""KaSA (Wang et al. 2024, https://arxiv.org/abs/2412.06071, eq. 6-11).   W' = W_k + s B diag(d) A.

W_k is W without its r least singular values. Training adds beta ||d||² and gamma (||Bᵀ B - I|| + ||A Aᵀ - I||) to the
loss, so that B diag(d) A stays a singular value decomposition.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.core.config import help_field
from trimtab.core.families import LowRank, wide
from trimtab.core.method import Call, Leaf, Leaves
from trimtab.core.site import Site
from trimtab.errors import ConfigError
from trimtab.init import start


@dataclass
class KasaConfig:
    """Settings of KaSA."""

    beta: float = help_field("The weight of the penalty on singular values.", 1e-4)
    gamma: float = help_field("The weight of the penalty on what is not orthogonal.", 1e-3)


class Kasa(LowRank):
    """A decomposition of low rank in the place of W's least singular values."""

    when = "noise in the base's knowledge is to be cut away"
    example = {"kasa_config": {}}
    prefix = "lora_"
    bias = LowRank.lifted
    kinds = fused = frozenset({"linear"})
    mutates = staticmethod(lambda config: True)

    @classmethod
    def leaves(cls, site: Site, config: Any, shared: Leaves) -> Leaves:
        if config.r >= min(site.fan_in, site.fan_out):
            raise ConfigError(
                f"KaSA replaces the r least singular values of a weight: `r` ({config.r}) should be below "
                f"min(in_features, out_features) = {min(site.fan_in, site.fan_out)} of '{site.name}'."
            )
        return cls.pair(site, config.r, config.lora_bias) | {"lora_diag": Leaf((config.r,))}  # (r,)

    def setup(self, config: Any) -> None:
        self.scale(config.r, config.lora_alpha, config.scaling(), config.lora_dropout)

    def reset(self, config: Any) -> Tensor:
        start(bool(config.init_lora_weights), self)
        self.lora_diag.normal_()
        U, S, Vh = torch.linalg.svd(wide(self.site.matrix()), full_matrices=False)
        k = max(len(S) - self.r, 0)
        return (U[:, :k] * S[:k]) @ Vh[:k]

    def weight(self, W: Tensor) -> Tensor:
        A, B = self.matrices
        return W + self.scaling * (wide(B) * wide(self.lora_diag)) @ wide(A)

    def after(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        h, B = self.update(call.drop(self, x, self.dropout))
        return self.site.add(y, h * self.lora_diag.to(h.dtype), B, shift=self.shift)

    @classmethod
    def penalty(cls, methods: Sequence[Any], config: Any) -> Tensor | None:
        beta, gamma, terms = config.kasa_config.beta, config.kasa_config.gamma, []
        for method in methods:
            A, B = method.matrices
            eye = torch.eye(method.r, dtype=A.dtype, device=A.device)
            skew = torch.linalg.norm(B.mT @ B - eye) + torch.linalg.norm(A @ A.mT - eye)
            terms.append(beta * method.lora_diag.square().sum() + gamma * skew)
        total: Tensor | None = torch.stack([t.to(terms[0].device) for t in terms]).sum() if terms else None
        return total
