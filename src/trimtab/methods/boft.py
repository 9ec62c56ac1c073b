"""BOFT (Liu et al. 2023, https://arxiv.org/abs/2311.06243, section 4).   W' = diag(s) W F_1 ... F_m.

Each butterfly factor F_k is blocks R = (I + Q)(I - Q)⁻¹ with Q = (A - Aᵀ) / 2 along the diagonal, after a permutation
that brings together half blocks 2^(k-1) apart. One factor is OFT's rotation with a scale s; the
paper's formula has none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.core.architectures import ATTENTION
from trimtab.core.config import LayerConfig, PeftType, help_field
from trimtab.core.families import wide
from trimtab.core.method import Call, Leaf, Leaves, Method
from trimtab.core.site import Site
from trimtab.errors import ConfigError


@dataclass
class BOFTConfig(LayerConfig):
    """The configuration of a BOFT adapter: give the size of a block or the number of blocks, and 0 for the other."""

    boft_block_size: int = help_field("The size of a block.", 4)
    boft_block_num: int = help_field("The number of blocks.", 0)
    boft_n_butterfly_factor: int = help_field("The number m of butterfly factors.", 1)
    boft_dropout: float = help_field("The share of blocks that are the identity, in training.", 0.0)
    fan_in_fan_out: bool = help_field("The weight is stored (in, out), as in GPT-2; found out by itself.", False)
    bias: str = help_field("Which biases of the base are trained too: none, all or boft_only.", "none")
    init_weights: bool = help_field("Start from the identity; else random.", True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.BOFT
        b, n = self.boft_block_size, self.boft_block_num
        if b and n:
            raise ConfigError(
                f"You can only specify either boft_block_size ({b}) or boft_block_num ({n}), but not both "
                "simultaneously, because boft_block_size x boft_block_num == in_features. Set the other to 0."
            )
        if b < 0 or n < 0 or not b + n:
            raise ConfigError(
                "Either `boft_block_size` or `boft_block_num` must be non-zero. Currently, boft_block_size = "
                f"{b} and boft_block_num = {n}."
            )
        if self.boft_n_butterfly_factor < 1:
            raise ConfigError(
                f"`boft_n_butterfly_factor` must be a positive integer number, not {self.boft_n_butterfly_factor}."
            )


class BOFT(Method):
    """The layer's input rotated by butterfly factors, its outputs (not its bias) scaled."""

    when = "norms and angles of the weights are to stay, with more freedom than OFT"
    config, prefix, targets = BOFTConfig, "boft_", ATTENTION
    settings = ("boft_block_size", "boft_block_num", "boft_dropout")
    kinds = frozenset({"linear", "conv"})
    fused = frozenset({"linear"})  # patches overlap: convolutions rotate them by way of the weight

    @classmethod
    def leaves(cls, site: Site, config: Any, shared: Leaves) -> Leaves:
        n, b = blocks_of(site, config)
        scale = (1, site.fan_out) if site.kind == "conv" else (site.fan_out, 1)
        return {
            "boft_R": Leaf((config.boft_n_butterfly_factor, n, b, b)),  # (m, blocks, b, b): the matrices A
            "boft_s": Leaf(scale),  # (out, 1), a convolution's (1, out)
        }

    def reset(self, config: Any) -> None:
        if config.init_weights:
            self.boft_R.zero_()
            self.boft_s.fill_(1)
        else:
            self.boft_R.normal_(0, 0.1)
            self.boft_s.normal_(1, 0.1)

    def blocks(self, x: Tensor, call: Call | None = None) -> Tensor:
        """The blocks R (m, n, b, b), formed in fp32 at least, in the number format of `x`."""
        A = wide(self.boft_R)
        Q, I = (A - A.mT) / 2, torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
        R = torch.linalg.solve(I - Q, I + Q, left=False)
        if call is not None and self.options.boft_dropout and self.training:
            drawn = torch.rand(*R.shape[:2], 1, 1, generator=call.generator(self))
            R = torch.where((drawn >= self.options.boft_dropout).to(R.device), R, I)
        return R.to(x.dtype)

    def turn(self, x: Tensor, R: Tensor, k: int) -> Tensor:
        """x (..., in) times the factor of the blocks R (n, b, b) whose halves lie 2^k half blocks apart."""
        shape, half = x.shape, R.shape[-1] // 2
        x = x.unflatten(-1, (-1, 2, 2**k, half)).transpose(-3, -2) if k else x
        x = torch.einsum("...nk,nkc->...nc", x.reshape(*shape[:-1], *R.shape[:2]), R)
        return (x.reshape(*shape[:-1], -1, 2**k, 2, half).transpose(-3, -2) if k else x).reshape(shape)

    def weight(self, W: Tensor) -> Tensor:
        for k, R in enumerate(self.blocks(W)):
            W = self.turn(W, R, k)
        return W * self.boft_s.view(-1, 1)

    def before(self, x: Tensor, call: Call) -> Tensor:
        for k, R in reversed([*enumerate(self.blocks(x, call))]):
            x = self.turn(x, R.mT, k)
        return x

    def after(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        s, b = self.boft_s.flatten().to(y.dtype), self.site.bias()
        return y * s if b is None else y * s + (1 - s) * b.to(y.dtype)

    def bias(self, b: Tensor | None) -> Tensor | None:
        own, s = self.site.bias(), self.boft_s.flatten()
        if b is None:
            return None
        return s * b if own is None else own + s * (b - own)  # what adapters below have added is scaled like the rest


def blocks_of(site: Site, config: Any) -> tuple[int, int]:
    """(number of blocks, their size) at a site.

    Raises:
        ConfigError: they do not fit.
    """
    size, m = site.fan_in, config.boft_n_butterfly_factor
    given, name = (config.boft_block_size, "boft_block_size") if config.boft_block_size else (
        config.boft_block_num, "boft_block_num")  # fmt: skip
    what = f"{'Convolutional kernel dimension' if site.kind == 'conv' else 'in_features'} ({size})"
    if size % given:
        raise ConfigError(f"'{site.name}': {what} must be divisible by {name} ({given})!")
    b = given if config.boft_block_size else size // given
    if m > 1 and b % 2:
        raise ConfigError(f"'{site.name}': boft_block_size ({b}) must be an even number!")
    if size % (b * 2 ** (m - 1)):
        raise ConfigError(
            f"'{site.name}': Invalid combination of {what}, boft_n_butterfly_factor ({m}) and boft_block_size ({b})! "
            f"{m} factors join {2 ** (m - 1)} blocks at a time."
        )
    return size // b, b
