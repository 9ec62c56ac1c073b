"""PVeRA (Fillioux et al. 2025, https://arxiv.org/abs/2512.07703).   y += diag(b) B z, z ~ N(d_μ A_μ x, exp(d_σ A_σ x)).

In training z is drawn anew for every token; else it is its mean, so that W' = W + diag(b) B diag(d_μ) A_μ, which is
also what is merged. A = (A_μ, A_σ) and B are random, never trained, and kept once, as VeRA's are.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from trimtab.core.architectures import ATTENTION
from trimtab.core.config import LayerConfig, PeftType, help_field
from trimtab.core.dropout import mixed
from trimtab.core.families import one_projection, wide
from trimtab.core.method import Call, Leaf, Leaves, Method, require_rank
from trimtab.core.report import warn
from trimtab.core.site import Site


@dataclass
class PveraConfig(LayerConfig):
    """The configuration of a PVeRA adapter."""

    r: int = help_field("The rank; as the projections are not trained, it can be large.", 256)
    projection_prng_key: int = help_field("The seed that A and B are drawn from.", 0)
    save_projection: bool = help_field("Keep A and B in the file; else they are drawn again on load.", True)
    pvera_dropout: float = help_field("Dropout on the adapter's input, in training.", 0.0)
    d_initial: float = help_field("What d starts from.", 0.1)
    fan_in_fan_out: bool = help_field("The weight is stored (in, out), as in GPT-2; found out by itself.", False)
    bias: str = help_field("Which biases of the base are trained too: none, all or pvera_only.", "none")
    init_weights: bool = help_field("Start from b = 0; else from b = 1 and a random d.", True)
    sample_at_inference: bool = help_field("Draw z in evaluation too, instead of taking its mean.", False)
    generator_seed: int | None = help_field("The seed of what is drawn in evaluation; None: torch's own state.", None)

    exclude_modules: ClassVar[None] = None  # type: ignore[misc]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.PVERA
        if not self.save_projection:
            warn(
                "Specified to not save pvera_A and pvera_B within the state dictionary, instead they will be restored "
                "using the PRNG key stored in `config.projection_prng_key`.",
                UserWarning,
            )


class Pvera(Method):
    """Two vectors a layer, d (2 r,) and b (out,), between two projections, with a random state of r in the middle."""

    when = "VeRA with a measure of its own uncertainty"
    config, prefix = PveraConfig, "pvera_lambda_"
    kinds = fused = frozenset({"linear"})
    targets = {**ATTENTION, "phi": ["q_proj", "v_proj"], "dinov2": ["query", "value"]}

    @classmethod
    def leaves(cls, site: Site, config: Any, shared: Leaves) -> Leaves:
        leaves = {
            "pvera_lambda_b": Leaf((site.fan_out,)),  # (out,)
            "pvera_lambda_d": Leaf((2 * config.r,)),  # (2 · r,)
        }
        if config.generator_seed is not None:  # how many samples were drawn with it
            leaves["pvera_drawn"] = Leaf((), train=False, file=False, state=True, dtype=torch.int64)  # ()
        return leaves

    def setup(self, config: Any) -> None:
        self.r = config.r

    def reset(self, config: Any) -> None:
        if config.init_weights:
            self.pvera_lambda_b.zero_()
            self.pvera_lambda_d.fill_(config.d_initial)
        else:
            self.pvera_lambda_b.fill_(1)
            self.pvera_lambda_d.normal_()
        if config.generator_seed is not None:
            self.pvera_drawn.zero_()

    @classmethod
    def admit(cls, config: Any, others: list[Any]) -> None:
        one_projection(config, others, "PVeRA", "PVeRA")

    @classmethod
    def share(cls, config: Any, sites: Sequence[Site]) -> Leaves:
        require_rank(config.r)
        kept = config.save_projection
        widest, tallest = max(s.fan_in for s in sites), max(s.fan_out for s in sites)
        return {
            "pvera_A": Leaf((2 * config.r, widest), train=False, file=kept, buffer=True),  # (2 · r, max in)
            "pvera_B": Leaf((tallest, config.r), train=False, file=kept, buffer=True),  # (max out, r)
        }

    @classmethod
    def start_shared(cls, config: Any, sites: Sequence[Site], shared: Mapping[str, Tensor]) -> None:
        generator = torch.Generator().manual_seed(config.projection_prng_key)
        for name in ("pvera_A", "pvera_B"):
            bound = (6 / shared[name].shape[1]) ** 0.5  # Kaiming, for a variance of 2 / fan-in
            drawn = torch.empty(shared[name].shape).uniform_(-bound, bound, generator=generator)
            shared[name].copy_(drawn.to(sites[0].dtype))  # as exact as the base's own numbers, as PEFT draws them

    @property
    def projections(self) -> tuple[Tensor, Tensor]:
        """(A (2 r, in), B (out, r)) of this layer."""
        return self.shared("pvera_A")[:, : self.site.fan_in], self.shared("pvera_B")[: self.site.fan_out]

    def weight(self, W: Tensor) -> Tensor:
        A, B = (wide(M) for M in self.projections)
        b, d = wide(self.pvera_lambda_b), wide(self.pvera_lambda_d[: self.r])
        return W + (b[:, None] * B) @ (d[:, None] * A[: self.r])

    def after(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        A, B = (M.to(x.dtype) for M in self.projections)
        x = call.drop(self, x, self.options.pvera_dropout)
        b, d = self.pvera_lambda_b.to(x.dtype), self.pvera_lambda_d.to(x.dtype)
        if self.training or self.options.sample_at_inference:
            mean, logarithm = (d * self.site.apply(x, A)).chunk(2, -1)
            z = mean + (wide(logarithm) / 2).exp().to(x.dtype) * self.noise(mean, call)
        else:
            z = d[: self.r] * self.site.apply(x, A[: self.r])
        return y + b * self.site.mix(z, B)

    def noise(self, like: Tensor, call: Call) -> Tensor:
        """Standard normal numbers, a new one for each of `like`."""
        if torch.compiler.is_compiling():  # a generator would break the graph
            return torch.randn_like(like)
        seed = self.options.generator_seed
        if self.training or seed is None:
            generator = call.generator(self, "sample", like.device)
        else:
            own = zlib.crc32(f"{self.site.name}/{int(self.pvera_drawn)}".encode())
            generator = torch.Generator(like.device).manual_seed(mixed(seed, own))
            self.pvera_drawn.add_(1)
        return torch.randn(like.shape, generator=generator, device=like.device, dtype=torch.float32).to(like.dtype)
