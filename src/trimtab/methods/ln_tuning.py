"""LN tuning (Zhao et al. 2023, https://arxiv.org/abs/2312.11420).   W' = θ,   b' = φ: a copy of a norm's own.

A norm that keeps means m and variances v of batches is copied with these (μ, σ²), counted for itself in training. That
is the norm with its own statistics and   W' = θ √(v + ε) / √(σ² + ε),   b' = φ + θ (m - μ) / √(σ² + ε).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
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
    sets: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LN_TUNING


MEAN, VARIANCE, COUNT = "running_mean", "running_var", "num_batches_tracked"


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
        if counts(site):
            for name in (MEAN, VARIANCE):
                leaves[f"ln_tuning_layers.{name}"] = Leaf((site.fan_out,), train=False, buffer=True)  # (out,)
            leaves[f"ln_tuning_layers.{COUNT}"] = Leaf((), train=False, dtype=torch.int64)  # ()
        return leaves

    def setup(self, config: Any) -> None:
        self.biased = self.site.bias() is not None
        self.counts = counts(self.site)

    def reset(self, config: Any) -> None:
        self.ln_tuning_layers.copy_(self.site.store(self.site.matrix()))
        if self.biased:
            self.ln_tuning_layers_bias.copy_(self.site.bias())
        if self.counts:
            for name in (MEAN, VARIANCE, COUNT):
                getattr(self, f"ln_tuning_layers_{name}").copy_(self.site.layer._buffers[name])

    @contextmanager
    def standing(self) -> Iterator[None]:
        """A block in which the layer, in training, has the copy's statistics for its own."""
        held = self.site.layer._buffers
        own = dict(held)
        if self.counts and self.training:
            held.update({n: self.places[f"ln_tuning_layers_{n}"][0][n] for n in (MEAN, VARIANCE, COUNT)})
        try:
            yield
        finally:
            held.update(own)

    def ratio(self) -> Tensor | int:
        """√(v + ε) / √(σ² + ε), (out,)."""
        if not self.counts:
            return 1
        layer: Any = self.site.layer
        ratio: Tensor = (layer._buffers[VARIANCE] + layer.eps) / (self.ln_tuning_layers_running_var + layer.eps)
        return ratio.sqrt()

    def weight(self, W: Tensor) -> Tensor:
        theta: Tensor = self.ln_tuning_layers * self.ratio()
        theta = (theta.mT if self.site.flipped else theta).reshape(W.shape[0], -1)
        return self.site.dense(theta).reshape(W.shape).to(W.dtype)

    def bias(self, b: Tensor | None) -> Tensor | None:
        if not self.biased:
            return b
        phi: Tensor = self.ln_tuning_layers_bias
        if not self.counts:
            return phi
        layer: Any = self.site.layer
        moved = layer._buffers[MEAN] - self.ln_tuning_layers_running_mean
        return phi + self.ln_tuning_layers * moved / (self.ln_tuning_layers_running_var + layer.eps).sqrt()


def counts(site: Site) -> bool:
    """Whether the layer is a norm that keeps statistics of batches."""
    return site.kind == "vector" and site.layer._buffers.get(VARIANCE) is not None
