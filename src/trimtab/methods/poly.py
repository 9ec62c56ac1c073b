"""Poly (Ponti et al. 2022, https://arxiv.org/abs/2202.13914, eq. 2).   W' = W + (Σ_s z_s B_s) (Σ_s z_s A_s) / r.

Each layer has an inventory of skills; a router says how much of each a task uses. A call says its rows' tasks by
`task_ids`. With several splits (Caccia et al. 2022, https://arxiv.org/abs/2211.03831) each part of the input's and of
the output's features has skills and a router of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from trimtab.core.architectures import ATTENTION
from trimtab.core.config import LayerConfig, PeftType, help_field
from trimtab.core.families import wide
from trimtab.core.method import Call, Leaf, Leaves, Method, require_rank
from trimtab.core.site import Site
from trimtab.errors import ConfigError, RouteError

LEAST = 1e-12


@dataclass
class PolyConfig(LayerConfig):
    """The configuration of a Poly adapter."""

    r: int = help_field("The rank of each skill.", 8)
    init_weights: bool = help_field("Start as the identity; False starts B at random.", True)
    poly_type: Literal["poly"] = help_field("Only poly.", "poly")
    n_tasks: int = help_field("The number of tasks.", 1)
    n_skills: int = help_field("The number of skills.", 4)
    n_splits: int = help_field("In how many parts features are cut, each with skills of its own.", 1)

    layers_to_transform: ClassVar[None] = None  # type: ignore[misc]
    layers_pattern: ClassVar[None] = None  # type: ignore[misc]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.POLY
        for name in ("n_tasks", "n_skills", "n_splits"):
            require_rank(getattr(self, name), name)


class Poly(Method):
    """A (splits, skills, in / splits, r), B (splits, skills, r, out / splits), logits (tasks, splits · skills)."""

    when = "several tasks with skills in common"
    config, prefix, extras = PolyConfig, "poly_", ("task_ids",)
    settings = ("r", "n_tasks", "n_skills", "n_splits", "poly_type")
    kinds = fused = frozenset({"linear"})
    targets = ATTENTION

    @classmethod
    def leaves(cls, site: Site, config: Any, shared: Leaves) -> Leaves:
        require_rank(config.r)
        splits, skills, r = config.n_splits, config.n_skills, config.r
        if site.fan_in % splits or site.fan_out % splits:
            raise ConfigError(
                f"`n_splits`={splits} does not divide the features of '{site.name}' ({site.fan_in} in, "
                f"{site.fan_out} out)."
            )
        return {
            "poly_lora_A": Leaf((splits, skills, site.fan_in // splits, r)),  # (n_splits, n_skills, in / n_splits, r)
            "poly_lora_B": Leaf((splits, skills, r, site.fan_out // splits)),  # (n_splits, n_skills, r, out / n_splits)
            "poly_router.module_logits": Leaf((config.n_tasks, splits * skills)),  # (n_tasks, n_splits · n_skills)
        }

    def setup(self, config: Any) -> None:
        self.r = config.r
        self.mergeable = config.n_tasks == 1  # several tasks have several weights

    def reset(self, config: Any) -> None:
        for factor, zero in ((self.poly_lora_A, False), (self.poly_lora_B, config.init_weights)):
            for skill in (part for skills in factor.unbind(1) for part in skills.unbind(0)):
                if zero:
                    skill.zero_()
                else:
                    skill.copy_(nn.init.kaiming_uniform_(torch.empty(skill.shape[::-1]), a=5**0.5).mT)
        self.poly_router_module_logits.uniform_(-1e-3, 1e-3)

    def pair(self, call: Call, rows: int) -> tuple[Tensor, Tensor]:
        """(A (rows, in, r), B (rows, r, out)), mixed for each row's task."""
        z = self._skills(call, rows).to(self.poly_lora_A.dtype)  # (rows, splits, skills)
        A = torch.einsum("bqs,qsir->bqir", z, self.poly_lora_A).flatten(1, 2)
        B = torch.einsum("bqs,qsro->brqo", z, self.poly_lora_B).flatten(2, 3)
        return A, B

    def _skills(self, call: Call, rows: int) -> Tensor:
        """How much of each skill each row uses; in training with the noise of a relaxed Bernoulli variable."""
        logits, tasks = self.poly_router_module_logits, call.extras.get("task_ids")
        if tasks is None:
            if self.options.n_tasks > 1:
                raise ValueError("task_ids should not be None: say the task of each row, model(..., task_ids=tensor).")
            tasks = [0] * rows
        tasks = torch.as_tensor(tasks, device=logits.device)
        if rows % len(tasks):
            raise RouteError(f"'{self.site.name}' sees {rows} rows, which {len(tasks)} `task_ids` do not divide.")
        tasks = tasks.repeat_interleave(rows // len(tasks))
        logits = logits.unflatten(1, (self.options.n_splits, -1))[tasks]
        return shares(logits, self._noise(call, logits) if self.training else None)

    def _noise(self, call: Call, like: Tensor) -> Tensor:
        """Uniform numbers, a row's its own."""
        if torch.compiler.is_compiling():
            return torch.rand_like(like)
        names = range(len(like)) if call.keys is None or len(call.keys) != len(like) else call.keys
        draws = [call.generator(self, f"skills/{name}", like.device) for name in names]
        return torch.stack([torch.rand(x.shape, generator=g, device=x.device) for x, g in zip(like, draws)]).to(like)

    def weight(self, W: Tensor) -> Tensor:
        A, B = self.pair(Call(), 1)
        return W + (wide(A[0]) @ wide(B[0])).mT / self.r

    def after(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        lengths = call.lengths
        A, B = (M.to(x.dtype) for M in self.pair(call, len(x) if lengths is None else len(lengths)))
        if lengths is None:
            h = (x.reshape(len(x), -1, x.shape[-1]) @ A @ B).reshape(y.shape)
        else:  # rows one after another
            parts = x.flatten(0, -2).split(list(lengths))
            h = torch.cat([part @ a @ b for part, a, b in zip(parts, A, B)]).reshape(y.shape)
        return y + h / self.r


def shares(logits: Tensor, noise: Tensor | None = None) -> Tensor:
    """How much of each skill (..., skills) logits give; with uniform noise, as relaxed Bernoulli variables."""
    z = (logits if noise is None else logits + torch.logit(noise, eps=torch.finfo(logits.dtype).eps)).sigmoid()
    return z / (z.sum(-1, keepdim=True) + LEAST)
