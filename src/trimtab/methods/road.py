"""RoAd (Liao & Monz 2024, https://arxiv.org/abs/2409.00119, eq. 2 and 3).   W' = R W,   b' = R b,   R = diag(R_1 ...).

Each R_i is a 2 x 2 block α [cos θ, -sin θ; sin θ, cos θ]: output i of a group is turned with output i + g / 2 (in the
paper with its neighbour). road_1 has one α and θ a pair, road_2 one an output, road_4 one an entry of R.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from trimtab.core.architectures import ATTENTION
from trimtab.core.config import LayerConfig, PeftType, help_field
from trimtab.core.families import wide
from trimtab.core.method import Call, Leaf, Leaves, Method
from trimtab.core.site import Site
from trimtab.errors import ConfigError

# The numbers a pair has, and which of them are in (cos of the first, cos of the second, sin of each).
ENTRIES = {"road_1": (1, (0, 0, 0, 0)), "road_2": (2, (0, 1, 0, 1)), "road_4": (4, (0, 1, 2, 3))}


@dataclass
class RoadConfig(LayerConfig):
    """The configuration of a RoAd adapter."""

    variant: str = help_field("road_1, road_2 or road_4: how many numbers an output has.", "road_1")
    group_size: int = help_field("Outputs are paired within groups of so many; it must divide their number.", 64)
    init_weights: bool = help_field("Start from the identity; else random.", True)

    exclude_modules: ClassVar[None] = None  # type: ignore[misc]
    layers_to_transform: ClassVar[None] = None  # type: ignore[misc]
    layers_pattern: ClassVar[None] = None  # type: ignore[misc]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.ROAD
        if isinstance(self.variant, enum.Enum):
            self.variant = self.variant.value
        if self.variant not in ENTRIES:
            raise ConfigError(f"Invalid variant {self.variant} specified. Please choose from road_1, road_2 or road_4")
        if self.group_size <= 0 or self.group_size % 2:
            raise ConfigError(f"The group_size must be divisible by 2 when using RoadLayer, but got {self.group_size}.")


class Road(Method):
    """Pairs of outputs, bias included, turned and scaled."""

    when = "many adapters in one batch, at the price of a product by elements"
    config, prefix, targets = RoadConfig, "road_", ATTENTION
    settings = ("variant", "group_size")
    kinds = fused = frozenset({"linear", "embedding", "conv"})

    @classmethod
    def leaves(cls, site: Site, config: Any, shared: Leaves) -> Leaves:
        if site.fan_out % config.group_size:
            raise ConfigError(
                f"The out_features of the base layer must be divisible by group_size ({config.group_size}) when using "
                f"RoadLayer: '{site.name}' has {site.fan_out}."
            )
        size = site.fan_out // 2 * ENTRIES[config.variant][0]
        return {"road_theta": Leaf((size,)), "road_alpha": Leaf((size,))}  # (numbers,)

    def reset(self, config: Any) -> None:
        if config.init_weights:
            self.road_theta.zero_()
            self.road_alpha.fill_(1)
        else:
            self.road_theta.normal_(0, 0.5)
            self.road_alpha.normal_(1, 0.5)

    def turn(self, y: Tensor) -> Tensor:
        """y (..., out) with its pairs turned."""
        k, places = ENTRIES[self.options.variant]
        half = self.options.group_size // 2
        theta, alpha = (wide(t).view(-1, k, half) for t in (self.road_theta, self.road_alpha))
        c, s = ((alpha * f).to(y.dtype) for f in (theta.cos(), theta.sin()))
        first, second = y.unflatten(-1, (-1, 2, half)).unbind(-2)
        c1, c2, s1, s2 = (t[:, i] for t, i in zip((c, c, s, s), places, strict=True))
        return torch.stack((c1 * first - s1 * second, s2 * first + c2 * second), -2).flatten(-3)

    def weight(self, W: Tensor) -> Tensor:
        return self.turn(W.mT).mT

    def bias(self, b: Tensor | None) -> Tensor | None:
        return b if b is None else self.turn(b)

    def after(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        return self.turn(y.movedim(1, -1)).movedim(-1, 1) if self.site.kind == "conv" else self.turn(y)
