"""MiCA (Rüdiger & Raschka 2026, https://arxiv.org/abs/2604.01694).   W' = W + s B A,   B the last columns of W's U.

B (out, r), the left singular vectors of W's least singular values, is frozen; A starts from zero and is trained.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trimtab.core.families import LowRank, wide
from trimtab.core.method import Call, Leaf, Leaves
from trimtab.core.site import Site
from trimtab.errors import ConfigError


class Mica(LowRank):
    """A pair of which A alone is trained."""

    when = "adding knowledge with least interference"
    example = {"init_lora_weights": "mica"}
    prefix = "lora_"
    kinds = fused = frozenset({"linear", "embedding"})
    combine, combined_config = LowRank.combined, LowRank.settle

    @classmethod
    def leaves(cls, site: Site, config: Any, shared: Leaves) -> Leaves:
        if config.r > (most := min(site.fan_in, site.fan_out)):
            raise ConfigError(
                f"MiCA requires `r` <= min(in_features, out_features) but got r={config.r} for a layer with weight "
                f"shape ({site.fan_out}, {site.fan_in}) (max usable r is {most}). It is '{site.name}'."
            )
        (A, B), (below, above) = cls.pair(site, config.r), cls.pair(site, config.r).values()
        return {A: below, B: Leaf(above.shape, train=False)}  # (r, in), (out, r)

    def setup(self, config: Any) -> None:
        self.scale(config.r, config.lora_alpha, config.scaling(), config.lora_dropout)

    def reset(self, config: Any) -> None:
        U = torch.linalg.svd(wide(self.site.matrix()), full_matrices=False).U
        A, B = self.matrices
        self.put(torch.zeros_like(A), U[:, U.shape[1] - self.r :].to(B))

    def weight(self, W: Tensor) -> Tensor:
        return W + self.delta()

    def after(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        h, B = self.update(call.drop(self, x, self.dropout))
        return self.site.add(y, h, B)
