"""Orthogonal start (https://datta0.github.io/posts/rethink-lora-init/): B·A = 0 with neither factor zero."""

from __future__ import annotations

from typing import Any

import torch

from trimtab.core.families import wide
from trimtab.errors import ConfigError


def orthogonal(method: Any) -> None:
    """A lies in the span of the even rows of an orthogonal (r, r), B in that of the odd ones."""
    r, site = method.r, method.site
    if r % 2:
        raise ConfigError(f"Orthogonal initialization requires the LoRA rank to be even, got {r} instead.")
    Q = torch.linalg.qr(wide(torch.rand(r, r).to(method.factors[0].dtype))).Q
    A = (torch.randn(*site.batch, site.fan_in, r // 2).to(Q) @ Q[0::2]).mT / 10
    method.put(A, (torch.randn(*site.batch, site.fan_out, r // 2).to(Q) @ Q[1::2]) / 10)
