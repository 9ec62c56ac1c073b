"""OFT (Qiu et al. 2023, https://arxiv.org/abs/2306.07280, eq. 3 and section 3.3).   W' = W Rᵀ,   R = diag(R_1 ... R_n).

Each block is a Cayley transform of a skew-symmetric Q, R_i = (I - Q)(I + Q)⁻¹, or (the default, from
https://arxiv.org/abs/2506.19847) its inverse by the Neumann series, (I + Q)(I + Q + Q² + ...).
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
from trimtab.core.report import warn
from trimtab.core.site import Site
from trimtab.errors import ConfigError


@dataclass
class OFTConfig(LayerConfig):
    """The configuration of an OFT adapter: give the number of blocks (`r`) or their size, and 0 for the other."""

    r: int = help_field("The number of blocks.", 0)
    oft_block_size: int = help_field("The size of a block.", 32)
    module_dropout: float = help_field("The share of blocks that are the identity, in training.", 0.0)
    fan_in_fan_out: bool = help_field("The weight is stored (in, out), as in GPT-2; found out by itself.", False)
    bias: Literal["none", "all", "oft_only"] = help_field("Which biases of the base are trained too.", "none")
    init_weights: bool = help_field("Start from the identity; else random.", True)
    coft: bool = help_field("Keep every Q within a ball (constrained OFT).", False)
    eps: float = help_field("The radius of that ball, over the root of the number of blocks.", 6e-5)
    block_share: bool = help_field("One block for all.", False)
    use_cayley_neumann: bool = help_field("The Neumann series instead of a solve.", True)
    num_cayley_neumann_terms: int = help_field("How many of its terms.", 5)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.OFT
        r, b = self.r, self.oft_block_size
        if r and b:
            raise ConfigError(
                f"You can only specify either r ({r}) or oft_block_size ({b}), but not both simultaneously, because "
                "r x oft_block_size == in_features. Set the other to 0."
            )
        if r < 0 or b < 0 or not r + b:
            raise ConfigError(
                f"Either `r` or `oft_block_size` must be non-zero. Currently, r = {r} and oft_block_size = {b}."
            )


class OFT(Method):
    """The layer's input rotated block by block (an embedding's output, which is all it has)."""

    when = "subject-driven image models; the base is to be forgotten least"
    config, prefix, targets = OFTConfig, "oft_", ATTENTION
    kinds = frozenset({"linear", "conv", "embedding"})
    fused = frozenset({"linear", "embedding"})  # patches overlap: convolutions rotate them by way of the weight

    @classmethod
    def leaves(cls, site: Site, config: Any, shared: Leaves) -> Leaves:
        n, b = blocks_of(site, config)
        given, name = (config.r, "r") if config.r else (config.oft_block_size, "oft_block_size")
        if (fits := n if config.r else b) != given:
            warn(f"Invalid `{name}` ({given})! Adjusted `{name}` to ({fits}).", UserWarning)
        blocks = 1 if config.block_share else n
        return {leaf_at(site): Leaf((blocks, b * (b - 1) // 2))}  # (blocks, b (b - 1) / 2)

    def setup(self, config: Any) -> None:
        self.n, self.b = blocks_of(self.site, config)

    @property
    def v(self) -> Tensor:
        """The upper triangles of all Q (blocks, b (b - 1) / 2)."""
        tensor: Tensor = self.tensor(leaf_at(self.site))
        return tensor

    def reset(self, config: Any) -> None:
        v = self.v
        if config.init_weights:
            v.zero_()
        else:
            v.normal_(0, 0.1)

    def rotation(self, x: Tensor, call: Call | None = None) -> Tensor:
        """The blocks R (n, b, b), formed in fp32 at least, in the number format of `x`."""
        v, b, config = self.v, self.b, self.options
        if config.coft:
            v = self.projected(v)
        R = rotations(wide(v), b, config.num_cayley_neumann_terms if config.use_cayley_neumann else None)
        R = R.expand(self.n, b, b)
        if call is not None and config.module_dropout and self.training:
            kept = torch.rand(self.n, 1, 1, generator=call.generator(self)) >= config.module_dropout
            R = torch.where(kept.to(R.device), R, torch.eye(b, dtype=R.dtype, device=R.device))
        return R.to(x.dtype)

    def projected(self, v: Tensor) -> Tensor:
        """`v` with every Q cut to the ball ||Q|| <= eps / sqrt(n); in training the tensor itself is."""
        with torch.no_grad():
            cut = shrinkage(v, self.options.eps)
            if self.training:
                v.mul_(cut)
        return v if self.training else v * cut

    def turn(self, x: Tensor, R: Tensor) -> Tensor:
        """x (..., n b) times diag(R_1 ... R_n)."""
        return torch.einsum("...nk,nkc->...nc", x.unflatten(-1, (self.n, self.b)), R).flatten(-2)

    def weight(self, W: Tensor) -> Tensor:
        R = self.rotation(W)
        return self.turn(W.mT, R).mT if self.site.kind == "embedding" else self.turn(W, R.mT)

    def before(self, x: Tensor, call: Call) -> Tensor:
        return x if self.site.kind == "embedding" else self.turn(x, self.rotation(x, call))

    def after(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        return self.turn(y, self.rotation(y, call)) if self.site.kind == "embedding" else y


def rotations(v: Tensor, b: int, terms: int | None) -> Tensor:
    """The blocks R (n, b, b) of the entries above the diagonals of Q, by a solve or so many terms of the series."""
    Q = skew(v, b)
    return cayley(-Q) if terms is None else cayley(Q, terms)


def shrinkage(v: Tensor, eps: float) -> Tensor:
    """What v (n, b (b - 1) / 2) is multiplied by so that ||Q|| <= eps / sqrt(n) (n, 1)."""
    norms = 2**0.5 * wide(v).norm(dim=1, keepdim=True)
    return (eps / len(v) ** 0.5 / norms).clamp_max(1).to(v.dtype)


def leaf_at(site: Site) -> str:
    """What the tensor is called at a site."""
    return "oft_embedding_R.weight" if site.kind == "embedding" else "oft_R.weight"


def blocks_of(site: Site, config: Any) -> tuple[int, int]:
    """(number of blocks, their size) at a site: the nearest that fit to what the config says."""
    size = site.fan_out if site.kind == "embedding" else site.fan_in
    fits = nearest_divisor(size, config.r or config.oft_block_size)
    b = size // fits if config.r else fits
    return size // b, b


def nearest_divisor(size: int, given: int) -> int:
    """The divisor of `size` nearest to `given`, the smaller of two."""
    return min((d for d in range(1, size + 1) if size % d == 0), key=lambda d: (abs(d - given), d))
