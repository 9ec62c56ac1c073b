"""LoftQ (Li et al. 2023, https://arxiv.org/abs/2310.08659, algorithm 1): W ≈ Q + s B A with Q a quantised weight.

By turns Q = quantise(W - s B A) and s B A = the r leading singular directions of W - Q.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.core.config import help_field
from trimtab.core.families import wide
from trimtab.errors import ConfigError

BLOCK = 64  # weights that share a scale
# The 16 values of NormalFloat (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, appendix E).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass
class LoftQConfig:
    """Settings of LoftQ."""

    loftq_bits: int = help_field("4 (NormalFloat, in blocks of 64) or 8 (int8, a scale for each row).", 4)
    loftq_iter: int = help_field("How often quantised weight and pair are fitted to one another.", 1)


def quantised(W: Tensor, bits: int) -> Tensor:
    """W (out, in) as its quantised form reads."""
    if bits == 8:
        scale = W.abs().amax(1, keepdim=True).clamp_min(1e-30) / 127
        return (W / scale).round() * scale
    flat = F.pad(W.flatten(), (0, -W.numel() % BLOCK)).view(-1, BLOCK)
    scale = flat.abs().amax(1, keepdim=True).clamp_min(1e-30)
    levels = torch.tensor(NF4, dtype=W.dtype, device=W.device)
    nearest = torch.bucketize(flat / scale, (levels[1:] + levels[:-1]) / 2)
    return (levels[nearest] * scale).flatten()[: W.numel()].view_as(W)


def low_rank(R: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """(A (r, in), B (out, r)) with B·A the best approximation of R of rank r."""
    U, S, Vh = torch.linalg.svd(R, full_matrices=False)
    root = S[:r].sqrt()
    return root[:, None] * Vh[:r], U[:, :r] * root


def fitted(W: Tensor, bits: int, r: int, rounds: int, s: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """(Q, A (r, in), B (out, r)) with W ≈ Q + s·B·A after so many rounds; Q is W, and the pair zero, after none."""
    if bits not in (4, 8):
        raise ConfigError("Only nf4 and int8 quantization is supported")
    Q, A, B = W, W.new_zeros(r, W.shape[1]), W.new_zeros(W.shape[0], r)
    for _ in range(rounds):
        Q = quantised(W - s * (B @ A), bits)
        A, B = low_rank((W - Q) / s, r)
    return Q, A, B


def loftq(method: Any) -> Tensor:
    """A and B for what quantising W loses; the base holds the quantised weight's numbers."""
    settings = method.options.loftq_config
    bits, rounds = settings["loftq_bits"], settings["loftq_iter"]
    if rounds < 1:
        raise ConfigError(f"`loftq_iter` should be at least 1, not {rounds}.")
    Q, A, B = fitted(wide(method.site.matrix()), bits, method.r, rounds, method.scaling)
    method.put(A, B)
    return Q
