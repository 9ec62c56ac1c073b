"""PSOFT (Wu et al. 2025, https://arxiv.org/abs/2505.11235, eq. 8).   W' = W + s B (diag(b) R diag(a) - I) A.

s B A is the best approximation of rank r to the frozen W, A's rows orthonormal; R = (I + Q)(I - Q)⁻¹ with Q
skew-symmetric, or the Neumann series for the inverse: only what is turned within W's principal subspace changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from trimtab.core.architectures import ATTENTION
from trimtab.core.config import LayerConfig, PeftType, help_field
from trimtab.core.families import cayley, skew, wide
from trimtab.core.method import Call, Leaf, Leaves, Method
from trimtab.core.seeded import seeded
from trimtab.core.site import Site
from trimtab.errors import ConfigError


@dataclass
class PsoftConfig(LayerConfig):
    """The configuration of a PSOFT adapter."""

    r: int = help_field("The rank of the subspace.", 32)
    psoft_alpha: int = help_field("s = alpha / r; it moves scale between s and B, and changes no weight.", 32)
    psoft_dropout: float = help_field("Dropout on the adapter's input, in training.", 0.0)
    fan_in_fan_out: bool = help_field("The weight is stored (in, out), as in GPT-2; found out by itself.", False)
    ab_svd_init: Literal["psoft_init", "pissa_init"] = help_field(
        "B takes all singular values, so that A is orthogonal; or their roots go to both.", "psoft_init"
    )
    psoft_svd: Literal["full", "lowrank"] = help_field("The exact decomposition or a random one.", "full")
    psoft_svd_lowrank_niter: int = help_field("Power iterations of the random one.", 10)
    random_seed: int = help_field("The seed of the random one.", 0)
    psoft_orth: bool = help_field("R is orthogonal; else free.", True)
    psoft_mag_b: bool = help_field("Scale the outputs of R by a vector b.", True)
    psoft_mag_a: bool = help_field("Scale the inputs of R by a vector a.", True)
    use_cayley_neumann: bool = help_field("The Neumann series instead of a solve.", False)
    num_cayley_neumann_terms: int = help_field("How many of its terms.", 5)
    cayley_neumann_eps: float | None = help_field("The series' Q is scaled down to this norm (0 to 1).", None)
    init_weights: bool = help_field("Start from the identity; else random.", True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.PSOFT
        if self.r <= 0:
            raise ConfigError(f"`r` must be a positive integer; got {self.r}.")
        if not self.use_cayley_neumann:
            return
        if self.num_cayley_neumann_terms <= 0:
            raise ConfigError(
                f"`num_cayley_neumann_terms` must be a positive integer; got {self.num_cayley_neumann_terms}."
            )
        if self.cayley_neumann_eps is not None and not 0 < self.cayley_neumann_eps < 1:
            raise ConfigError(f"`cayley_neumann_eps` must be in (0, 1) when set; got {self.cayley_neumann_eps}.")


class Psoft(Method):
    """An r x r transformation of the principal subspace, which is made anew from the base on load."""

    when = "orthogonal updates within the weight's main directions"
    config, prefix, targets = PsoftConfig, "psoft_", ATTENTION
    kinds = fused = frozenset({"linear", "conv", "embedding"})

    @classmethod
    def leaves(cls, site: Site, config: Any, shared: Leaves) -> Leaves:
        r, most = config.r, min(site.fan_in, site.fan_out)
        if r > most:
            raise ConfigError(
                f"`r` ({r}) must be less than or equal to min(in_features, out_features) "
                f"({site.fan_in}, {site.fan_out}) of '{site.name}'."
            )
        shape = (r * (r - 1) // 2,) if config.psoft_orth else (r, r)
        vectors = [f"psoft_R.vector_{side}" for side in "ba" if getattr(config, f"psoft_mag_{side}")]
        return {
            "psoft_R.weight": Leaf(shape),  # (r (r - 1) / 2,): above the diagonal of Q; or R (r, r)
            **{name: Leaf((r,)) for name in vectors},  # (r,)
            "_psoft_A_cache": Leaf((r, site.fan_in), train=False, file=False, buffer=True),  # (r, in)
            "_psoft_B_cache": Leaf((site.fan_out, r), train=False, file=False, buffer=True),  # (out, r)
        }

    def setup(self, config: Any) -> None:
        self.scaling = self.unit = config.psoft_alpha / config.r
        self.vectors = [f"psoft_R_vector_{side}" for side in "ba" if getattr(config, f"psoft_mag_{side}")]

    def reset(self, config: Any) -> None:
        weight: Tensor = self.tensor("psoft_R.weight")
        if config.init_weights:
            weight.zero_()
        else:
            weight.normal_(0, 0.1)
        if weight.ndim == 2:
            weight.diagonal().add_(1)
        for name in self.vectors:
            getattr(self, name).fill_(1)
        U, S, V = self.principal(wide(self.site.matrix()))
        S = S / self.scaling
        left, right = (S, torch.ones_like(S)) if config.ab_svd_init == "psoft_init" else (S.sqrt(), S.sqrt())
        self.tensor("_psoft_A_cache").copy_(right[:, None] * V)
        self.tensor("_psoft_B_cache").copy_(U * left)

    def principal(self, W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(U (out, r), S (r,), V (r, in)) of W's r largest singular values."""
        r, config = self.options.r, self.options
        if config.psoft_svd == "full":
            U, S, V = torch.linalg.svd(W, full_matrices=False)
            return U[:, :r], S[:r], V[:r]
        with seeded(config.random_seed, W.device):
            U, S, V = torch.svd_lowrank(W, q=r, niter=config.psoft_svd_lowrank_niter)
        return U, S, V.mT

    def turn(self) -> Tensor:
        """diag(b) R diag(a) - I (r, r), in fp32 at least."""
        w, config = wide(self.tensor("psoft_R.weight")), self.options
        I = torch.eye(config.r, dtype=w.dtype, device=w.device)
        M = w if w.ndim == 2 else self.rotation(w)
        if config.psoft_mag_b:
            M = wide(self.psoft_R_vector_b)[:, None] * M
        if config.psoft_mag_a:
            M = M * wide(self.psoft_R_vector_a)
        return M - I

    def rotation(self, w: Tensor) -> Tensor:
        """R (r, r) of the entries above Q's diagonal."""
        config = self.options
        Q = skew(w, config.r)
        if not config.use_cayley_neumann:
            return cayley(Q)
        return cayley(within(Q, config.cayley_neumann_eps), config.num_cayley_neumann_terms)

    def weight(self, W: Tensor) -> Tensor:
        A, B = wide(self.tensor("_psoft_A_cache")), wide(self.tensor("_psoft_B_cache"))
        return W + self.scaling * (B @ self.turn()) @ A

    def after(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        A, B = self.tensor("_psoft_A_cache"), self.tensor("_psoft_B_cache")
        x = call.drop(self, x, self.options.psoft_dropout)
        h = self.site.apply(x, A.to(y.dtype)) * self.scaling
        # Turned first, so that nothing of B's size is kept, or has a gradient.
        return self.site.add(y, self.site.mix(h, self.turn().to(y.dtype)), B.to(y.dtype))


def within(Q: Tensor, eps: float | None) -> Tensor:
    """Q scaled down to the norm `eps`, where it is larger."""
    return Q if eps is None else Q * (eps / Q.norm().clamp_min(eps))
