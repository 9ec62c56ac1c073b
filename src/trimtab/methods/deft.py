"""DEFT (Kumar et al. 2025, https://arxiv.org/abs/2509.22793).   W' = W - Π W + s G R.

`para` is PaRa (Chen et al. 2024, https://arxiv.org/abs/2406.05641).
A subspace is taken out of the frozen weight (the base's own, also where adapters are stacked) and something put in its
place: Π = P relu(P)ᵀ and G = P, or with "qr" Π = G Gᵀ with the orthogonal G of P = G T; s = alpha / r. PaRa only takes
out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from trimtab.core.architectures import ATTENTION
from trimtab.core.config import LayerConfig, PeftType, help_field
from trimtab.core.families import wide
from trimtab.core.method import Call, Leaf, Leaves, Method, require_rank
from trimtab.core.site import Site


@dataclass
class DeftConfig(LayerConfig):
    """The configuration of a DEFT adapter."""

    r: int = help_field("The rank of what is taken out and put in; at most a layer's number of outputs.", 8)
    decomposition_method: Literal["relu", "qr"] = help_field("How the projector is made from P.", "relu")
    init_scale: float = help_field("Scales the noise R starts from, where it starts from noise.", 1.0)
    alpha: int | None = help_field("What is put in is scaled by alpha / r; None: by 1.", None)
    para: bool = help_field("Only take out (PaRa): there is no R, and no start from the identity.", False)
    fan_in_fan_out: bool = help_field("The weight is stored (in, out), as in GPT-2; found out by itself.", False)
    deft_dropout: float = help_field("Dropout on the adapter's input, in training.", 0.0)
    init_weights: bool = help_field("Start by putting in what is taken out; else from random R.", True)
    bias: str = help_field("Which biases of the base are trained too: none, all or deft_only.", "none")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.DEFT


class Deft(Method):
    """Two products of rank r with the left factor in common: dW = G (s R - Kᵀ W)."""

    when = "personal concepts in image models; knowledge is to make room"
    reads = True
    config, prefix, targets = DeftConfig, "deft_", ATTENTION
    kinds = fused = frozenset({"linear", "conv", "embedding"})

    @classmethod
    def leaves(cls, site: Site, config: Any, shared: Leaves) -> Leaves:
        require_rank(config.r)
        r = min(config.r, site.fan_out)
        P = {"deft_P": Leaf((site.fan_out, r))}  # (out, r)
        return P if config.para else P | {"deft_R": Leaf((r, site.fan_in))}  # (r, in)

    def setup(self, config: Any) -> None:
        self.scaling = self.unit = config.alpha / min(config.r, self.site.fan_out) if config.alpha else 1.0

    def reset(self, config: Any) -> None:
        self.deft_P.normal_(0, 0.02)
        if config.para:
            return
        if config.init_weights:
            _, K = self.factors()
            self.deft_R.copy_(K.mT @ wide(self.site.matrix()) / self.scaling)
        else:
            self.deft_R.normal_(0, 0.02 * config.init_scale)

    def factors(self) -> tuple[Tensor, Tensor]:
        """(G, K), both (out, r), with the projector Π = G Kᵀ, in fp32 at least."""
        P = wide(self.deft_P)
        if self.options.decomposition_method == "qr":
            P = torch.linalg.qr(P).Q
            return P, P
        return P, P.relu()

    def pair(self) -> tuple[Tensor, Tensor]:
        """(G (out, r), D (r, in)) with dW = G D."""
        G, K = self.factors()
        out = K.mT @ wide(self.site.matrix())
        return G, -out if self.options.para else self.scaling * wide(self.deft_R) - out

    def weight(self, W: Tensor) -> Tensor:
        G, D = self.pair()
        return W + G @ D

    def after(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        G, D = self.pair()
        x = call.drop(self, x, self.options.deft_dropout)
        return self.site.add(y, self.site.apply(x, D.to(y.dtype)), G.to(y.dtype))
