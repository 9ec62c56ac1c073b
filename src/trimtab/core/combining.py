"""Adapters into one another: weighted sums, concatenation, SVD, TIES, DARE and magnitude pruning.

The merges below are pure functions of task tensors T_i (one an adapter, all of one shape) and weights w_i. They act on

    the factors   C_i = c_i·A_i and d_i·B_i with d = √|w·s|, c = sign(w)·d    linear, ties, dare_*, magnitude_prune
    the deltas    D_i = s_i·B_i·A_i, the result factored again by an SVD       svd, *_svd

where s is an adapter's scaling. Merging factors is cheap and, for more than one adapter, not the merge of the deltas:
(Σ d·B)(Σ c·A) has the products of each adapter's B with the others' A as well. `cat` stacks the factors, which is the
exact sum of the deltas, Σ w·s·B·A = [B_1 B_2 ...]·[w_1·s_1·A_1; w_2·s_2·A_2; ...], at the sum of the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.core.method import require_rank


def trim(T: Tensor, density: float) -> Tensor:
    """The ⌊density·n⌋ of the n entries that are largest in magnitude; the others zero."""
    kept, flat = torch.zeros_like(T).flatten(), T.flatten()
    index = flat.abs().topk(int(density * T.numel())).indices
    return kept.index_copy(0, index, flat[index]).view_as(T)


def drop(T: Tensor, density: float) -> Tensor:
    """m∘T / density with m ~ Bernoulli(density), whose mean is T."""
    return torch.bernoulli(torch.full_like(T, density)) * T / density


def total(tasks: Sequence[Tensor], weights: Sequence[float], sign: str = "total") -> Tensor:
    """Σ w_i·T_i (task arithmetic, Ilharco et al. 2022, https://arxiv.org/abs/2212.04089)."""
    return torch.stack([w * t for w, t in zip(weights, tasks, strict=True)]).sum(0)


def agree(tasks: Sequence[Tensor], weights: Sequence[float], sign: str = "total") -> Tensor:
    """Elect a sign for each entry, then average the tasks that have it (TIES, section 3, steps 2 and 3).

    γ = sign(Σ_i T_i) ("total") or sign(Σ_i sign(T_i)) ("frequency"), + where it is 0;
    result = Σ_{i: sign(T_i) = γ} w_i·T_i / #{i: sign(T_i) = γ}, and 0 where no task has the sign.
    """
    T = torch.stack(list(tasks))  # (tasks, ...)
    up = (T.sign() if sign == "frequency" else T).sum(0) >= 0
    keep = torch.where(up, T > 0, T < 0)
    return total((T * keep).unbind(), weights) / keep.sum(0).clamp_min(1)


# TIES: Yadav et al. 2023, https://arxiv.org/abs/2306.01708.   DARE: Yu et al. 2023, https://arxiv.org/abs/2311.03099.
MERGES: dict[str, tuple[Any, Any]] = {  # how each task is pruned, how all are joined
    "linear": (None, total),
    "ties": (trim, agree),
    "dare_linear": (drop, total),
    "dare_ties": (drop, agree),
    "magnitude_prune": (trim, total),
}
TYPES: dict[str, tuple[str, str]] = {  # combination_type: (what is merged, the merge)
    "cat": ("stack", "linear"),
    "svd": ("delta", "linear"),
    **{name: ("factors", name) for name in MERGES},
    **{f"{name}_svd": ("delta", name) for name in MERGES if name != "linear"},
}


@dataclass
class Recipe:
    """How to combine; see `add_weighted_adapter`. Raises ValueError for settings that cannot work."""

    type: str = "svd"
    rank: int | None = None
    clamp: float | None = None
    driver: str | None = None
    density: float | None = None
    sign: str = "total"

    def __post_init__(self) -> None:
        if self.type not in TYPES:
            raise ValueError(f"Invalid combination_type: {self.type}. Known: {', '.join(TYPES)}.")
        self.form, merge = TYPES[self.type]
        self.prune, self.join = MERGES[merge]
        if self.prune and (self.density is None or not 0 < self.density <= 1):
            raise ValueError(f"combination_type '{self.type}' needs a `density` in (0, 1], but got {self.density}.")
        if self.sign not in ("total", "frequency"):
            raise ValueError(f"`majority_sign_method` should be 'total' or 'frequency', not {self.sign!r}.")
        if self.rank is not None:
            require_rank(self.rank, "svd_rank")

    def merge(self, tasks: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """One tensor of several tasks."""
        pruned = [self.prune(T, self.density) for T in tasks] if self.prune else tasks
        return self.join(pruned, weights, self.sign)


# ---------------------------------------------------------------------- at one layer
def split(D: Tensor, rank: int, clamp: float | None = None, driver: str | None = None) -> tuple[Tensor, Tensor]:
    """D (out, in) ≈ B·A, A = Vᵀ (rank, in), B = U·S (out, rank); `clamp`: cut at ± that quantile of all entries."""
    U, S, A = torch.linalg.svd(D, full_matrices=False, driver=driver)
    A, B = A[:rank], U[:, :rank] * S[:rank]
    if clamp is not None:
        q = torch.quantile(torch.cat([B.flatten(), A.flatten()]), clamp)
        A, B = A.clamp(-q, q), B.clamp(-q, q)
    return A, B


def split_product(A: Tensor, B: Tensor, rank: int, driver: str | None = None) -> tuple[Tensor, Tensor]:
    """`split(B @ A)` for A (R, in), B (out, R) without forming the product: QR of each, then the SVD of (R, R)."""
    (Qb, Rb), (Qa, Ra) = torch.linalg.qr(B), torch.linalg.qr(A.T)
    a, b = split(Rb @ Ra.T, rank, driver=driver)
    return a @ Qa.T, Qb @ b
