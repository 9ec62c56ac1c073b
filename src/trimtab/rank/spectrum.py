"""Singular values of dW = s·B·A from its factors, and how many of them count.

With B = Q_B R_B and A' = Q_A R_A (QR), dW = s·Q_B (R_B R_A') Q_A': the singular values are those of a matrix (r, r).
The full matrix is never formed. All is in fp64: factors are small, and ranks are differences of squares.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.errors import ConfigError

ROUNDING = torch.finfo(torch.float32).eps  # of the numbers an adapter is made of


@dataclass(frozen=True)
class EffectiveRanks:
    """How many of the singular values S count, by four measures; all are 0 where S is.

    Attributes:
        energy90: the fewest that hold 90 % of the energy, ΣS².
        energy99: the fewest that hold 99 % of it.
        entropy: exp(-Σ p log p) with p = S / ΣS (Roy and Vetterli 2007): n for n equal ones.
        stable: ||dW||_F² / ||dW||_2².
    """

    energy90: int
    energy99: int
    entropy: float
    stable: float


def delta_spectrum(A: Tensor, B: Tensor, scale: float = 1.0) -> Tensor:
    """The singular values of scale·B·A, largest first, without forming it.

    Args:
        A: (..., r, in).
        B: (..., out, r).

    Returns:
        (..., min(r, out, in)) in fp64; what lies beyond is 0.

    Raises:
        ConfigError: the shapes do not fit, or a factor has a NaN or an infinity.
    """
    _check(A, B)
    inner = torch.linalg.qr(B.double(), mode="r").R @ torch.linalg.qr(A.double().mT, mode="r").R.mT
    return abs(scale) * torch.linalg.svdvals(inner)


def svd_of_product(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (..., out, k), S (..., k), Vh (..., k, in) of B·A with k = min(r, out, in), in fp64, without forming it."""
    _check(A, B)
    (Qb, Rb), (Qa, Ra) = torch.linalg.qr(B.double()), torch.linalg.qr(A.double().mT)
    U, S, Vh = torch.linalg.svd(Rb @ Ra.mT, full_matrices=False)
    return Qb @ U, S, Vh @ Qa.mT


def effective_ranks(S: Tensor) -> EffectiveRanks:
    """The measures of one spectrum (k,); of the matrices of a stack (n, k), whose rank is common, all together."""
    S = S.double().reshape(-1, S.shape[-1])
    energies = S.square().sum(0)
    total = float(energies.sum())
    if total == 0:
        return EffectiveRanks(0, 0, 0.0, 0.0)
    means = energies.sqrt()
    p = means / means.sum()
    entropy = math.exp(-float(torch.special.xlogy(p, p).sum()))
    return EffectiveRanks(energy_rank(energies, 0.9), energy_rank(energies, 0.99), entropy, total / float(energies[0]))


def energy_rank(energies: Tensor, share: float, noise: float = ROUNDING) -> int:
    """The fewest of the energies (k,), largest first, that sum to `share` of all; 0 where all are 0.

    Singular values below `noise` times the largest are rounding and never count: 1.0 gives the true rank.
    """
    if not 0 < share <= 1:
        raise ConfigError(f"A share of the energy lies above 0 and at most at 1, not at {share}.")
    kept = significant(energies, noise)
    if not kept:
        return 0
    sums = energies[:kept].double().cumsum(0)
    # A share of exactly n equal parts must not need one more for the rounding of the sum.
    return int((sums < share * sums[-1] * (1 - 1e-12)).sum()) + 1


def significant(energies: Tensor, noise: float = ROUNDING) -> int:
    """How many of the energies (k,), largest first, are more than rounding beside the first."""
    if not len(energies) or energies[0] == 0:
        return 0
    return int((energies > energies[0] * noise**2).sum())


def _check(A: Tensor, B: Tensor) -> None:
    if A.ndim < 2 or A.ndim != B.ndim or A.shape[-2] != B.shape[-1] or A.shape[:-2] != B.shape[:-2]:
        raise ConfigError(f"A (..., r, in) and B (..., out, r) do not fit: {tuple(A.shape)} and {tuple(B.shape)}.")
    if not (torch.isfinite(A).all() and torch.isfinite(B).all()):
        raise ConfigError("A factor has a NaN or an infinity: it has no singular values.")
