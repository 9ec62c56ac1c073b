"""Norms: layers whose weight is a vector."""

from __future__ import annotations

from torch import Tensor, nn

from trimtab.core.site import Site


class VectorSite(Site):
    """LayerNorm, RMSNorm, GroupNorm and their like, also transformers' own classes: W (d, 1)."""

    kind = "vector"
    fused = False

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        """A layer called a norm whose weight has one dimension."""
        weight = layer._parameters.get("weight")
        return weight is not None and weight.ndim == 1 and "norm" in type(layer).__name__.lower()

    def matrix(self) -> Tensor:
        """The original weight (d, 1)."""
        return super().matrix()[:, None]

    def store(self, W: Tensor) -> Tensor:
        """W (d, 1) as a vector (d,)."""
        return W[:, 0].contiguous()

    def apply(self, x: Tensor, M: Tensor) -> Tensor:
        """What a norm multiplies by its weight is known to it only."""
        raise NotImplementedError(f"'{self.name}' is a norm: an adapter can change its weight, but not what it scales.")
