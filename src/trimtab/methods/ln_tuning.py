"""LN tuning (Zhao et al. 2023, https://arxiv.org/abs/2312.11420).   W' = θ,   b' = φ: a copy of a norm's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from trimtab.core.config import LayerConfig, PeftType
from trimtab.core.method import Leaf, Leaves, Method
from trimtab.core.site import Site

PRE_POST = ["input_layernorm", "post_attention_layernorm"]
AROUND = ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
TARGETS: dict[str, Any] = {
    **dict.fromkeys(["llama", "mistral", "gemma"], (*PRE_POST, "norm")),
    **dict.fromkeys(["gemma2", "gemma3_text"], (*PRE_POST, *AROUND, "norm")),
    **dict.fromkeys(["bloom", "falcon"], (*PRE_POST, "ln_f")),
    **dict.fromkeys(["qwen2", "qwen3"], ("post_attention_layernorm",)),
    **dict.fromkeys(["t5", "mt5"], ("layer_norm", "final_layer_norm")),
    "llava": ["multi_modal_projector", *PRE_POST, "norm", "embed_tokens", "lm_head"],
    "bart": ["self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"],
    "gpt2": ["ln_1", "ln_2", "ln_f"],
    "gptj": ["ln_1", "ln_f"],
    "blip-2": ["layernorm", "LayerNorm", "final_layer_norm", "self_attn_layer_norm"],
    "phi": ["input_layernorm", "final_layernorm"],
}


@dataclass
class LNTuningConfig(LayerConfig):
    """The configuration of LN tuning: which norms (or other layers) are trained as a copy."""

    layers_to_transform: ClassVar[None] = None  # type: ignore[misc]
    layers_pattern: ClassVar[None] = None  # type: ignore[misc]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LN_TUNING


class LNTuning(Method):
    """The layer's weight and bias in its own layout; of several active copies the outermost counts."""

    when = "adapting norms alone: cheap, for small shifts of domain"
    reads = True
    config, prefix, targets = LNTuningConfig, "ln_tuning_", TARGETS
    kinds = frozenset({"vector", "linear", "conv", "embedding"})

    @classmethod
    def leaves(cls, site: Site, config: Any, shared: Leaves) -> Leaves:
        leaves = {"ln_tuning_layers.weight": Leaf(tuple(site.store(site.matrix()).shape))}  # (...)
        if site.bias() is not None:
            leaves["ln_tuning_layers.bias"] = Leaf((site.fan_out,))  # (out,)
        return leaves

    def setup(self, config: Any) -> None:
        self.biased = self.site.bias() is not None

    def reset(self, config: Any) -> None:
        self.ln_tuning_layers.copy_(self.site.store(self.site.matrix()))
        if self.biased:
            self.ln_tuning_layers_bias.copy_(self.site.bias())

    def weight(self, W: Tensor) -> Tensor:
        theta: Tensor = self.ln_tuning_layers
        theta = (theta.mT if self.site.flipped else theta).reshape(W.shape[0], -1)
        return self.site.dense(theta).reshape(W.shape).to(W.dtype)

    def bias(self, b: Tensor | None) -> Tensor | None:
        return self.ln_tuning_layers_bias if self.biased else b
