"""LoRA of tied layers.   W' = W + s B A,   the pair of one layer, transposed where the other looks W up.

An embedding and the head that is tied to it are one weight: one pair adapts both, is trained once and merged once.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from trimtab.core.families import LowRank, wide
from trimtab.core.method import Call, Leaves
from trimtab.core.site import Site
from trimtab.errors import ConfigError
from trimtab.init import mutates, start

# A leaf of a layer -> the leaf that is its transpose, of a layer tied to it that multiplies the other way round.
TURNED = {"lora_A.weight": "lora_embedding_B", "lora_B.weight": "lora_embedding_A"}
TURNED |= {turned: leaf for leaf, turned in TURNED.items()}


class Tied(LowRank):
    """A pair that layers tied to each other have in common; each of them has it in the file, as PEFT's do."""

    when = "adapting a tied embedding and head together"
    example = {"ensure_weight_tying": True}
    prefix = "lora_"
    bias = LowRank.lifted
    kinds = frozenset({"linear", "embedding", "conv", "attention", "parameter"})
    fused = frozenset({"linear", "embedding", "conv"})
    tied, echoes = kinds, True

    @classmethod
    def leaves(cls, site: Site, config: Any, shared: Leaves) -> Leaves:
        if mutates(config.init_lora_weights):
            raise ConfigError(f"ensure_weight_tying does not go with init_lora_weights={config.init_lora_weights!r}.")
        return cls.pair(site, config.r, config.lora_bias)

    def setup(self, config: Any) -> None:
        self.scale(config.r, config.lora_alpha, config.scaling(), config.lora_dropout)

    def reset(self, config: Any) -> Tensor | None:
        return start(config.init_lora_weights, self)

    @property
    def turned(self) -> bool:
        """Whether the pair is that of a layer which multiplies by the transpose."""
        return self.names[0] not in self.places

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """(A, B) of this layer."""
        A, B = (holder[key] for holder, key in list(self.places.values())[:2])
        return (B.mT, A.mT) if self.turned else (A, B)

    def source(self, leaf: str) -> str:
        return TURNED[leaf] if self.turned else leaf

    def pack(self, name: str, tensor: Tensor) -> Tensor:
        return tensor.mT.contiguous() if self.turned else tensor

    def unpack(self, name: str, value: Tensor) -> Tensor:
        return value.mT if self.turned else value

    def delta(self) -> Tensor:
        """s·B·A (out, in): the same numbers to the bit at both layers."""
        A, B = (wide(M) for M in self.matrices)
        return (self.scaling * (A.mT @ B.mT)).mT if self.turned else self.scaling * (B @ A)

    def weight(self, W: Tensor) -> Tensor:
        return W + self.delta()

    def after(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        h, B = self.update(call.drop(self, x, self.dropout))
        return self.site.add(y, h, B, shift=self.shift)
