"""peft.utils.merge_utils: merges of task tensors, which `core.combining` has."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trimtab.core.combining import MERGES, drop, trim

__all__ = [
    "calculate_majority_sign_mask",
    "dare_linear",
    "dare_ties",
    "disjoint_merge",
    "magnitude_based_pruning",
    "magnitude_prune",
    "prune",
    "random_pruning",
    "reshape_weight_task_tensors",
    "task_arithmetic",
    "ties",
]


def _merge(
    name: str,
    task_tensors: Sequence[Tensor],
    weights: Any,
    density: float | None = None,
    majority_sign_method: str = "total",
) -> Tensor:
    cut, join = MERGES[name]
    tasks = [cut(T, density) for T in task_tensors] if cut else list(task_tensors)
    merged: Tensor = join(tasks, list(weights), majority_sign_method)
    return merged


task_arithmetic = partial(_merge, "linear")
magnitude_prune = partial(_merge, "magnitude_prune")
ties = partial(_merge, "ties")
dare_linear = partial(_merge, "dare_linear")
dare_ties = partial(_merge, "dare_ties")
magnitude_based_pruning = trim


def random_pruning(tensor: Tensor, density: float, rescale: bool) -> Tensor:
    """Entries kept by chance; with `rescale`, divided by that chance."""
    return drop(tensor, density) * (1 if rescale else density)


def prune(tensor: Tensor, density: float, method: str, rescale: bool = False) -> Tensor:
    """The largest entries ("magnitude"), or those that chance keeps ("random"), and zeros."""
    if density >= 1:
        return tensor
    if density < 0:
        raise ValueError(f"Density should be >= 0, got {density}")
    if method not in ("magnitude", "random"):
        raise ValueError(f"Unknown method {method}")
    return trim(tensor, density) if method == "magnitude" else random_pruning(tensor, density, rescale)


def reshape_weight_task_tensors(task_tensors: Tensor, weights: Tensor) -> Tensor:
    """The weights, one a task, in a shape that multiplies them."""
    return weights.view(len(weights), *[1] * (task_tensors.ndim - 1))


def calculate_majority_sign_mask(tensor: Tensor, method: str = "total") -> Tensor:
    """Where each task (the first axis) has the sign that most have."""
    sign = (tensor.sign() if method == "frequency" else tensor).sum(0) >= 0
    return torch.where(sign, 1, -1) == tensor.sign()


def disjoint_merge(task_tensors: Tensor, majority_sign_mask: Tensor) -> Tensor:
    """The mean of the tasks that have the sign."""
    return (task_tensors * majority_sign_mask).sum(0) / majority_sign_mask.sum(0).clamp_min(1)
