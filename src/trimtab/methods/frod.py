"""FRoD (Wan et al. 2025, https://arxiv.org/abs/2512.23485).   W' = W + U (diag(l - l₀) + S) Vᵀ,   W = U diag(l₀) Vᵀ.

V is one for all layers of a category (those of one name, such as self_attn.q_proj), found from all their weights: the
directions of a generalised singular value decomposition. l and the few entries of S are trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.core.architectures import ATTENTION
from trimtab.core.config import LayerConfig, PeftType, help_field
from trimtab.core.families import wide
from trimtab.core.method import Call, Leaf, Leaves, Method
from trimtab.core.report import warn
from trimtab.core.site import Site
from trimtab.errors import ConfigError

ZERO = 1e-5  # relative to the largest l₀: what is below is a direction that W does not have


@dataclass
class FrodConfig(LayerConfig):
    """The configuration of a FRoD adapter."""

    projection_prng_key: int = help_field("The seed that the places of S are drawn from.", 0)
    save_projection: bool = help_field("Keep V and S's places in the file; else they are found again on load.", True)
    frod_dropout: float = help_field("Dropout on the adapter's input, in training.", 0.0)
    fan_in_fan_out: bool = help_field("The weight is stored (in, out), as in GPT-2; found out by itself.", False)
    bias: str = help_field("Which biases of the base are trained too: none, all or frod_only.", "none")
    init_weights: bool = help_field("Start from W itself; else from l and S moved at random.", True)
    sparse_rate: float = help_field("The share of entries of S off its diagonal that are trained.", 0.01)
    regularization_alpha: float = help_field("What steadies the inverses that V is found by.", 1e-3)
    progressbar: bool = help_field("Kept for the file; there is no progress bar.", True)
    runtime_offload_base_weight: bool = help_field("Kept for the file; the base's weights stay where they are.", False)

    exclude_modules: ClassVar[None] = None  # type: ignore[misc]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.FROD
        if not 0 <= self.sparse_rate <= 1:
            raise ConfigError(f"`sparse_rate` should be between 0 and 1, got {self.sparse_rate}.")
        if not self.save_projection:
            warn(
                "FRoD's V will not be in the file: on load it is found again from the base's weights, which must be "
                "the same to the bit; PEFT's and ours differ in signs.",
                UserWarning,
            )
        if self.runtime_offload_base_weight:
            warn("`runtime_offload_base_weight` of FrodConfig does not act: the base's weights stay.", UserWarning)


class Frod(Method):
    """l (in,) and S's entries (n,) of one layer, between its own U and its category's V."""

    when = "full-rank updates from few parameters; slow to set up"
    config, prefix, targets = FrodConfig, "frod_", {**ATTENTION, "phi": ("q_proj", "v_proj"), "vit": ("query", "value")}
    kinds = fused = frozenset({"linear"})

    @classmethod
    def admit(cls, config: Any, others: list[Any]) -> None:
        for other in others:
            if other.projection_prng_key != config.projection_prng_key:
                raise ConfigError(
                    "FRoD projection initialization key must be the same for all adapters. Got "
                    f"{config.projection_prng_key=} but previous config had {other.projection_prng_key}."
                )
            if other.save_projection != config.save_projection:
                raise ConfigError(
                    "FRoD projection weights must be saved for all adapters or none, but got multiple different "
                    f"values: {sorted({other.save_projection, config.save_projection})}"
                )

    @classmethod
    def share(cls, config: Any, sites: Sequence[Site]) -> Leaves:
        fixed: dict[str, Any] = {"train": False, "buffer": True, "file": config.save_projection}
        found: Leaves = {}
        for name, members in categories(sites).items():
            k = members[0].fan_in
            n = entries(config, k)
            found[f"frod_V.{name}"] = Leaf((k, k), **fixed)  # (in, in)
            found[f"frod_s_indices.{name}"] = Leaf((2, n), dtype=torch.int64, **fixed)  # (2, n): rows, columns
            found[f"frod_s_size.{name}"] = Leaf((2,), dtype=torch.int64, **fixed)  # (2,)
        return found

    @classmethod
    def start_shared(cls, config: Any, sites: Sequence[Site], shared: Mapping[str, Tensor]) -> None:
        generator = torch.Generator().manual_seed(config.projection_prng_key)
        for name, members in categories(sites).items():
            V, places = shared[f"frod_V.{name}"], shared[f"frod_s_indices.{name}"]
            V.copy_(basis([site.matrix().to(V.device, torch.float64) for site in members], config.regularization_alpha))
            k = len(V)
            drawn = torch.randperm(k * (k - 1), generator=generator)[: places.shape[1]]  # of those off the diagonal
            row, column = drawn // (k - 1), drawn % (k - 1)
            places.copy_(torch.stack([row, column + (column >= row)]))
            shared[f"frod_s_size.{name}"].fill_(k)

    @classmethod
    def leaves(cls, site: Site, config: Any, shared: Leaves) -> Leaves:
        k = site.fan_in
        return {
            "frod_lambda_l": Leaf((k,)),  # (in,)
            "frod_lambda_s_values": Leaf((entries(config, k),)),  # (n,)
            "frod_U": Leaf((site.fan_out, k), train=False, file=False, buffer=True),  # (out, in)
            "frod_start": Leaf((k,), train=False, file=False, buffer=True),  # (in,): l₀
        }

    def setup(self, config: Any) -> None:
        self.category = category(self.site.name)

    def reset(self, config: Any) -> None:
        self.follow(config)
        self.frod_lambda_l.copy_(self.frod_start)
        self.frod_lambda_s_values.zero_()
        if not config.init_weights:
            for moved in (self.frod_lambda_l, self.frod_lambda_s_values):
                moved.add_(torch.randn_like(moved), alpha=0.1)

    def follow(self, config: Any) -> None:
        V = self.shared(f"frod_V.{self.category}")
        if V.is_meta:
            return
        B = torch.linalg.solve(V.double().mT, self.site.matrix().double(), left=False)  # W V⁻ᵀ
        start = B.norm(dim=0)
        start = torch.where(start > ZERO * start.max(), start, 0)
        for leaf, value in (("frod_U", torch.where(start > 0, B / start, 0)), ("frod_start", start)):
            holder, key = self.place_of(leaf)
            holder[key] = value.to(holder[key].dtype)

    @property
    def core(self) -> Tensor:
        """diag(l - l₀) + S (in, in), in fp32 at least."""
        row, column = self.shared(f"frod_s_indices.{self.category}")
        C = torch.diag(wide(self.frod_lambda_l) - wide(self.frod_start))
        return C.index_put((row, column), wide(self.frod_lambda_s_values), accumulate=True)

    def weight(self, W: Tensor) -> Tensor:
        return W + wide(self.frod_U) @ self.core @ wide(self.shared(f"frod_V.{self.category}")).mT

    def after(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        V, U = self.shared(f"frod_V.{self.category}"), self.frod_U
        x = call.drop(self, x, self.options.frod_dropout)
        h = F.linear(self.site.apply(x, V.mT.to(x.dtype)), self.core.to(x.dtype))
        return y + self.site.mix(h, U.to(x.dtype))


def category(path: str) -> str:
    """What a layer shares its V by: the last two names of its path, without numbers."""
    parts = path.split(".")
    if parts[-3:] == ["attention", "output", "dense"]:
        return "attention_output"
    return "_".join(parts[-1:] if len(parts) == 1 or parts[-2].isdigit() else parts[-2:])


def categories(sites: Sequence[Site]) -> dict[str, list[Site]]:
    """The sites of each category, in the order of their names.

    Raises:
        ConfigError: a category has layers of several widths.
    """
    found: dict[str, list[Site]] = {}
    for site in sites:
        found.setdefault(category(site.name), []).append(site)
    for name, members in found.items():
        if len(widths := {site.fan_in for site in members}) > 1:
            raise ConfigError(f"The layers '{name}' share one V, but have {sorted(widths)} inputs: target fewer.")
    return dict(sorted(found.items()))


def entries(config: Any, k: int) -> int:
    """How many entries of S (k, k) are trained."""
    return min(int(config.sparse_rate * k * k), k * (k - 1))


def basis(Ws: Sequence[Tensor], pi: float) -> Tensor:
    """V (in, in) of weights (out, in), in double precision: the same on every machine, up to rounding.

    With Σ WᵀW = RᵀR and Q = W R⁻¹ it is Rᵀ Z, the columns of Z the eigenvectors of the mean of (QᵀQ + π)⁻¹. Their
    signs make each one's largest entry positive.
    """
    total = sum((W.mT @ W for W in Ws), torch.zeros_like(Ws[0].mT @ Ws[0]))
    unit = torch.eye(len(total), dtype=total.dtype, device=total.device)
    values, vectors = torch.linalg.eigh(total)
    lacking = vectors[:, values <= 1e-10 * values[-1]]  # directions that no layer has: any length will do
    R = torch.linalg.cholesky(total + values.mean().clamp_min(1e-30) * lacking @ lacking.mT).mT
    Qs = [torch.linalg.solve_triangular(R, W, upper=True, left=False) for W in Ws]
    mean = sum((torch.linalg.inv(Q.mT @ Q + pi * unit) for Q in Qs), torch.zeros_like(unit)) / len(Qs)
    Z = torch.linalg.eigh(mean).eigenvectors
    Z = Z * Z.gather(0, Z.abs().argmax(0, keepdim=True)).sign()
    return R.mT @ Z
