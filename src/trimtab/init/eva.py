"""EVA (Paischer et al. 2024, https://arxiv.org/abs/2410.07170, section 3): A starts from the inputs.

The right singular vectors of each layer's inputs, found batch by batch, are put in order by the share of the variance
they explain; the ranks go to the layers whose vectors come first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.core.config import help_field
from trimtab.core.report import warn
from trimtab.errors import ConfigError


@dataclass
class EvaConfig:
    """Settings of EVA."""

    rho: float = help_field("No layer gets more than rho times the rank.", 2.0)
    tau: float = help_field("A vector has converged where the cosine with its former self is at least this.", 0.99)
    use_label_mask: bool = help_field("Look at the tokens only that have a label.", True)
    label_mask_value: int = help_field("The label of those that have none.", -100)
    whiten: bool = help_field("Divide each vector by the root of its singular value.", False)
    adjust_scaling_factors: bool = help_field("Keep alpha / r as it is where a layer's rank changes.", True)

    def __post_init__(self) -> None:
        if self.rho < 1:
            raise ConfigError("`rho` must be >= 1.0")
        if not 0 <= self.tau <= 1:
            raise ConfigError("`tau` must be between 0.0 and 1.0.")


class IncrementalPCA:
    """The leading singular vectors of rows that come in batches (Ross et al. 2008, section 3.1).

    Attributes:
        components: (n, features), or None before the first batch.
        values: the singular values.
        share: of the variance that each explains.
    """

    def __init__(self, n: int) -> None:
        self.n, self.count = n, 0
        self.components: Tensor | None = None
        self.values, self.share, self.mean, self.spread = (torch.empty(0) for _ in range(4))

    def update(self, X: Tensor) -> None:
        """Take a batch (rows, features), of at least n rows."""
        mean, old, total = X.mean(0), self.count, self.count + len(X)
        spread = (X - mean).square().sum(0)  # sums of squares about the mean, by feature
        rows = X - mean
        if self.components is not None:
            shift = (old * len(X) / total) * (self.mean - mean).square()
            correction = (old * len(X) / total) ** 0.5 * (self.mean - mean)
            rows = torch.cat([self.values[:, None] * self.components, rows, correction[None]])
            mean, spread = (old * self.mean + len(X) * mean) / total, self.spread + spread + shift
        _, S, V = torch.linalg.svd(rows, full_matrices=False)
        V = V * V.gather(1, V.abs().argmax(1, keepdim=True)).sign()
        self.components, self.values = V[: self.n], S[: self.n]
        self.count, self.mean, self.spread = total, mean, spread
        self.share = self.values.square() / spread.sum()


class Watched:
    """The inputs of one layer, until their leading vectors have converged."""

    def __init__(self, n: int, tau: float) -> None:
        self.pca, self.tau, self.n = IncrementalPCA(n), tau, n
        self.waiting: list[Tensor] = []
        self.converged = torch.zeros(n, dtype=torch.bool)

    def see(self, X: Tensor) -> None:
        """Take rows; fewer than there are vectors wait for more."""
        self.waiting.append(X.detach().double())
        if sum(map(len, self.waiting)) < self.n:
            return
        X, self.waiting = torch.cat(self.waiting), []
        before = self.pca.components
        self.pca.update(X)
        now = self.pca.components
        if before is not None and now is not None and before.shape == now.shape:
            self.converged = (torch.cosine_similarity(before, now) >= self.tau).cpu()


def distribute(shares: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """The rank of each layer: how many of the `budget` largest shares of all layers are its."""
    names = [name for name, share in shares.items() for _ in share]
    values = torch.cat([share.cpu() for share in shares.values()])
    ranks = dict.fromkeys(shares, 0)
    for at in values.argsort(descending=True, stable=True)[:budget].tolist():
        ranks[names[at]] += 1
    return ranks


def in_processes(speak: bool = False) -> bool:
    """Whether there are processes that a layer's rows can be gathered from; `speak`: say what that asks of them."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed and speak:
        warn(
            "torch.distributed is initialized and `gather_distributed_inputs` is True, therefore EVA initialization "
            "will gather tensors from all ranks. Ensure the model does not receive the same inputs on different ranks.",
            UserWarning,
        )
    return distributed


def gathered(rows: Tensor) -> Tensor:
    """The rows (n, features) of all processes, which may have other numbers of them."""
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, rows.cpu())
    return torch.cat(parts).to(rows.device)
