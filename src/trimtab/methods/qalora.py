"""QA-LoRA (Xu et al. 2023, https://arxiv.org/abs/2309.14717, algorithm 1).   W' = W + s B A P,   P sums groups of x.

At GPTQ layers the features of the input that share a scale are summed before A (r, in / g), so that the update is one
number a group, as the layer's zero points are. Other layers have no groups: there it is LoRA.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from trimtab.core.families import LowRank, wide
from trimtab.core.method import Call, Leaf, Leaves
from trimtab.core.report import warn
from trimtab.core.site import Site
from trimtab.errors import ConfigError
from trimtab.formats import weights
from trimtab.init import mutates, start


def group_at(site: Site, config: Any) -> int:
    """How many features of the input are summed at a site."""
    if not (weights.packed_linear(site.layer) and hasattr(site.layer, "qweight") and hasattr(site.layer, "g_idx")):
        return 1
    g: int = config.qalora_group_size
    if g < 1 or site.fan_in % g:
        raise ConfigError(f"'{site.name}': {site.fan_in} features should be divisible by `qalora_group_size` {g}.")
    if mutates(config.init_lora_weights):
        raise ConfigError(f"QA-LoRA does not go with init_lora_weights={config.init_lora_weights!r}.")
    return g


class QaLora(LowRank):
    """A pair of which A acts on sums of the input, where the layer is quantised by GPTQ."""

    when = "GPTQ bases: the update merges into the quantised weight"
    example = {"use_qalora": True}
    prefix = "lora_"
    bias = LowRank.lifted
    kinds = fused = frozenset({"linear", "embedding", "conv"})
    mutates = staticmethod(lambda config: mutates(config.init_lora_weights))

    @classmethod
    def share(cls, config: Any, sites: Sequence[Site]) -> Leaves:
        if sites and all(group_at(site, config) == 1 for site in sites):
            warn("`use_qalora` acts on GPTQ layers only, and none of the adapted layers is one: this is plain LoRA.")
        return {}

    @classmethod
    def leaves(cls, site: Site, config: Any, shared: Leaves) -> Leaves:
        leaves, g = cls.pair(site, config.r, config.lora_bias), group_at(site, config)
        return leaves if g == 1 else leaves | {"lora_A.weight": Leaf((config.r, site.fan_in // g))}  # (r, in / g)

    def setup(self, config: Any) -> None:
        self.scale(config.r, config.lora_alpha, config.scaling(), config.lora_dropout)
        self.g = group_at(self.site, config)

    def reset(self, config: Any) -> Tensor | None:
        return start(config.init_lora_weights, self)

    def delta(self) -> Tensor:
        """s·B·A·P (out, in)."""
        A, B = (wide(M) for M in self.matrices)
        return self.scaling * (B @ (A if self.g == 1 else A.repeat_interleave(self.g, -1)))

    def weight(self, W: Tensor) -> Tensor:
        return W + self.delta()

    def after(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        x = call.drop(self, x, self.dropout)
        h, B = self.update(x if self.g == 1 else x.unflatten(-1, (-1, self.g)).sum(-1))
        return self.site.add(y, h, B, shift=self.shift)
