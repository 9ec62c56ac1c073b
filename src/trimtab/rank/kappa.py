"""KappaTune (Ludwig 2025, https://arxiv.org/abs/2506.16289): adapt the weights with the smallest condition numbers.

kappa = s_max / s_min of a weight's singular values. Where it is small a weight treats all directions alike, holds
little that is special, and can learn with little forgotten.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from trimtab.formats import weights

__all__ = ["KappaTuneSelector", "find_kappa_target_modules"]

EXPERTS = (".gate_up_proj", ".down_proj", ".gate_proj", ".up_proj")  # what stacks of experts are called
LARGEST = 16384  # of the sides of a matrix whose singular values are looked at


class KappaTuneSelector:
    """The condition numbers of a model's linear layers and stacks of experts, and the targets with the smallest.

    Args:
        model: a base model.
        max_dim_size_to_analyze: weights with a longer side are left out.
        moe_param_suffixes: the endings of the names of parameters (experts, out, in).
        show_progress: print a progress bar.
    """

    def __init__(
        self,
        model: nn.Module,
        max_dim_size_to_analyze: int = LARGEST,
        moe_param_suffixes: tuple[str, ...] | None = None,
        show_progress: bool = True,
    ) -> None:
        self.model, self.max_dim_size_to_analyze, self.show_progress = model, max_dim_size_to_analyze, show_progress
        self.moe_param_suffixes = EXPERTS if moe_param_suffixes is None else tuple(moe_param_suffixes)
        self._condition_numbers: dict[str, float] | None = None  # {path of a linear layer: kappa}
        self._parameter_condition_numbers: dict[str, float] | None = None  # of stacks: the mean of the experts'

    def get_best_targets(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """Linear layers, smallest kappa first: all, a share (at least one), so many, or those up to `threshold`."""
        self._compute_kappas()
        return _best(self._condition_numbers or {}, top_p, num_modules, threshold)

    def get_best_target_parameters(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """The same of the stacks of experts."""
        self._compute_kappas()
        return _best(self._parameter_condition_numbers or {}, top_p, num_modules, threshold)

    def _compute_kappas(self) -> None:
        """Measure, once."""
        if self._condition_numbers is not None:
            return
        from rich.console import Console
        from rich.progress import track

        model, suffixes, largest = self.model, self.moe_param_suffixes, self.max_dim_size_to_analyze
        linear = {n: m for n, m in model.named_modules() if n and isinstance(m, nn.Linear)}
        stacks = {n: p for n, p in model.named_parameters() if p.ndim == 3 and f".{n}".endswith(suffixes)}
        layers: dict[str, float] = {}
        experts: dict[str, float] = {}
        names = track(
            [*linear, *stacks], "Condition numbers", console=Console(stderr=True), disable=not self.show_progress
        )
        for name in names:
            W = weights.read(linear[name], linear[name].weight) if name in linear else stacks[name]
            if max(W.shape[-2:]) <= largest:
                (layers if name in linear else experts)[name] = _kappa(W)
        self._condition_numbers, self._parameter_condition_numbers = layers, experts


def find_kappa_target_modules(
    model: nn.Module,
    top_p: float = 0.2,
    max_dim_size_to_analyze: int = LARGEST,
    moe_param_suffixes: tuple[str, ...] | None = None,
    show_progress: bool = True,
) -> dict[str, list[str] | None]:
    """{"target_modules", "target_parameters"} of a config: the share `top_p` of each with the smallest kappas.

    `target_parameters` is None where the model has no stack of experts. The arguments are those of the selector.
    """
    selector = KappaTuneSelector(model, max_dim_size_to_analyze, moe_param_suffixes, show_progress)
    parameters = selector.get_best_target_parameters(top_p)
    return {"target_modules": selector.get_best_targets(top_p), "target_parameters": parameters or None}


@torch.no_grad()
def _kappa(W: Tensor) -> float:
    """The mean of the condition numbers of W (..., out, in); infinite where one is singular."""
    values = torch.linalg.svdvals(W.detach().float())  # (..., min(out, in))
    kappa = float((values[..., 0] / values[..., -1]).mean())
    return kappa if math.isfinite(kappa) else math.inf


def _best(kappas: dict[str, float], share: float | None, count: int | None, threshold: float | None) -> list[str]:
    names = sorted(kappas, key=lambda name: kappas[name])
    if threshold is not None:
        names = [name for name in names if kappas[name] <= threshold]
    if share is not None:
        count = max(1, int(share * len(kappas)))
    return names if count is None else names[:count]
