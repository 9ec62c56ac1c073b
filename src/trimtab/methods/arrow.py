"""Arrow (Ostapenko et al. 2024, https://arxiv.org/abs/2405.11157, section 4).   y' = y + Σ_t w_t s_t B_t A_t x.

A router without weights of its own over LoRA adapters t of other names: a token x goes to the k of them whose direction
p_t it has most of, w = softmax(|p_t · x| / temperature) over these. p_t, the right singular vector of the largest
singular value of B_t A_t, is what the adapter answers to most. General knowledge can be taken out of the adapters first
(GenKnowSub, Bagherifard et al. 2025, https://arxiv.org/abs/2505.10939): their A and B less the means of those of
general adapters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.core.config import help_field
from trimtab.core.families import LowRank, wide
from trimtab.core.method import Call, Leaves, no_weight
from trimtab.core.site import Site
from trimtab.errors import AdapterNameError, ConfigError
from trimtab.init import start


@dataclass
class ArrowConfig:
    """Settings of Arrow."""

    top_k: int = help_field("How many adapters a token goes to.", 3)
    router_temperature: float = help_field("The softmax's temperature.", 1.0)
    use_gks: bool = help_field("Take the general adapters' mean out of the others.", False)
    task_adapter_names: list[str] | None = help_field("The adapters to choose among.", None)
    gks_adapter_names: list[str] | None = help_field("The general adapters.", None)
    rng_seed: int | None = help_field("PEFT's seed for approximate singular vectors; here they are exact.", None)

    def __post_init__(self) -> None:
        for name in ("top_k", "router_temperature"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"`{name}` should be positive, got {getattr(self, name)}.")


class Arrow(LowRank):
    """The choice among adapters at a layer; its own pair is for its file alone, as PEFT's is."""

    when = "a library of LoRA adapters, without training a router"
    example = {"arrow_config": {}}
    prefix = "lora_"
    kinds = fused = frozenset({"linear"})
    mergeable = False

    @classmethod
    def leaves(cls, site: Site, config: Any, shared: Leaves) -> Leaves:
        return cls.pair(site, config.r, config.lora_bias)

    def setup(self, config: Any) -> None:
        self.scale(config.r, config.lora_alpha, config.scaling(), 0.0)
        self.kept: Any = None  # what the directions were found for, and they

    def reset(self, config: Any) -> Tensor | None:
        return start(True, self)

    def weight(self, W: Tensor) -> Tensor:
        raise no_weight(self)

    def others(self, names: list[str] | None) -> list[Any]:
        """The methods here of other adapters."""
        known = self.layer.board.residents.adapters
        if lacking := [name for name in names or () if name not in known]:
            raise AdapterNameError(f"Arrow routes among adapters that are not there: {lacking}. Known: {list(known)}.")
        for name in names or ():
            if name not in self.layer.methods:
                self.layer.bring(name)
        return [m for name in names or () for m in self.layer.methods.get(name, ())]

    def tasks(self) -> tuple[Tensor, list[tuple[Tensor, Tensor, float]]]:
        """(The directions (adapters, in), and A, B and scale of each adapter)."""
        own = self.options.arrow_config
        chosen, general = self.others(own.task_adapter_names), self.others(own.gks_adapter_names) if own.use_gks else []
        parts = [t for m in (*chosen, *general) for t in m.factors]
        stamp = [(t.data_ptr(), t._version) for t in parts], [m.scaling for m in chosen]
        if self.kept is None or self.kept[0] != stamp:
            with torch.no_grad():
                pairs = [m.factors for m in chosen]
                if general:
                    A, B = (torch.stack(side).mean(0) for side in zip(*[m.factors for m in general], strict=True))
                    pairs = [(a - A, b - B) for a, b in pairs]
                found = [direction(a, b) for a, b in pairs]
                scaled = [(a, b, m.scaling) for (a, b), m in zip(pairs, chosen, strict=True)]
                self.kept = stamp, (torch.stack(found) if found else None, scaled)
        directions, scaled = self.kept[1]
        return directions, scaled

    def after(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        own, (directions, tasks) = self.options.arrow_config, self.tasks()
        if not tasks:
            return y
        w = shares(x, directions.to(x.dtype), own.top_k, own.router_temperature)
        for i, (A, B, scale) in enumerate(tasks):
            h = self.site.apply(x, A.to(x.dtype)) * (w[..., i : i + 1] * scale)
            y = self.site.add(y, h, B.to(x.dtype))
        return y


def direction(A: Tensor, B: Tensor) -> Tensor:
    """The right singular vector (in,) of the largest singular value of B A."""
    return torch.linalg.svd(wide(B) @ wide(A), full_matrices=False).Vh[0]


def shares(x: Tensor, directions: Tensor, k: int, temperature: float) -> Tensor:
    """How much of each adapter each token takes (..., adapters), by its directions (adapters, in)."""
    match = (x @ directions.T).abs()
    best = match.topk(min(k, len(directions)), -1)
    return torch.zeros_like(match).scatter(-1, best.indices, torch.softmax(best.values / temperature, -1))
