"""SHiRA (Bhardwaj et al. 2024, https://arxiv.org/abs/2406.13175, section 3).   W' = W + S,   S sparse.

The r (in + out) entries of S are trained; where they stand is drawn at random, or said by a function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from trimtab.core.architectures import ATTENTION
from trimtab.core.config import LayerConfig, PeftType, help_field
from trimtab.core.families import Sparse
from trimtab.core.method import Leaf, Leaves, require_rank
from trimtab.core.report import warn
from trimtab.core.site import Site
from trimtab.errors import ConfigError


@dataclass
class ShiraConfig(LayerConfig):
    """The configuration of a SHiRA adapter.

    Attributes:
        mask_fn: (the layer, r) -> a tensor of the weight's shape, not zero at the entries to train; set it on the
            config to choose them yourself. With `mask_type="random"` it gets `random_seed=...`, too. It is not saved:
            the file holds the entries.
    """

    r: int = help_field("r (in + out) entries of a layer are trained, as many as LoRA of that rank has.", 32)
    mask_type: str = help_field("How the entries are chosen; any word but 'random': by `mask_fn`.", "random")
    random_seed: int | None = help_field("The seed of the choice; None: torch's own generator.", None)
    fan_in_fan_out: bool = help_field("The weight is stored (in, out), as in GPT-2; found out by itself.", False)
    init_weights: bool = help_field("Start from zeros; else random.", True)

    exclude_modules: ClassVar[None] = None  # type: ignore[misc]
    layers_to_transform: ClassVar[None] = None  # type: ignore[misc]
    layers_pattern: ClassVar[None] = None  # type: ignore[misc]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.SHIRA
        self.mask_fn: Callable[..., Tensor] | None = None
        if self.mask_type != "random":
            warn(
                f"Argument self.mask_type={self.mask_type!r} is not recognized, please supply your own masking "
                "function by calling `config.mask_fn = my_mask_fn`.",
                UserWarning,
            )


class Shira(Sparse):
    """A sparse delta of high rank."""

    when = "fast switching: 1 or 2 % of the entries change"
    config, prefix = ShiraConfig, "shira_"
    kinds = fused = frozenset({"linear"})
    targets = {**ATTENTION, "phi": ["q_proj", "v_proj"]}

    @classmethod
    def leaves(cls, site: Site, config: Any, shared: Leaves) -> Leaves:
        require_rank(config.r)
        n, size = config.r * (site.fan_in + site.fan_out), site.fan_in * site.fan_out
        if n > size:
            raise ConfigError(
                f"The set rank {config.r} results in more shira params than the total number of params in the base "
                f"layer {size} and this is not allowed. It is '{site.name}'."
            )
        return {
            "shira_weight": Leaf((n,)),  # (n,)
            "shira_indices": Leaf((2, n), train=False, buffer=True, dtype=torch.int32),  # (2, n)
        }

    def setup(self, config: Any) -> None:
        self.scaling = self.unit = 1.0  # what `set_scale` multiplies

    def reset(self, config: Any) -> None:
        n, shape = len(self.shira_weight), (self.site.fan_out, self.site.fan_in)
        if config.mask_fn is not None:
            seed = {"random_seed": config.random_seed} if config.mask_type == "random" else {}
            mask = config.mask_fn(self.site.layer, config.r, **seed)
            places = (mask.T if self.site.flipped else mask).to("cpu").nonzero().T
            if places.shape != (2, n):
                raise ConfigError(f"`mask_fn` chose {places.shape[-1]} entries of '{self.site.name}' instead of {n}.")
        elif config.mask_type != "random":
            raise ConfigError(f"`mask_type={config.mask_type!r}` needs a function that chooses: set `config.mask_fn`.")
        else:
            generator = None if config.random_seed is None else torch.Generator().manual_seed(config.random_seed)
            places = torch.randperm(shape[0] * shape[1], generator=generator)[:n].sort().values
            places = torch.stack([places // shape[1], places % shape[1]])
        self.shira_indices.copy_(places)
        if config.init_weights:
            self.shira_weight.zero_()
        else:
            self.shira_weight.normal_()

    def entries(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The places and values of S."""
        rows, columns = self.shira_indices.long()
        return rows * self.site.fan_in + columns, self.scaling * values

    weight, through, after = Sparse.summed, Sparse.joined, Sparse.added
    sources = property(lambda self: (self.shira_weight,))
