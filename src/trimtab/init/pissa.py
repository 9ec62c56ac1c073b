"""PiSSA (Meng et al. 2024, https://arxiv.org/abs/2404.02948, eq. 2-4): the pair starts as the top of W's spectrum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def pissa(method: Any, niter: int | None = None) -> Tensor:
    """s·B·A = the r leading singular directions; W keeps the rest. `niter` takes the fast randomised SVD."""
    W, r, s = method.site.matrix().float(), method.r, method.scaling
    if niter is None:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        U, S, Vh = U[:, :r], S[:r], Vh[:r]
    else:
        U, S, V = torch.svd_lowrank(W, r, niter=niter)
        Vh = V.T
    root = (S / s).sqrt()
    A, B = method.factors
    A.copy_((root[:, None] * Vh).reshape(A.shape))
    B.copy_((U * root).reshape(B.shape))
    return W - method.delta()
