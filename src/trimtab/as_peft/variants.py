"""Modules that hold a part of LoRA's variants in peft, on trimtab's formulas: DoRA, BD-LoRA, VeLoRA, Arrow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.core.families import wide
from trimtab.core.site import Site, site_class
from trimtab.layer.adapted import AdaptedLayer
from trimtab.layer.plan import Board
from trimtab.methods.arrow import direction, shares
from trimtab.methods.bdlora import diagonal
from trimtab.methods.dora import norm_of
from trimtab.methods.velora import rebuilding, subtokens

ROUTER = "arrow_router"

__all__ = [
    "ArrowLoraLinearLayer",
    "BlockDiagonalLinear",
    "DoraConv1dLayer",
    "DoraConv2dLayer",
    "DoraConv3dLayer",
    "DoraEmbeddingLayer",
    "DoraLinearLayer",
    "VeloraFunction",
]


def site_of(layer: nn.Module) -> Site:
    """A frozen layer, in no model, as a matrix.

    Raises:
        TypeError: it is of no kind that can be seen as one.
    """
    frozen = layer.frozen if isinstance(layer, AdaptedLayer) else layer
    kind = site_class(frozen)
    if kind is None:
        raise TypeError(f"{type(frozen).__name__} is no layer that can be adapted.")
    return kind(AdaptedLayer(frozen, "", Board()), "")


# ------------------------------------------------------------------ DoRA
class DoraLinearLayer(nn.Module):
    """The magnitude of one adapter and what DoRA adds to its layer's output.

    Attributes:
        weight: the magnitude m (out,), or (1, out, 1 ...) of a convolution.
    """

    weight: nn.Parameter

    def __init__(self, fan_in_fan_out: bool) -> None:
        super().__init__()
        self.fan_in_fan_out = fan_in_fan_out

    def get_weight_norm(
        self, weight: Tensor, lora_weight: Tensor, scaling: float, adapter_name: str | None = None
    ) -> Tensor:
        """||W + s dW|| of each row of W (out, ...), in W's number format; stored (in, out) if `fan_in_fan_out`."""
        W = weight.T if self.fan_in_fan_out else weight
        norm = (wide(W) + scaling * wide(lora_weight)).flatten(1).norm(dim=1).to(weight.dtype)
        return norm if W.ndim == 2 else norm.view(1, -1, *(1 for _ in W.shape[2:]))

    def get_lora_weight(self, lora_A: Any, lora_B: Any, adapter_name: str | None = None) -> Tensor:
        """B A (out, in) of two layers; of convolutions (out, channels · k)."""
        return lora_B.weight.flatten(1) @ lora_A.weight.flatten(1)  # type: ignore[no-any-return]

    @torch.no_grad()
    def update_layer(
        self, *, base_layer: nn.Module, lora_A: Tensor, lora_B: Tensor, scaling: float, place_on_cpu: bool = False
    ) -> None:
        """Start the magnitude as the norms of the layer's rows with the pair: the output does not change."""
        site = site_of(base_layer)
        m = norm_of(site.matrix(), site.lower(lora_A), site.upper(lora_B), scaling).to(site.dtype)
        self.weight = nn.Parameter((m.cpu() if place_on_cpu else m).view(site.vector()))

    def ratio(self, site: Site, A: Tensor, B: Tensor, scaling: float) -> Tensor:
        """m / ||W + s B A|| (out,), the norm a constant."""
        with torch.no_grad():
            norm = norm_of(site.matrix(), A, B, scaling)
        return (wide(self.weight).flatten() / norm).to(self.weight.dtype)

    def forward(
        self,
        x: Tensor,
        *,
        lora_A: Any,
        lora_B: Any,
        scaling: float,
        base_layer: nn.Module,
        base_result: Tensor | None = None,
        adapter_name: str = "default",
    ) -> Tensor:
        """What comes to the layer's output: (g - 1) W x + g s B A x, with g = `ratio`.

        Args:
            base_result: the layer's output, where x is what it was given; None: W x is formed, of a dropped x.
        """
        site = site_of(base_layer)
        A, B = site.lower(lora_A.weight), site.upper(lora_B.weight)
        g, b = self.ratio(site, A, B, scaling), site.bias()
        y = site.apply(x, site.matrix().to(x.dtype)) if base_result is None else base_result
        if base_result is not None and b is not None:
            y = y - site.spread(b)
        return site.spread(g - 1) * y + site.spread(g) * scaling * site.mix(site.apply(x, A), B)


class DoraEmbeddingLayer(DoraLinearLayer):
    """The same for an embedding, whose pair is given as it is looked up: A (vocabulary, r), B (r, dim)."""

    def get_lora_weight(self, lora_A: Any, lora_B: Any, adapter_name: str | None = None) -> Tensor:
        """(A B)ᵀ (dim, vocabulary)."""
        return (lora_A @ lora_B).T  # type: ignore[no-any-return]

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        *,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        base_layer: nn.Module,
        embed_fn: Any,
        adapter_name: str = "default",
    ) -> tuple[Tensor, Tensor]:
        """(g, g s B A x) for tokens x: g = `ratio` is for what the embedding itself gives."""
        g = self.ratio(site_of(base_layer), lora_A.T, lora_B.T, scaling)
        return g, g * (embed_fn(x, lora_A) @ lora_B) * scaling


class _DoraConvNdLayer(DoraLinearLayer):
    """The same for a convolution."""


class DoraConv1dLayer(_DoraConvNdLayer):
    """Of one axis."""


class DoraConv2dLayer(_DoraConvNdLayer):
    """Of two."""


class DoraConv3dLayer(_DoraConvNdLayer):
    """Of three."""


# ------------------------------------------------------------------ BD-LoRA, VeLoRA
class BlockDiagonalLinear(nn.Module):
    """A linear layer without bias whose weight is block-diagonal.

    Attributes:
        weight: its blocks, one below the other (out, in / nblocks).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        nblocks: int,
        init_zero: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        if in_features % nblocks or out_features % nblocks:
            raise ValueError(f"{in_features=} and {out_features=} should be divisible by {nblocks=}")
        self.in_features, self.out_features, self.nblocks = in_features, out_features, nblocks
        self.weight = nn.Parameter(torch.zeros(out_features, in_features // nblocks, dtype=dtype, device=device))
        if not init_zero:
            nn.init.kaiming_uniform_(self.weight)

    def weight_as_blockdiagonal_matrix(self) -> Tensor:
        """The whole weight (out, in)."""
        return diagonal(self.weight, self.nblocks)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        return F.linear(x, self.weight_as_blockdiagonal_matrix())


class VeloraFunction:
    """A linear layer that keeps of its input, for the backward pass, the projections of its groups on one vector."""

    @staticmethod
    def apply(
        input: Tensor, weight: Tensor, bias: Tensor | None, embed: Tensor, num_groups: int, velora_scale: float
    ) -> Tensor:
        """input (..., in), weight (out, in), bias (out,), embed: a unit vector (in / num_groups,) -> (..., out)."""
        v = embed.to(input.dtype)
        with torch.no_grad():
            z = subtokens(input, num_groups) @ v
        y = rebuilding(input, weight, z, v, num_groups, velora_scale)
        return y if bias is None else y + bias


# ------------------------------------------------------------------ Arrow
class ArrowLoraLinearLayer(nn.Module):
    """The choice among adapters at a linear layer.

    Attributes:
        prototypes: the adapters' directions (adapters, in), or None until they are needed.
    """

    prototypes: Tensor | None

    def __init__(self, in_features: int, arrow_config: Any) -> None:
        super().__init__()
        self.in_features, self.top_k, self.temperature = (
            in_features,
            arrow_config.top_k,
            arrow_config.router_temperature,
        )
        self.rng_seed, self.use_gks = arrow_config.rng_seed, arrow_config.use_gks
        self.task_adapter_names = list(arrow_config.task_adapter_names or ())
        self.gks_adapter_names = list(arrow_config.gks_adapter_names or ())
        self.gks_added_adapter_names: list[str] = []
        self.gks_done, self.cast_input_dtype_enabled = False, True
        self.register_buffer("prototypes", None, persistent=False)

    def on_adapter_change(self, lora_A: Mapping[str, Any], lora_B: Mapping[str, Any]) -> None:
        """Take the adapters that have come since, and forget the directions."""
        new = [n for n in lora_A if n not in self.task_adapter_names and n != ROUTER]
        self.task_adapter_names += new
        self.gks_added_adapter_names = new
        self.prototypes = None

    def top_right_singular_vec_from_BA(self, A: Tensor, B: Tensor, iters: int = 15, eps: float = 1e-8) -> Tensor:
        """The first right singular vector (in,) of B A; exact: there is nothing to iterate."""
        return direction(A, B)

    @torch.no_grad()
    def build_prototypes(self, lora_A: Mapping[str, Any], lora_B: Mapping[str, Any]) -> None:
        """Find the directions of the adapters of `task_adapter_names`, if they are not there."""
        if self.prototypes is None:
            found = [direction(lora_A[n].weight, lora_B[n].weight) for n in self.task_adapter_names]
            self.prototypes = torch.stack(found).to(lora_A[self.task_adapter_names[0]].weight.dtype)

    @torch.no_grad()
    def gen_know_sub(self, lora_A: Mapping[str, Any], lora_B: Mapping[str, Any]) -> None:
        """With `use_gks`, take the mean of the general adapters out of the tensors of those that came since."""
        if not self.use_gks:
            return
        for side in (lora_A, lora_B):
            mean = torch.stack([side[n].weight for n in self.gks_adapter_names]).mean(0)
            for name in self.gks_added_adapter_names if self.gks_done else self.task_adapter_names:
                side[name].weight.sub_(mean)
        self.gks_done, self.gks_added_adapter_names = True, []

    def forward(
        self,
        x: Tensor,
        lora_A: Mapping[str, Any],
        lora_B: Mapping[str, Any],
        dropout: Any,
        scaling: Mapping[str, float],
    ) -> Tensor:
        """What comes to the layer's output for x (..., in): of each token's adapters, by their shares."""
        self.build_prototypes(lora_A, lora_B)
        assert self.prototypes is not None
        names = self.task_adapter_names
        x = x.to(lora_A[names[0]].weight.dtype) if self.cast_input_dtype_enabled else x
        w = shares(x, self.prototypes.to(x.dtype), self.top_k, self.temperature)
        y = sum(w[..., i, None] * scaling[n] * lora_B[n](lora_A[n](x)) for i, n in enumerate(names))
        out: Tensor = dropout(y)
        return out
