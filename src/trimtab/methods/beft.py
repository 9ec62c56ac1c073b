"""BEFT (Huang et al. 2025, https://arxiv.org/abs/2509.15974).   W' = W,   b' = b + v: biases of value projections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from trimtab.core.config import LayerConfig, PeftType, help_field
from trimtab.core.method import Call, Leaf, Leaves, Method
from trimtab.core.site import Site

# The value projection of each architecture.
TARGETS = {
    **dict.fromkeys(["t5", "mt5"], ("v",)),
    **dict.fromkeys(["bert", "roberta"], ("value",)),
    "deberta-v2": ["value_proj"],
    **dict.fromkeys(
        "opt gptj gpt_neo bart llama llama4 mistral mixtral phi gemma gemma2 gemma3_text qwen2 qwen3".split(),
        ("v_proj",),
    ),
}


@dataclass
class BeftConfig(LayerConfig):
    """The configuration of a BEFT adapter."""

    init_weights: bool = help_field("Start from zero; else random.", True)

    exclude_modules: ClassVar[None] = None  # type: ignore[misc]
    layers_to_transform: ClassVar[None] = None  # type: ignore[misc]
    layers_pattern: ClassVar[None] = None  # type: ignore[misc]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.BEFT


class Beft(Method):
    """A vector added to the layer's output; a layer without a bias gets one when it is merged."""

    when = "almost nothing may be trained: biases of the values"
    config, prefix, targets = BeftConfig, "beft_", TARGETS
    kinds = fused = frozenset({"linear", "conv"})

    @classmethod
    def leaves(cls, site: Site, config: Any, shared: Leaves) -> Leaves:
        return {"beft_bias": Leaf((1, site.fan_out))}  # (1, out)

    def reset(self, config: Any) -> None:
        if config.init_weights:
            self.beft_bias.zero_()
        else:
            self.beft_bias.normal_()

    def weight(self, W: Tensor) -> Tensor:
        return W

    def bias(self, b: Tensor | None) -> Tensor | None:
        v: Tensor = self.beft_bias[0]
        return v if b is None else b + v

    def after(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        return y + self.site.spread(self.beft_bias[0].to(y.dtype))
