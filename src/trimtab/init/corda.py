"""CorDA (Yang et al. 2024, https://arxiv.org/abs/2406.05223, eq. 2-5): a start from W C.

With C the covariance of the layer's inputs, W C = U S Vᵀ, and so W = U S (Vᵀ C⁻¹). "ipm" trains the r leading
components, "kpm" the r last, which leaves the others, what the data need, as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from trimtab.core.config import help_field
from trimtab.core.families import wide
from trimtab.errors import ConfigError

GOOD = 0.05  # the error of C C⁻¹ that is accepted


@dataclass
class CordaConfig:
    """Settings of CorDA."""

    cache_file: str | None = help_field("A file that keeps the components.", None)
    covariance_file: str | None = help_field("A file that keeps the covariances.", None)
    corda_method: Literal["ipm", "kpm"] = help_field(
        "ipm: adapt to the data's task; kpm: keep what the data need.", "ipm"
    )
    verbose: bool = help_field("Say which layer is worked on.", False)
    use_float16_for_covariance: bool = help_field("Sum the covariances in half precision.", False)
    prune_temporary_fields: bool = help_field("Forget covariances and components once they are used.", True)

    def __post_init__(self) -> None:
        if self.corda_method not in ("ipm", "kpm"):
            raise ConfigError(f"`corda_method` should be 'ipm' or 'kpm', not {self.corda_method!r}.")


@dataclass
class CordaEigens:
    """r components of a layer: W's part is U diag(S) Vᵀ."""

    S_WC: Tensor  # (r,)
    U_WC: Tensor  # (out, r)
    V_WC: Tensor  # (in, r)


def components(W: Tensor, C: Tensor, r: int, which: str) -> CordaEigens:
    """The r components of W (out, in) oriented by the covariance C (in, in)."""
    W, C = wide(W), wide(C)
    if not torch.isfinite(C).all():
        raise ConfigError("A covariance is not finite: the data overflow; do without `use_float16_for_covariance`.")
    eye, damp = torch.eye(len(C), dtype=C.dtype, device=C.device), 0.01
    while True:  # until the inverse is one
        fixed = C + damp * C.diagonal().mean() * eye
        inverse = torch.linalg.inv(fixed)
        if torch.dist(fixed @ inverse, eye) < GOOD:
            break
        damp *= 2
        if not damp < 1e6:
            raise ConfigError("A covariance has no inverse: the layer's inputs were all zero.")
    U, S, Vh = torch.linalg.svd(W @ fixed, full_matrices=False)
    kept = slice(0, r) if which == "ipm" else slice(len(S) - r, len(S))
    return CordaEigens(S[kept].clone(), U[:, kept].clone(), (Vh[kept] @ inverse).T.clone())


def corda(method: Any) -> Tensor:
    """B = U sqrt(S / s), A = sqrt(S / s) Vᵀ; W keeps the rest."""
    layer, W = method.site.layer, wide(method.site.matrix())
    found: CordaEigens | None = layer.__dict__.get("eigens")
    if found is None:
        raise ConfigError(
            f"`eigens` attribute not found for layer '{method.site.name}', please run `preprocess_corda` first. (An "
            "adapter that was trained from it is loaded by other models once it is saved with "
            "`path_initial_model_for_weight_conversion`.)"
        )
    if len(found.S_WC) != method.r:
        raise ConfigError(
            f"'{method.site.name}' has {len(found.S_WC)} components and rank {method.r}: run `preprocess_corda` with "
            "this config."
        )
    root = (found.S_WC.to(W) / method.scaling).sqrt()
    method.put(root[:, None] * found.V_WC.to(W).T, found.U_WC.to(W) * root)
    if method.options.corda_config is None or method.options.corda_config.prune_temporary_fields:
        for name in ("eigens", "covariance_matrix", "sample_count"):
            layer.__dict__.pop(name, None)
    return W - method.delta()
