"""Floor 3: ways to start a low-rank pair. One function a file; the table below is all that knows them by name.

Each takes the method (its `site`, `r`, `scaling` and factors) and fills A and B in place; one that moves part of the
base's weight into the pair returns what is left, W - s·B·A.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import ConfigError

# name: (function, whether it changes the base's weights)
STARTS: dict[Any, tuple[str, bool]] = {
    True: ("default", False),
    False: ("random", False),
    "gaussian": ("gaussian", False),
    "orthogonal": ("orthogonal", False),
    "pissa": ("pissa", True),
    "olora": ("olora", True),
}
PENDING = ("eva", "corda", "loftq", "lora_ga", "mica")


def mutates(name: bool | str) -> bool:
    """Whether the initialisation changes the base's weights. Raises for a name that does not act."""
    if isinstance(name, str) and name in PENDING:
        raise NotImplementedError(f"`init_lora_weights={name!r}` does not act yet.")
    key = "pissa" if isinstance(name, str) and name.startswith("pissa_niter_") else name
    if key not in STARTS:
        raise ConfigError(f"Unknown initialization init_lora_weights={name!r}. Known: {[*STARTS]}, 'pissa_niter_[n]'.")
    return STARTS[key][1]


@torch.no_grad()
def start(name: bool | str, method: Any) -> Tensor | None:
    """Fill the pair of `method` as `init_lora_weights` says; the base's new W (out, in) where it changes."""
    mutates(name)
    if isinstance(name, str) and method.site.kind == "embedding":
        name = True  # PEFT starts an embedding's pair plainly whatever the name, and files rely on it
    if isinstance(name, str) and name.startswith("pissa_niter_"):
        rounds = name.removeprefix("pissa_niter_")
        if not rounds.isdigit():
            raise ConfigError(f"init_lora_weights={name!r}: the part after 'pissa_niter_' should be a whole number.")
        return _function("pissa")(method, int(rounds))
    return _function(STARTS[name][0])(method)


def _function(name: str) -> Callable[..., Tensor | None]:
    if name in ("default", "random", "gaussian"):
        return getattr(import_module(f"{__name__}.basic"), name)
    return getattr(import_module(f"{__name__}.{name}"), name)
