"""The plain starts: B·A = 0 (default, gaussian), or both factors random."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn


def default(method: Any) -> None:
    """A as nn.Linear starts it, B zero; of an embedding's pair A zero, B standard normal."""
    A, B = method.factors
    if method.site.kind == "embedding":
        nn.init.zeros_(A)
        nn.init.normal_(B)
    else:
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        nn.init.zeros_(B)


def gaussian(method: Any) -> None:
    """A normal with standard deviation 1 / r, B zero; an embedding's pair as by default."""
    if method.site.kind == "embedding":
        default(method)
        return
    A, B = method.factors
    nn.init.normal_(A, std=1 / method.r)
    nn.init.zeros_(B)


def random(method: Any) -> None:
    """Both factors random, so that the adapter changes the output from the first step: for tests."""
    factor: Tensor
    for factor in method.factors:
        if method.site.kind == "embedding":
            nn.init.normal_(factor)
        else:
            nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
