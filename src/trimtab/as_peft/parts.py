"""Parts of peft's inside that programs call by themselves, on trimtab's own."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.graft.base import Base
from trimtab.graft.stack import replicate
from trimtab.init import eva
from trimtab.init.loftq import fitted

__all__ = [
    "IncrementalPCA",
    "LoraEmbeddingATPHolder",
    "MontecloraTrainerMixin",
    "_LoraParameterProxy",
    "add_lora_tp_hooks_dtensor",
    "get_tp_plan_and_mesh",
    "loftq_init",
    "random_mask",
    "replicate_layers",
]


class IncrementalPCA:
    """Principal components of rows that come in batches, with scikit-learn's names.

    The decompositions are exact: `svd_driver` and `lowrank...` are taken, and make no difference.

    Args:
        n_components: how many; None: as many as the first batch allows.
        batch_size: rows of a batch of `fit`; None: five times the features.
    """

    def __init__(
        self,
        n_components: int | None = None,
        copy: bool | None = True,
        batch_size: int | None = None,
        svd_driver: str | None = None,
        lowrank: bool = False,
        lowrank_q: int | None = None,
        lowrank_niter: int = 4,
        lowrank_seed: int | None = None,
    ) -> None:
        self.n_components, self.copy, self.batch_size = n_components, copy, batch_size
        self.svd_driver, self.lowrank, self.lowrank_q = svd_driver, lowrank, lowrank_q
        self.lowrank_niter, self.lowrank_seed = lowrank_niter, lowrank_seed
        if lowrank and lowrank_q is None:
            if n_components is None:
                raise ValueError("n_components must be specified when using lowrank mode with lowrank_q=None.")
            self.lowrank_q = 2 * n_components
        if lowrank and n_components is not None and self.lowrank_q is not None and self.lowrank_q < n_components:
            raise ValueError("lowrank_q must be greater than or equal to n_components.")
        self.pca: eva.IncrementalPCA | None = None

    def fit(self, X: Tensor, check_input: bool = True) -> IncrementalPCA:
        """Take X (rows, features) in batches, after nothing else."""
        X, self.pca = torch.as_tensor(X), None
        size = self.batch_size or 5 * X.shape[1]
        least = self.n_components or 0
        start = 0
        while start < len(X):
            stop = start + size
            stop = len(X) if len(X) - stop < least else stop  # the rest is too few to be a batch
            self.partial_fit(X[start:stop], check_input)
            start = stop
        return self

    def partial_fit(self, X: Tensor, check_input: bool = True) -> IncrementalPCA:
        """Take a batch X (rows, features).

        Raises:
            ValueError: more components than rows or features, or other features than before.
        """
        X = torch.as_tensor(X)
        X = X if X.is_floating_point() else X.float()
        rows, features = X.shape
        n = self.n_components
        if n is not None and not 1 <= n <= features:
            raise ValueError(
                f"n_components={n} invalid for n_features={features}, need more rows than columns for IncrementalPCA "
                "processing."
            )
        if n is not None and n > rows:
            raise ValueError(f"n_components={n} must be less or equal to the batch number of samples {rows}")
        if self.pca is None:
            self.n_features_ = features
            self.pca = eva.IncrementalPCA(n or min(rows, features))
        elif features != self.n_features_:
            raise ValueError(
                "Number of features of the new batch does not match the number of features of the first batch."
            )
        self.pca.update(X)
        self._show()
        return self

    def _show(self) -> None:
        pca = self.pca
        assert pca is not None
        self.n_samples_seen_ = torch.tensor([pca.count])
        self.mean_, self.var_ = pca.mean, pca.spread / pca.count
        self.components_, self.singular_values_ = pca.components, pca.values
        self.explained_variance_ = pca.values.square() / (pca.count - 1)
        self.explained_variance_ratio_ = pca.share

    def transform(self, X: Tensor) -> Tensor:
        """X (rows, features) in the components: (rows, n)."""
        return (X - self.mean_) @ self.components_.to(X.dtype).T  # type: ignore[union-attr]


class MontecloraTrainerMixin:
    """Nothing to do: in training, a model adds its adapters' own terms to `outputs.loss` by itself."""


@torch.no_grad()
def loftq_init(
    weight: Tensor | nn.Parameter, num_bits: int, reduced_rank: int, num_iter: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """LoftQ of a weight (out, in): what it is once quantised, A (r, in) and B (out, r) for what that loses."""
    Q, A, B = fitted(weight.detach().float(), num_bits, reduced_rank, num_iter)
    return Q.to(weight.dtype), A, B


def random_mask(base_layer: nn.Module, r: int, random_seed: int | None = None, **kwargs: Any) -> Tensor:
    """True at r (in + out) entries of a layer's weight, drawn at random: a `mask_fn` of SHiRA."""
    weight: Any = base_layer.weight
    generator = None if random_seed is None else torch.Generator().manual_seed(random_seed)
    mask = torch.zeros(weight.numel(), dtype=torch.bool)
    mask[torch.randperm(weight.numel(), generator=generator)[: r * sum(weight.shape)]] = True
    return mask.view(weight.shape).to(weight.device)


def replicate_layers(model: nn.Module, layer_map: list[tuple[int, int]]) -> None:
    """Rebuild a model's stack of layers from ranges (start, end) of it; repeated layers share their weights."""
    replicate(Base(model), SimpleNamespace(layer_replication=layer_map))


class _LoraParameterProxy(nn.Module):
    """What is added to a weight while it is used, as a parametrization. No layer of ours has one."""

    def __init__(self, delta_weight: Tensor) -> None:
        super().__init__()
        self.delta_weight = delta_weight  # no buffer: it is no part of the model's state

    def forward(self, W: Tensor) -> Tensor:
        """W and what is added to it."""
        return W + self.delta_weight


class LoraEmbeddingATPHolder(nn.Embedding):
    """An embedding's A (r, vocabulary) as the table (vocabulary, r) of a module, which can be cut over processes."""

    def __init__(self, lora_embedding_A_weight: nn.Parameter) -> None:
        r, words = lora_embedding_A_weight.shape
        super().__init__(words, r, _weight=lora_embedding_A_weight.detach().T)
        self.weight.requires_grad_(lora_embedding_A_weight.requires_grad)


def get_tp_plan_and_mesh(model: nn.Module, current_key: str) -> tuple[str | None, Any]:
    """How transformers cuts the module `current_key` of a model over processes, and over which; (None, None): not."""
    mesh: Any = getattr(model, "_device_mesh", None)
    names = getattr(mesh, "mesh_dim_names", None) or ()
    plan = (getattr(model, "tp_plan", None) or {}).get(re.sub(r"\d+", "*", current_key))
    if plan is None or "tp" not in names:
        return None, None
    return plan, mesh if names == ("tp",) else mesh["tp"]


def add_lora_tp_hooks_dtensor(
    tp_module: nn.Module, tp_plan_name: str, device_mesh: Any, *, base_layer: nn.Module, module_name: str
) -> None:
    """Cut a module over processes by one of transformers' plans. Ours need it not: they keep adapters whole."""
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

    style = ALL_PARALLEL_STYLES[tp_plan_name]
    for name in list(tp_module._parameters):
        style.shard_param(tp_module, name, device_mesh)
    style.install_forward(tp_module, device_mesh)
