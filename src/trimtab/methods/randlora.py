"""RandLoRA (Albert et al. 2025, https://arxiv.org/abs/2502.00987).   W' = W + s Σ_i B_i diag(λ_i) A diag(γ_i).

s = alpha / r. A and the B_i are random, never trained, and kept once, as large as the largest layer needs. There are
min(in, out) / r terms: the sum has full rank. A layer with in > out takes its transpose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from trimtab.core.architectures import ATTENTION
from trimtab.core.config import LayerConfig, PeftType, help_field
from trimtab.core.families import Delta, one_projection, wide
from trimtab.core.kernels import delta_linear
from trimtab.core.method import Call, Leaf, Leaves, require_rank
from trimtab.core.report import warn
from trimtab.core.site import Site


@dataclass
class RandLoraConfig(LayerConfig):
    """The configuration of a RandLoRA adapter."""

    r: int = help_field("The rank of one random base; fewer parameters the higher it is.", 32)
    projection_prng_key: int = help_field("The seed that the bases are drawn from.", 0)
    save_projection: bool = help_field("Keep the bases in the file; else they are drawn again on load.", True)
    sparse: bool = help_field("Bases of -1, 0 and 1, two thirds of them 0.", False)
    very_sparse: bool = help_field("Bases of -1, 0 and 1, a share of 1 / sqrt(d) of them not 0.", False)
    randlora_dropout: float = help_field("Dropout on the adapter's input, in training.", 0.0)
    fan_in_fan_out: bool = help_field("The weight is stored (in, out), as in GPT-2; found out by itself.", False)
    randlora_alpha: float = help_field("The scale is randlora_alpha / r; 20 r is usual.", 640)
    bias: str = help_field("Which biases of the base are trained too: none, all or randlora_only.", "none")
    init_weights: bool = help_field("Start from λ = 0; else from random λ.", True)

    exclude_modules: ClassVar[None] = None  # type: ignore[misc]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.RANDLORA
        if not self.save_projection:
            warn(
                "Specified to not save basis_A and basis_B within the state dictionary, instead they will be restored "
                "using the PRNG key stored in `config.projection_prng_key`.",
                UserWarning,
            )


class RandLora(Delta):
    """Scales λ (r, n) and γ (n, d) of n random products of rank r."""

    when = "full-rank updates at LoRA's size"
    config, prefix, targets = RandLoraConfig, "randlora_", ATTENTION
    kinds = fused = frozenset({"linear"})
    views = ("r", "scaling")
    weight, dropped = Delta.summed, "randlora_dropout"

    @classmethod
    def leaves(cls, site: Site, config: Any, shared: Leaves) -> Leaves:
        require_rank(config.r)
        d = min(site.fan_in, site.fan_out)
        n = -(-d // config.r)
        return {
            "randlora_lambda": Leaf((config.r, n)),  # (r, n)
            "randlora_gamma": Leaf((n, d)),  # (n, d)
        }

    def setup(self, config: Any) -> None:
        self.r, self.scaling = config.r, config.randlora_alpha / config.r
        self.unit = self.scaling  # what `set_scale` multiplies

    def reset(self, config: Any) -> None:
        if config.init_weights:
            self.randlora_lambda.zero_()
            self.randlora_gamma.fill_(1 / min(self.site.fan_in, self.site.fan_out))
        else:
            self.randlora_lambda.normal_()
            self.randlora_gamma.fill_(1 / max(self.site.fan_in, self.site.fan_out))

    @classmethod
    def admit(cls, config: Any, others: list[Any]) -> None:
        one_projection(config, others, "RandLora", "RandLora")

    @classmethod
    def share(cls, config: Any, sites: Sequence[Site]) -> Leaves:
        require_rank(config.r)
        kept = config.save_projection
        narrow, broad = sorted((max(s.fan_in for s in sites), max(s.fan_out for s in sites)))
        n = -(-narrow // config.r)
        return {
            "randlora_A": Leaf((config.r, 1, narrow), train=False, file=kept, buffer=True),  # (r, 1, max d)
            "randlora_B": Leaf((broad, n, config.r), train=False, file=kept, buffer=True),  # (max side, max n, r)
        }

    @classmethod
    def start_shared(cls, config: Any, sites: Sequence[Site], shared: Mapping[str, Tensor]) -> None:
        generator = torch.Generator().manual_seed(config.projection_prng_key)
        A, B = shared["randlora_A"], shared["randlora_B"]
        if config.sparse or config.very_sparse:
            share = A.shape[-1] ** -0.5 if config.very_sparse else 1 / 3
            drawn = [torch.empty(M.shape).uniform_(generator=generator) for M in (A, B)]
            drawn = [(u > 1 - share / 2).float() - (u < share / 2).float() for u in drawn]
        else:  # in bf16 and in this order, as PEFT draws them: the bases of a file that has none must be the same
            drawn = []
            for shape in (A.shape, (B.shape[1], B.shape[0], B.shape[2])):
                bound = shape[-1] ** -0.5
                drawn.append(torch.empty(shape, dtype=torch.bfloat16).uniform_(-bound, bound, generator=generator))
            drawn[1] = drawn[1].transpose(0, 1)
        for M, u in zip((A, B), drawn, strict=True):
            M.copy_(u / u.std())

    @property
    def tall(self) -> bool:
        """Whether the outputs are no fewer than the inputs; else the product is transposed."""
        return self.site.fan_out >= self.site.fan_in

    def scaled(self, lam: Tensor, gamma: Tensor, A: Tensor) -> Tensor:
        """s diag(λ) A diag(γ) of all terms (r n, d), or its transpose (d, r n), in fp32 at least."""
        scales = (self.scaling * wide(lam))[:, :, None] * wide(gamma)
        M = scales.mul_(wide(A[:, :, : gamma.shape[1]])).flatten(0, 1)  # in place: as large as the weight
        return M if self.tall else M.T

    def bases(self, B: Tensor) -> Tensor:
        """All B_i side by side (out, r n), or their transpose (r n, in), in fp32 at least."""
        (r, n), side = self.randlora_lambda.shape, max(self.site.fan_in, self.site.fan_out)
        M = wide(B[:side, :n].reshape(side, r * n))
        return M if self.tall else M.T

    def form(self, *tensors: Tensor) -> Tensor:
        """The change (out, in), in fp32 at least."""
        S, M = self.scaled(*tensors[:3]), self.bases(tensors[3])
        return M @ S if self.tall else S @ M

    @property
    def sources(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the change is formed from."""
        return self.randlora_lambda, self.randlora_gamma, self.shared("randlora_A"), self.shared("randlora_B")

    def few(self, x: Tensor) -> bool:
        """Whether fewer products are needed by way of U and D than to form their product."""
        return x.numel() <= x.shape[-1] * min(self.site.fan_in, self.site.fan_out)

    def through(self, x: Tensor, call: Call) -> Tensor | None:
        return None if self.few(x) else self.joined(x, call)

    def after(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        if not self.few(x):
            return self.added(y, x, call)
        x = call.drop(self, x, self.rate)
        *own, B = self.sources
        if self.site.widens(x):  # both factors stay in fp32
            S, M = self.scaled(*own), self.bases(B)
            D, U = (S, M) if self.tall else (M, S)
            return self.site.add(y, self.site.apply(x, D), U)
        M = self.bases(B).to(x.dtype)  # of the other, which is trained, nothing is kept
        if self.tall:
            return self.site.add(y, delta_linear(x, None, None, self.scaled, *own), M)
        return y + delta_linear(self.site.apply(x, M), None, None, self.scaled, *own)
