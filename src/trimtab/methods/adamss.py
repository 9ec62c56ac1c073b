"""AdaMSS (Zheng et al. 2025, https://openreview.net/forum?id=8ZdWmpYxT0).   [W' b'] = [W b] + E V,   E_k = B_k A_k.

E_k are the rows of E of cluster k.
V (r, in + 1) has the first right singular vectors of the layer's weight with its bias as a last column. The rows of the
left ones are put into clusters by k-means, and each cluster of outputs has an update of its own small rank. With
`use_asa` the clusters of least importance, over all layers, stop being trained: fewer and fewer are left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from trimtab.core.architectures import ATTENTION
from trimtab.core.config import LayerConfig, PeftType, help_field
from trimtab.core.extras import need
from trimtab.core.families import wide
from trimtab.core.method import Call, Leaf, Leaves, Method, require_rank
from trimtab.core.seeded import seeded
from trimtab.core.site import Site
from trimtab.errors import ConfigError

AVERAGES = ("adamss_sensitivity", "adamss_uncertainty")
SCHEDULE = (  # of `use_asa`: without it None will do for each, as PEFT's scripts have it
    "asa_target_subspaces",
    "init_warmup",
    "final_warmup",
    "mask_interval",
    "asa_importance_beta",
    "asa_uncertainty_beta",
    "asa_schedule_exponent",
)
KMEANS_SEED, POWERS = 123456789, 2  # as PEFT has them: the clusters are not in the file, they are found again on load


@dataclass
class AdamssConfig(LayerConfig):
    """The configuration of an AdaMSS adapter."""

    r: int = help_field("How many singular vectors are kept.", 100)
    num_subspaces: int = help_field("How many clusters.", 5)
    subspace_rank: int = help_field("The rank of a cluster's update, at most.", 1)
    init_weights: str | None = help_field(
        "'orthogonal': A from the cluster, B = 0; None: a small random B.", "orthogonal"
    )
    use_asa: bool = help_field("In training, freeze clusters of little importance.", False)
    asa_target_subspaces: int | None = help_field("How many clusters of all layers are trained in the end.", 50)
    init_warmup: int | None = help_field("Steps before any is frozen.", 50)
    final_warmup: int | None = help_field("The step from which on none is.", 1000)
    mask_interval: int | None = help_field("Steps between two cuts.", 100)
    asa_importance_beta: float | None = help_field("How much of the old importance its average keeps.", 0.85)
    asa_uncertainty_beta: float | None = help_field("How much of the old uncertainty its average keeps.", 0.85)
    asa_schedule_exponent: float | None = help_field("The exponent of the schedule.", 3.0)
    use_dynamic_rank: bool = help_field("A cluster's rank follows from its singular values.", False)
    svd_threshold: float = help_field("The share of the largest squared one that counts.", 0.1)
    random_seed: int = help_field("The seed of the decomposition.", 0)

    exclude_modules: ClassVar[None] = None  # type: ignore[misc]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.ADAMSS
        if self.init_weights not in ("orthogonal", None):
            raise ConfigError(f"init_weights must be 'orthogonal' or None, got {self.init_weights}")
        if not self.use_asa:
            return
        own: Any = self
        if absent := [name for name in SCHEDULE if getattr(self, name) is None]:
            raise ConfigError(f"`use_asa=True` needs numbers for its schedule, and {', '.join(absent)} are None.")
        for name in ("asa_target_subspaces", "mask_interval"):
            if getattr(self, name) <= 0:
                raise ConfigError(
                    f"`{name}` must be a positive integer when `use_asa=True`, got {getattr(self, name)}."
                )
        if own.asa_schedule_exponent <= 0:
            raise ConfigError(
                "`asa_schedule_exponent` must be a positive number when `use_asa=True`, got "
                f"{self.asa_schedule_exponent}."
            )
        if own.init_warmup >= own.final_warmup:
            raise ConfigError(
                "`init_warmup` must be smaller than `final_warmup` when `use_asa=True` so that ASA has a non-empty "
                f"pruning ramp, got init_warmup={self.init_warmup} and final_warmup={self.final_warmup}."
            )


class Adamss(Method):
    """Updates of clusters of outputs within the span of the weight's first singular vectors."""

    when = "very few parameters, in clusters of outputs"
    config, prefix, targets = AdamssConfig, "adamss_", {**ATTENTION, "vit": ["query", "value"]}
    kinds = fused = frozenset({"linear", "conv"})

    @classmethod
    def leaves(cls, site: Site, config: Any, shared: Leaves) -> Leaves:
        for name in ("r", "num_subspaces", "subspace_rank"):
            require_rank(getattr(config, name), name)
        found = clusters(site, config)
        U, V = decomposed(site, config)
        r, ranks = len(V), [rank_of(U[rows], config) for rows in found]
        pairs = {f"adamss_A.{{}}.{k}": Leaf((rank, r)) for k, rank in enumerate(ranks)}  # (rank, r)
        pairs |= {
            f"adamss_B.{{}}.{k}": Leaf((len(rows), rank))  # (outputs, rank)
            for k, (rows, rank) in enumerate(zip(found, ranks, strict=True))
        }
        leaves = pairs | {"adamss_newB": Leaf(tuple(V.shape), train=False, buffer=True)}  # (r, columns): V
        if config.use_asa:
            trained = Leaf((len(found),), train=False, file=False, state=True, dtype=torch.bool)  # (clusters,)
            leaves["adamss_trained"] = trained
            for average in AVERAGES:
                for name, leaf in pairs.items():
                    kept = Leaf(leaf.shape, train=False, file=False, state=True, buffer=True)  # (...)
                    leaves[name.replace("adamss", average)] = kept
        return leaves

    def setup(self, config: Any) -> None:
        self.clusters = clusters(self.site, config)
        self.order = torch.cat(self.clusters).argsort()  # which row of all B_k A_k an output has

    def reset(self, config: Any) -> None:
        U, V = decomposed(self.site, config)
        self.adamss_newB.copy_(V)
        for k, rows in enumerate(self.clusters):
            A, B = self.pair(k)
            A.copy_(torch.linalg.svd(U[rows.to(U.device)], full_matrices=False).Vh[: len(A)])
            if config.init_weights is None:
                B.normal_(0, 0.01)
            else:
                B.zero_()

        if config.use_asa:
            self.adamss_trained.fill_(True)
            for leaf in self.declared:
                if leaf.startswith(AVERAGES):
                    self.tensor(leaf).zero_()

    # ------------------------------------------------------------------ fewer and fewer clusters
    @classmethod
    def begin(cls, methods: Sequence[Any], config: Any, t: int) -> None:
        for m in methods if config.use_asa else ():
            m.freeze()

    @classmethod
    @torch.no_grad()
    def step(cls, methods: Sequence[Any], config: Any, t: int) -> None:
        first, last, target = config.init_warmup, config.final_warmup, config.asa_target_subspaces
        if not config.use_asa or not first < t <= last:
            return
        scores = [m.observe(config.asa_importance_beta, config.asa_uncertainty_beta) for m in methods]
        if t % config.mask_interval and t != last:
            return
        total = sum(len(m.clusters) for m in methods)
        share = ((last - t) / (last - first)) ** config.asa_schedule_exponent
        count = min(int(target + (total - target) * share), total)
        best = torch.cat([s.cpu() for s in scores]).topk(count).indices
        chosen = torch.zeros(total, dtype=torch.bool).index_fill_(0, best, True)
        for m, mine in zip(methods, chosen.split([len(m.clusters) for m in methods]), strict=True):
            m.adamss_trained.logical_and_(mine.to(m.adamss_trained.device))
            m.freeze()
            for leaf in m.declared:
                if leaf.startswith(AVERAGES):
                    m.tensor(leaf).zero_()

    def freeze(self) -> None:
        """Train only the clusters that are left."""
        for k, trained in enumerate(self.adamss_trained.tolist()):
            for tensor in () if trained else self.pair(k):
                tensor.requires_grad_(False)
                tensor.grad = None

    def observe(self, beta1: float, beta2: float) -> Tensor:
        """Take the last gradients into the averages I and U of sensitivity; the importance (clusters,)."""
        scores = self.adamss_newB.new_full((len(self.clusters),), -torch.inf)
        for k, trained in enumerate(self.adamss_trained.tolist()):
            parts = []
            for name in ("A", "B") if trained else ():
                w = self.tensor(f"adamss_{name}.{{}}.{k}")
                I, U = (self.tensor(f"{average}_{name}.{{}}.{k}") for average in AVERAGES)
                now = torch.zeros_like(w) if w.grad is None else (w * w.grad).abs()
                U.mul_(beta2).add_((now - I).abs(), alpha=1 - beta2)
                I.mul_(beta1).add_(now, alpha=1 - beta1)
                parts.append((I * U).mean())
            if parts:
                scores[k] = sum(parts)
        return scores

    # ------------------------------------------------------------------ the formula
    def pair(self, k: int) -> tuple[Tensor, Tensor]:
        """(A (rank, r), B (outputs, rank)) of a cluster."""
        return self.tensor(f"adamss_A.{{}}.{k}"), self.tensor(f"adamss_B.{{}}.{k}")

    def mixture(self) -> Tensor:
        """E (out, r), in fp32 at least."""
        pairs = (self.pair(k) for k in range(len(self.clusters)))
        E = torch.cat([wide(B) @ wide(A) for A, B in pairs])
        return E[self.order.to(E.device)]

    def weight(self, W: Tensor) -> Tensor:
        return W + self.mixture() @ wide(self.adamss_newB)[:, : self.site.fan_in]

    def bias(self, b: Tensor | None) -> Tensor | None:
        extra = wide(self.adamss_newB)[:, self.site.fan_in :]
        return b if b is None or not extra.shape[1] else b + (self.mixture() @ extra)[:, 0]

    def after(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        E, V, into = self.mixture(), self.adamss_newB, self.site.fan_in
        shift = (E @ wide(V)[:, into:])[:, 0].to(y.dtype) if V.shape[1] > into else None
        return self.site.add(y, self.site.apply(x, V[:, :into].to(y.dtype)), E.to(y.dtype), None, shift)


def decomposed(site: Site, config: Any) -> tuple[Tensor, Tensor]:
    """(U (out, r), V (r, in + 1)) of the weight with its bias; a random decomposition, the same for the same seed."""
    W, b = wide(site.matrix().detach()), site.bias()
    if b is not None:
        W = torch.cat([W, b.detach().to(W)[:, None]], 1)
    return leading(W, min(config.r, site.fan_in, site.fan_out), config.random_seed)


def leading(M: Tensor, r: int, seed: int) -> tuple[Tensor, Tensor]:
    """(U (..., out, r), V (..., r, in)) of the first singular vectors of M (..., out, in), by random products."""
    with seeded(seed, M.device):
        U, _, V = torch.svd_lowrank(M, q=r, niter=POWERS)
    return U, V.mT


_FOUND: WeakKeyDictionary[Site, dict[tuple[int, ...], list[Tensor]]] = WeakKeyDictionary()


def clusters(site: Site, config: Any) -> list[Tensor]:
    """The outputs of each cluster, as indices; found once a site."""
    known = _FOUND.setdefault(site, {})
    key = (config.r, config.num_subspaces, config.random_seed)
    if key not in known:
        known[key] = members(cluster_labels(decomposed(site, config)[0], config.num_subspaces))
    return known[key]


def cluster_labels(U: Tensor, count: int, iterations: int = 10) -> Tensor:
    """Which cluster each row of U (out, r) is in (out,), by k-means."""
    need("The clusters of an AdaMSS adapter", "scikit-learn")
    from sklearn.cluster import KMeans  # type: ignore[import-untyped, unused-ignore]

    means = KMeans(min(count, len(U)), init="random", n_init=1, max_iter=iterations, random_state=KMEANS_SEED)
    return torch.as_tensor(means.fit_predict(U.detach().cpu().numpy()), dtype=torch.int64)


def members(labels: Tensor) -> list[Tensor]:
    """The places of each label, in their order."""
    return [(labels == k).nonzero()[:, 0] for k in labels.unique()]


def rank_of(rows: Tensor, config: Any) -> int:
    """The rank of the update of a cluster that has these rows of U."""
    most = min(config.subspace_rank, *rows.shape)
    if not config.use_dynamic_rank:
        return most
    squares = torch.linalg.svdvals(rows).square()
    return max(1, min(most, int((squares > config.svd_threshold * squares[0]).sum())))
