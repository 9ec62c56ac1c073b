"""The shared halves of formulas. A family gives helpers that hooks call; it overrides no hook itself."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.core.method import Method, require_rank
from trimtab.core.site import Site


def wide(M: Tensor) -> Tensor:
    """A factor in fp32 at least, for products that end in a weight."""
    return M if M.dtype == torch.float64 else M.float()


class LowRank(Method):
    """dW = s·B·A with A (r, in), B (out, r), under LoRA's names (an embedding's pair has names of its own)."""

    views = ("r", "lora_alpha", "scaling", "dropout")

    def pair(self, site: Site, r: int, alpha: float, scaling: float, dropout: float) -> dict[str, Tensor]:
        """Note rank and scale, and make the empty pair in the shapes the kind of layer keeps them."""
        require_rank(r)
        self.r, self.lora_alpha, self.scaling, self.dropout = r, alpha, scaling, dropout
        self.unit = scaling  # what `set_scale` multiplies
        self.names = ("lora_embedding_A", "lora_embedding_B") if site.kind == "embedding" else ("lora_A", "lora_B")
        suffix = "" if site.kind == "embedding" else ".weight"
        return {
            self.names[0] + suffix: self.empty(*site.down(r)),  # (r, in)
            self.names[1] + suffix: self.empty(*site.up(r)),  # (out, r)
        }

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """(A, B) as the layer holds them now."""
        return getattr(self, self.names[0]), getattr(self, self.names[1])

    def delta(self) -> Tensor:
        """s·B·A (out, in), formed in fp32 whatever the factors' number format."""
        A, B = self.factors
        return self.scaling * (wide(B).flatten(1) @ wide(A).flatten(1))

    def drop(self, x: Tensor) -> Tensor:
        """The input after dropout: indices have none."""
        if self.dropout and self.training and x.is_floating_point():
            return F.dropout(x, self.dropout)
        return x

    def update(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The update of an output up to its last product: (h, B) with s·B·A·x = B·h.

        The skinny factors take the input's number format, never the input theirs; indices leave them as they are.
        """
        A, B = self.factors
        if x.is_floating_point():
            A, B = A.to(x.dtype), B.to(x.dtype)
        return self.site.apply(x, A) * self.scaling, B
