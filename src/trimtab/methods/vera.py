"""VeRA (Kopiczko et al. 2023, https://arxiv.org/abs/2310.11454, eq. 2).   W' = W + diag(b) B diag(d) A.

A and B are random, never trained, and kept once, as large as the largest layer needs: every layer takes the first
columns of A and the first rows of B.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from trimtab.core.architectures import ATTENTION
from trimtab.core.config import LayerConfig, PeftType, help_field
from trimtab.core.families import one_projection, wide
from trimtab.core.method import Call, Leaf, Leaves, Method, require_rank
from trimtab.core.report import warn
from trimtab.core.site import Site


@dataclass
class VeraConfig(LayerConfig):
    """The configuration of a VeRA adapter."""

    r: int = help_field("The rank; as the projections are not trained, it can be large.", 256)
    projection_prng_key: int = help_field("The seed that A and B are drawn from.", 0)
    save_projection: bool = help_field("Keep A and B in the file; else they are drawn again on load.", True)
    vera_dropout: float = help_field("Dropout on the adapter's input, in training.", 0.0)
    d_initial: float = help_field("What d starts from.", 0.1)
    fan_in_fan_out: bool = help_field("The weight is stored (in, out), as in GPT-2; found out by itself.", False)
    bias: str = help_field("Which biases of the base are trained too: none, all or vera_only.", "none")
    init_weights: bool = help_field("Start from b = 0; else from b = 1 and a random d.", True)

    exclude_modules: ClassVar[None] = None  # type: ignore[misc]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.VERA
        if not self.save_projection:
            warn(
                "Specified to not save vera_A and vera_B within the state dictionary, instead they will be restored "
                "using the PRNG key stored in `config.projection_prng_key`.",
                UserWarning,
            )


class Vera(Method):
    """Two vectors a layer, d (r,) and b (out,), between two projections that an adapter keeps once."""

    when = "ten times fewer parameters than LoRA"
    config, prefix = VeraConfig, "vera_lambda_"
    kinds = fused = frozenset({"linear"})
    targets = {**ATTENTION, "phi": ["q_proj", "v_proj"]}

    @classmethod
    def leaves(cls, site: Site, config: Any, shared: Leaves) -> Leaves:
        return {
            "vera_lambda_b": Leaf((site.fan_out,)),  # (out,)
            "vera_lambda_d": Leaf((config.r,)),  # (r,)
        }

    def reset(self, config: Any) -> None:
        if config.init_weights:
            self.vera_lambda_b.zero_()
            self.vera_lambda_d.fill_(config.d_initial)
        else:
            self.vera_lambda_b.fill_(1)
            self.vera_lambda_d.normal_()

    @classmethod
    def admit(cls, config: Any, others: list[Any]) -> None:
        one_projection(config, others, "Vera", "VeRA")

    @classmethod
    def share(cls, config: Any, sites: Sequence[Site]) -> Leaves:
        require_rank(config.r)
        kept = config.save_projection
        widest, tallest = max(s.fan_in for s in sites), max(s.fan_out for s in sites)
        return {
            "vera_A": Leaf((config.r, widest), train=False, file=kept, buffer=True),  # (r, max in)
            "vera_B": Leaf((tallest, config.r), train=False, file=kept, buffer=True),  # (max out, r)
        }

    @classmethod
    def start_shared(cls, config: Any, sites: Sequence[Site], shared: Mapping[str, Tensor]) -> None:
        generator = torch.Generator().manual_seed(config.projection_prng_key)
        for name in ("vera_A", "vera_B"):
            bound = (6 / shared[name].shape[1]) ** 0.5  # Kaiming, for a variance of 2 / fan-in
            drawn = torch.empty(shared[name].shape).uniform_(-bound, bound, generator=generator)
            shared[name].copy_(drawn.to(sites[0].dtype))  # as exact as the base's own numbers, as PEFT draws them

    @property
    def projections(self) -> tuple[Tensor, Tensor]:
        """(A (r, in), B (out, r)) of this layer."""
        return self.shared("vera_A")[:, : self.site.fan_in], self.shared("vera_B")[: self.site.fan_out]

    def weight(self, W: Tensor) -> Tensor:
        A, B = self.projections
        b, d = wide(self.vera_lambda_b), wide(self.vera_lambda_d)
        return W + (b[:, None] * wide(B)) @ (d[:, None] * wide(A))

    def after(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        A, B = self.projections
        x = call.drop(self, x, self.options.vera_dropout)
        h = self.vera_lambda_d.to(x.dtype) * self.site.apply(x, A.to(x.dtype))
        return y + self.vera_lambda_b.to(x.dtype) * self.site.mix(h, B.to(x.dtype))
