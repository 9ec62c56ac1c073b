"""PiSSA (Meng et al. 2024, https://arxiv.org/abs/2404.02948, eq. 2-4): the pair starts as the top of W's spectrum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trimtab.core.families import wide
from trimtab.core.seeded import seeded


def pissa(method: Any, niter: int | None = None) -> Tensor:
    """s·B·A = the r leading singular directions; W keeps the rest. `niter` takes the fast randomised SVD."""
    W, r, s = wide(method.site.matrix()), method.r, method.scaling
    if niter is None:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        U, S, Vh = U[..., :r], S[..., :r], Vh[..., :r, :]
    else:
        with seeded(0, W.device):  # the same W, the same split: a saved adapter finds the base it was trained on
            U, S, V = torch.svd_lowrank(W, r, niter=niter)
        Vh = V.mT
    root = (S / s).sqrt()
    method.put(root[..., None] * Vh, U * root[..., None, :])
    return W - method.delta()
