"""The parts of GLoRA's formula, A ... E, as the modules that peft makes of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trimtab.methods.glora import draw

__all__ = ["GloraEmptyPath", "GloraLoraPath", "GloraPath", "GloraScalarPath", "GloraVectorPath"]


class GloraPath(nn.Module):
    """One of the parts; its call gives its value."""

    def forward(self) -> Tensor | float:
        """The part, in a shape that broadcasts."""
        raise NotImplementedError

    @torch.no_grad()
    def reset_parameters(self, init_weights: bool = True) -> None:
        """Start at zero; without `init_weights` at random."""
        if type(self) is GloraPath:
            raise NotImplementedError
        for name, parameter in sorted(self.named_parameters(), reverse=True):  # in peft's order of draws
            if init_weights and name != "Xu":
                parameter.zero_()
            else:
                draw(parameter)


class GloraLoraPath(GloraPath):
    """A product Xd Xu (out, in) of low rank."""

    def __init__(self, out_features: int, in_features: int, r: int, init_weights: bool = True) -> None:
        super().__init__()
        self.Xd = nn.Parameter(torch.empty(out_features, r))
        self.Xu = nn.Parameter(torch.empty(r, in_features))
        self.reset_parameters(init_weights)

    def forward(self) -> Tensor:
        """The product."""
        return self.Xd @ self.Xu


class GloraVectorPath(GloraPath):
    """A vector (features, 1), or (features,)."""

    def __init__(self, features: int, is_column: bool = True, init_weights: bool = True) -> None:
        super().__init__()
        self.X = nn.Parameter(torch.empty((features, 1) if is_column else features))
        self.reset_parameters(init_weights)

    def forward(self) -> Tensor:
        """The vector."""
        return self.X


class GloraScalarPath(GloraPath):
    """A number."""

    def __init__(self, init_weights: bool = True) -> None:
        super().__init__()
        self.X = nn.Parameter(torch.empty(1))
        self.reset_parameters(init_weights)

    def forward(self) -> Tensor:
        """The number ()."""
        return self.X[0]


class GloraEmptyPath(GloraPath):
    """Nothing: zeros of a shape, or the number."""

    zeros: Tensor | None

    def __init__(self, shape: int | tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.register_buffer("zeros", None if shape is None else torch.zeros(shape))

    def forward(self) -> Tensor | float:
        """The zeros."""
        return 0.0 if self.zeros is None else self.zeros
