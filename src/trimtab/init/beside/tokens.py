"""A small network beside a stack of blocks of any kind: it sees each token by itself."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from trimtab.core.site import Site
from trimtab.errors import ConfigError


class TokenNetwork(nn.Module):
    """x -> P x, and on from there by x + W2 gelu(W1 norm(x)) of each layer.

    Args:
        dim: the width of what it reads (rows, tokens, dim).
        width: of what it says (rows, tokens, width).
        inner: of what is between W1 and W2.
    """

    def __init__(self, dim: int, width: int, layers: int, inner: int) -> None:
        super().__init__()
        self.proj_in = nn.Linear(dim, width)
        part = lambda: nn.Sequential(nn.LayerNorm(width), nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))
        self.blocks = nn.ModuleList(part() for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        """(rows, tokens, dim) -> (rows, tokens, width)."""
        x = self.proj_in(x)
        for block in self.blocks:
            x = x + block(x)
        return x


class Tokens:
    """A `TokenNetwork` beside blocks that are `dim` wide."""

    frozen: frozenset[str] = frozenset()
    project = staticmethod(partial(nn.init.kaiming_uniform_, a=5**0.5))

    def __init__(self, config: Any, dim: int) -> None:
        if config.shadow_model != "mirror":
            raise ConfigError(
                "A model that is there already can be the shadow of a model of transformers or of a Flux2 transformer: "
                'here `shadow_model` is "mirror".'
            )
        self.width = config.shadow_hidden_size or dim
        inner = config.shadow_intermediate_size or self.width
        self.module = TokenNetwork(dim, self.width, config.shadow_num_hidden_layers or 1, inner)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of its parameters, by name."""
        return {name: tuple(p.shape) for name, p in self.module.named_parameters()}

    def values(self, model: nn.Module) -> dict[str, Tensor]:
        """What they start from."""
        return dict(self.module.named_parameters())

    def head(self, model: nn.Module) -> dict[str, tuple[int, ...]]:
        """It has none."""
        return {}

    def say(self, tensors: Mapping[str, Tensor], h: Tensor, given: Any, seen: Any, site: Site) -> Tensor:
        """The first state (rows, tokens, width), of the hidden states that the first block reads."""
        said: Tensor = functional_call(self.module, dict(tensors), (h,))
        return said

    def loss(self, *of: Any) -> None:
        """None: what it says has no labels."""
