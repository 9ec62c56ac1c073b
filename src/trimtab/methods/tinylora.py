"""TinyLoRA (Morris et al. 2026, https://arxiv.org/abs/2602.04118).   W' = W + U √Σ (Σ_i v_i P_i) √Σ Vᵀ.

U, Σ and V are the r largest singular triplets of W, and the P_i random (r, r), all of them fixed: only the u numbers of
v are trained. The paper has Σ on one side, U Σ (...) Vᵀ; its root on both sides is PEFT's. `weight_tying` lets
neighbouring layers share one v, all of them at 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from trimtab.core.architectures import ATTENTION
from trimtab.core.config import LayerConfig, PeftType, help_field
from trimtab.core.families import wide
from trimtab.core.method import Call, Leaf, Leaves, Method, require_rank
from trimtab.core.site import Site
from trimtab.errors import ConfigError


@dataclass
class TinyLoraConfig(LayerConfig):
    """The configuration of a TinyLoRA adapter."""

    r: int = help_field("How many singular triplets of W are kept.", 2)
    u: int = help_field("The length of v.", 64)
    weight_tying: float = help_field("How far layers share one v: 0 not at all, 1 all of them.", 0.0)
    projection_seed: int = help_field("The seed that the P_i are drawn from.", 42)
    save_projection: bool = help_field("Keep the P_i in the file; else they are drawn again on load.", True)
    init_v_bound: float = help_field('With `init_weights="uniform"` v starts uniform within this bound.', 0.02)
    tinylora_dropout: float = help_field("Dropout on the adapter's input, in training.", 0.0)
    fan_in_fan_out: bool = help_field("The weight is stored (in, out), as in GPT-2; found out by itself.", False)
    bias: str = help_field("Which biases of the base are trained too: none, all or tinylora_only.", "none")
    init_weights: bool | str = help_field('Start from v = 0 (True), "uniform", or standard normal (False).', True)

    exclude_modules: ClassVar[None] = None  # type: ignore[misc]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.TINYLORA
        require_rank(self.r)
        require_rank(self.u, "u")
        if not 0 <= self.weight_tying <= 1:
            raise ConfigError(
                f"`weight_tying` should be a float between 0.0 and 1.0 but the value passed is {self.weight_tying}"
            )
        if self.init_weights not in (True, False, "uniform"):
            raise ConfigError(f"`init_weights` should be True, False or 'uniform', not {self.init_weights!r}")


class TinyLora(Method):
    """A few numbers that turn and scale the leading singular directions of the weight."""

    when = "a few numbers in all; reinforcement learning"
    config, prefix, targets = TinyLoraConfig, "tinylora_", ATTENTION
    kinds = fused = frozenset({"linear", "embedding"})
    views = ("r", "u")

    @classmethod
    def admit(cls, config: Any, others: list[Any]) -> None:
        if any(other.save_projection != config.save_projection for other in others):
            raise ConfigError(
                "TinyLoRA projection tensors must be saved for all adapters or none, but got multiple different "
                "values: [False, True]"
            )

    @classmethod
    def share(cls, config: Any, sites: Sequence[Site]) -> Leaves:
        return {f"tinylora_v.{i}": Leaf((config.u,)) for i in range(groups(config, len(sites)))}  # (u,)

    @classmethod
    def start_shared(cls, config: Any, sites: Sequence[Site], shared: Mapping[str, Tensor]) -> None:
        for v in shared.values():
            if config.init_weights == "uniform":
                v.uniform_(-config.init_v_bound, config.init_v_bound)
            elif config.init_weights:
                v.zero_()
            else:
                v.normal_()

    @classmethod
    def leaves(cls, site: Site, config: Any, shared: Leaves) -> Leaves:
        r = min(config.r, site.fan_in, site.fan_out)
        into, out = (site.fan_out, site.fan_in) if site.kind == "embedding" else (site.fan_in, site.fan_out)
        return {
            "tinylora_A": Leaf((r, into), train=False, buffer=True),  # (r, in), of an embedding (r, dim)
            "tinylora_B": Leaf((out, r), train=False, buffer=True),  # (out, r), of an embedding (vocabulary, r)
            "tinylora_P": Leaf((config.u, r, r), train=False, buffer=True, file=config.save_projection),  # (u, r, r)
        }

    def setup(self, config: Any) -> None:
        self.r, self.u = config.r, config.u

    def reset(self, config: Any) -> None:
        A, B, P = self.tinylora_A, self.tinylora_B, self.tinylora_P
        W = wide(self.site.matrix())
        U, S, V = torch.linalg.svd(W.mT if self.site.kind == "embedding" else W, full_matrices=False)
        root = S[: len(A)].sqrt()
        A.copy_(root[:, None] * V[: len(A)])
        B.copy_(U[:, : len(A)] * root)
        generator = torch.Generator().manual_seed(config.projection_seed + self.position)
        P.copy_(torch.randn(P.shape, generator=generator) / len(A) ** 0.5)

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """(A (r, in), B (out, r)) whose product is the change, in fp32 at least."""
        count = len(self.peers)
        n = groups(self.options, count)
        v = self.shared(f"tinylora_v.{min(self.position // (count // n), n - 1)}")
        R = torch.einsum("u,uij->ij", wide(v), wide(self.tinylora_P))
        A, B = wide(self.tinylora_A), wide(self.tinylora_B) @ R
        return (B.mT, A.mT) if self.site.kind == "embedding" else (A, B)

    def weight(self, W: Tensor) -> Tensor:
        A, B = self.factors
        return W + B @ A

    def after(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        A, B = (M.to(y.dtype) for M in self.factors)
        x = call.drop(self, x, self.options.tinylora_dropout)
        return y + self.site.mix(self.site.apply(x, A), B)


def groups(config: Any, count: int) -> int:
    """How many v there are for `count` layers."""
    return max(1, round(count * (1 - config.weight_tying)))
