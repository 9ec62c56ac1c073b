"""Orthogonal start (https://datta0.github.io/posts/rethink-lora-init/): B·A = 0 with neither factor zero."""

from __future__ import annotations

from typing import Any

import torch

from trimtab.errors import ConfigError


def orthogonal(method: Any) -> None:
    """A lies in the span of the even rows of an orthogonal (r, r), B in that of the odd ones."""
    r, site = method.r, method.site
    if r % 2:
        raise ConfigError(f"Orthogonal initialization requires the LoRA rank to be even, got {r} instead.")
    A, B = method.factors
    Q = torch.linalg.qr(torch.rand(r, r)).Q
    A.copy_((torch.randn(site.fan_in, r // 2) @ Q[0::2]).T.reshape(A.shape) / 10)
    B.copy_((torch.randn(site.fan_out, r // 2) @ Q[1::2]).reshape(B.shape) / 10)
