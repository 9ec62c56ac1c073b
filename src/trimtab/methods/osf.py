"""OSF (Nayak et al. 2025, https://arxiv.org/abs/2504.07097, section 3).   W' = W + U diag(S) V - U₀ diag(S₀) V₀.

U₀ diag(S₀) V₀ is what the smallest singular values make up of W. Gradients of U and V are projected off W's largest
singular directions, which earlier tasks live in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trimtab.core.config import LayerConfig, PeftType, help_field, match_pattern
from trimtab.core.families import wide
from trimtab.core.method import Call, Leaf, Leaves, Method
from trimtab.core.site import Site
from trimtab.errors import ConfigError

LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj")
TARGETS = {
    **dict.fromkeys("llama llama4 mistral mixtral gemma gemma2 gemma3_text qwen2 qwen3 phi".split(), LLAMA),
    **dict.fromkeys(["gpt2", "gpt_bigcode"], ("c_attn", "c_proj")),
    **dict.fromkeys(["bloom", "gpt_neox", "falcon"], ("query_key_value", "dense_4h_to_h")),
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "gptj": ["q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"],
}


@dataclass
class OSFConfig(LayerConfig):
    """The configuration of an OSF adapter."""

    effective_rank: int | float | None = help_field(
        "How many of the largest singular directions stay as they are: a number, a share of them, or None for half.",
        None,
    )
    rank_pattern: dict[str, int | float] | None = help_field(
        "Module name or regular expression -> its own effective rank.", None
    )
    init_weights: bool | None = help_field("Start from the base's own values; else random.", True)
    target_svd_config: dict[str, int] | None = help_field("Kept for the file; it does not act.", None)

    exclude_modules: ClassVar[None] = None  # type: ignore[misc]
    layers_to_transform: ClassVar[None] = None  # type: ignore[misc]
    layers_pattern: ClassVar[None] = None  # type: ignore[misc]
    sets: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.OSF

    def resolve(self, name: str) -> OSFConfig:
        """This config with the rank that the pattern gives the module `name`."""
        own, patterns = self.shallow(), self.rank_pattern or {}
        own.effective_rank = patterns.get(match_pattern(patterns, name) or "", self.effective_rank)
        return own


class OSF(Method):
    """The smallest singular values and their vectors, trained at right angles to the rest."""

    when = "continual learning: what was learnt is to stay; large files"
    config, prefix, targets = OSFConfig, "osf_", TARGETS
    kinds = fused = frozenset({"linear", "conv", "embedding"})

    @classmethod
    def leaves(cls, site: Site, config: Any, shared: Leaves) -> Leaves:
        out, into, high = site.fan_out, site.fan_in, kept(site, config)
        r = min(out, into) - high
        shapes = {"U_low": (out, r), "S_low": (r,), "V_low": (r, into)}  # (out, r), (r,), (r, in)
        frozen = lambda shape: Leaf(shape, train=False, file=False, buffer=True)  # (...)
        # Of the longer side; the shorter one's complement is what U₀ or V₀ spans.
        longer = {"_osf_V_high": (high, into)} if into > out else {"_osf_U_high": (out, high)} if out > into else {}
        return {
            **{f"osf_svd_params.{{}}.{name}": Leaf(shape) for name, shape in shapes.items()},  # (...)
            **{f"_osf_{name}_init": frozen(shape) for name, shape in shapes.items()},
            **{name: frozen(shape) for name, shape in longer.items()},
        }

    def reset(self, config: Any) -> None:
        high = kept(self.site, config)
        U, S, V = torch.linalg.svd(wide(self.site.matrix()), full_matrices=False)
        for name, value in (("U_low", U[:, high:]), ("S_low", S[high:]), ("V_low", V[high:])):
            self.tensor(f"_osf_{name}_init").copy_(value)
            tensor = self.tensor(f"osf_svd_params.{{}}.{name}")
            tensor.copy_(value) if config.init_weights else tensor.normal_()
        for name, value in (("_osf_U_high", U[:, :high]), ("_osf_V_high", V[:high])):
            if name in self.declared:
                self.tensor(name).copy_(value)

    def factors(self) -> tuple[Tensor, Tensor]:
        """(B (out, 2 r), A (2 r, in)) with dW = B A, in fp32 at least."""
        U, S, V = (wide(self.tensor(f"osf_svd_params.{{}}.{name}")) for name in ("U_low", "S_low", "V_low"))
        U0, S0, V0 = (wide(self.tensor(f"_osf_{name}_init")) for name in ("U_low", "S_low", "V_low"))
        if "_osf_U_high" in self.declared:
            U = _Projected.apply(U, wide(self.tensor("_osf_U_high")), True)
        else:
            U = _Projected.apply(U, U0, False)
        if "_osf_V_high" in self.declared:
            V = _Projected.apply(V.mT, wide(self.tensor("_osf_V_high")).mT, True).mT
        else:
            V = _Projected.apply(V.mT, V0.mT, False).mT
        return torch.cat([U * S, -U0 * S0], 1), torch.cat([V, V0])

    def weight(self, W: Tensor) -> Tensor:
        B, A = self.factors()
        return W + B @ A

    def after(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        B, A = self.factors()
        return self.site.add(y, self.site.apply(x, A.to(y.dtype)), B.to(y.dtype))


class _Projected(torch.autograd.Function):
    """M (n, r) as it is; its gradient projected onto the columns of `basis` (n, k), or off them."""

    @staticmethod
    def forward(ctx: Any, M: Tensor, basis: Tensor, off: bool) -> Tensor:
        ctx.save_for_backward(basis)
        ctx.off = off
        return M.view_as(M)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        (basis,) = ctx.saved_tensors
        rest = projected_off(gradient, basis)
        return rest if ctx.off else gradient - rest, None, None


def projected_off(M: Tensor, basis: Tensor) -> Tensor:
    """What of M (n, r) is at right angles to the columns of `basis` (n, k)."""
    return M - basis @ (basis.mT @ M)


def kept(site: Site, config: Any) -> int:
    """How many singular directions of a site's weight stay as they are.

    Raises:
        ConfigError: none would.
    """
    most, given = min(site.fan_in, site.fan_out), config.effective_rank
    if given is None:
        return max(most // 2, 1)
    rank = int(given * most) if isinstance(given, float) and 0 < given <= 1 else int(given)
    if rank <= 0:
        raise ConfigError(f"`effective_rank` should be a positive integer value but the value passed is {given}")
    return min(rank, most)
