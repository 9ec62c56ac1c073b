"""OLoRA (Büyükakyüz 2024, https://arxiv.org/abs/2406.01775, section 3): the pair starts as W's QR factors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trimtab.core.families import wide


def olora(method: Any) -> Tensor:
    """B = the first r columns of Q, A = the first r rows of R; W keeps the rest."""
    W, r = wide(method.site.matrix()), method.r
    Q, R = torch.linalg.qr(W)
    method.put(R[..., :r, :], Q[..., :r])
    return W - method.delta()
