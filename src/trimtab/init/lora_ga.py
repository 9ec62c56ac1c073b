"""LoRA-GA (Wang et al. 2024, https://arxiv.org/abs/2407.05000, algorithm 1): A and B start from the gradient's SVD.

G = U S Vᵀ: with A = c V[:r], B = c U[r : 2r] the first step comes as near to that of full training as a pair can.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from trimtab.core.config import help_field
from trimtab.core.families import wide
from trimtab.core.seeded import seeded
from trimtab.errors import ConfigError

GRADIENT = "_peft_loraga_grad"  # where a layer keeps its gradient until then
DIRECTIONS, SCALES = ("ArBr", "A2rBr", "ArB2r", "random"), ("stable", "weight_svd", "gd_scale", "unit")


@dataclass
class LoraGAConfig:
    """Settings of LoRA-GA."""

    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = help_field(
        "Which of the 2r leading directions A and B take: A the first r and B the others (ArB2r), the other way round "
        "(A2rBr), every other one (ArBr), or r of them by chance.",
        "ArB2r",
    )
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = help_field(
        "c: the fourth root of out / gamma² (stable), of W's own size (weight_svd), 1 / s (gd_scale), or 1.", "stable"
    )
    stable_gamma: int = help_field("gamma of `stable`.", 16)

    def __post_init__(self) -> None:
        for name, known in (("direction", DIRECTIONS), ("scale", SCALES)):
            if getattr(self, name) not in known:
                raise ConfigError(f"`{name}` of LoRA-GA should be one of {list(known)}, not {getattr(self, name)!r}.")
        if self.stable_gamma <= 0:
            raise ConfigError(f"`stable_gamma` should be positive, not {self.stable_gamma}.")


def lora_ga(method: Any) -> Tensor:
    """A and B as the gradient says; W keeps the rest, so that nothing changes at the start."""
    layer, W, r = method.site.layer, wide(method.site.matrix()), method.r
    G = layer.__dict__.pop(GRADIENT, None)
    if G is None:
        raise ConfigError(
            f"'{method.site.name}' has no gradient to start from: run `preprocess_loraga(model, config, train_step)` "
            "before the adapter is added. (An adapter that was trained from one is loaded by other models once it is "
            "saved with `path_initial_model_for_weight_conversion`.)"
        )
    G = wide(method.site.store(G.to(W.device)))  # (in, out) where the layer's weight lies so
    if 2 * r > min(G.shape):
        raise ConfigError(
            f"LoRA-GA needs 2r directions, but '{method.site.name}' has {min(G.shape)}: r={r} is too much."
        )
    settings = method.options.lora_ga_config or LoraGAConfig()
    with seeded(0, G.device):  # the same gradient, the same start
        U, _, V = torch.svd_lowrank(G, min(4 * r, *G.shape), niter=4)
        chance = torch.randperm(2 * r)[:r].sort().values
    first, second = slice(0, r), slice(r, 2 * r)
    takes: dict[str, tuple[Any, Any]] = {
        "ArBr": (slice(1, 2 * r, 2), slice(0, 2 * r, 2)),
        "A2rBr": (second, first),
        "ArB2r": (first, second),
        "random": (chance, chance),
    }
    for_A, for_B = takes[settings.direction]
    c = _size(settings, method, W)
    method.put(c * V[:, for_A].T, c * U[:, for_B])
    return W - method.delta()


def _size(settings: LoraGAConfig, method: Any, W: Tensor) -> float:
    if settings.scale == "stable":
        return float(len(W) ** 0.25 / settings.stable_gamma**0.5)
    if settings.scale == "gd_scale":
        return float(1 / method.scaling)
    if settings.scale == "weight_svd":
        return float((torch.linalg.svdvals(W)[: method.r].mean() / method.scaling).sqrt())
    return 1.0
