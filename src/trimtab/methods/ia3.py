"""IA3 (Liu et al. 2022, https://arxiv.org/abs/2205.05638).   W' = diag(l) W;   feed-forward: W' = W diag(l)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from trimtab.core.combining import Recipe
from trimtab.core.config import LayerConfig, PeftType, help_field
from trimtab.core.method import Call, Leaf, Leaves, Method
from trimtab.core.site import Site
from trimtab.core.targets import matches
from trimtab.errors import ConfigError

# model_type -> (what scales its output, what scales its input: the feed-forward part)
DEFAULTS: dict[str, tuple[list[str], list[str]]] = {
    "t5": (["k", "v"], ["wo"]),
    "mt5": (["k", "v", "wi_1"], []),
    "gpt2": (["c_attn"], ["mlp.c_proj"]),
    "gpt_bigcode": (["c_attn"], ["mlp.c_proj"]),
    "bloom": (["query_key_value"], ["mlp.dense_4h_to_h"]),
    **dict.fromkeys(["gpt_neox", "RefinedWeb", "RefinedWebModel", "falcon"], (["query_key_value"], ["dense_4h_to_h"])),
    "roberta": (["key", "value"], ["output.dense"]),
    "bert": (["key", "value"], ["output.dense"]),
    "deberta-v2": (["key_proj", "value_proj"], ["output.dense"]),
    "deberta": (["in_proj"], ["output.dense"]),
    "opt": (["q_proj", "k_proj"], ["fc2"]),
    "bart": (["q_proj", "v_proj"], ["fc2"]),
    "phi": (["q_proj", "v_proj"], ["fc2"]),
    "gptj": (["q_proj", "v_proj"], ["fc_out"]),
    "gpt_neo": (["q_proj", "v_proj"], ["c_proj"]),
    "llama": (["k_proj", "v_proj"], ["down_proj"]),
    "mistral": (["k_proj", "v_proj"], ["down_proj"]),
    "mixtral": (["k_proj", "v_proj"], ["w2"]),
    **dict.fromkeys("llama4 gemma gemma2 gemma3_text qwen2 qwen3".split(), (["q_proj", "v_proj"], ["down_proj"])),
}


@dataclass
class IA3Config(LayerConfig):
    """The configuration of an IA3 adapter."""

    feedforward_modules: list[str] | str | None = help_field("Those of `target_modules` that scale their input.", None)
    fan_in_fan_out: bool = help_field("The weight is stored (in, out), as in GPT-2; found out by itself.", False)
    init_ia3_weights: bool = help_field("Start from ones; else random.", True)

    layers_to_transform: ClassVar[None] = None  # type: ignore[misc]
    layers_pattern: ClassVar[None] = None  # type: ignore[misc]

    sets: ClassVar[tuple[str, ...]] = (*LayerConfig.sets, "feedforward_modules")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.IA3
        wanted, inputs = self.target_modules, self.feedforward_modules
        if isinstance(wanted, set) and isinstance(inputs, set) and not all(_covers(wanted, name) for name in inputs):
            raise ConfigError("`feedforward_modules` should be a subset of `target_modules`")


def _covers(wanted: set[str], name: str) -> bool:
    """Whether a name, or a path that ends in it ("all-linear" is saved as whole paths), is among those wanted."""
    return any(matches({name}, entry) for entry in wanted)


def on_input_of(site: Site, config: Any) -> bool:
    """Whether the scale acts on the layer's input."""
    return matches(config.feedforward_modules, site.name) is not None


class IA3(Method):
    """One scale l for each output, or for each input of a feed-forward layer."""

    when = "few examples, few parameters, no cost after merging"
    config, prefix = IA3Config, "ia3_"
    kinds = fused = frozenset({"linear", "conv"})
    targets = {model: [*outputs, *inputs] for model, (outputs, inputs) in DEFAULTS.items()}
    defaults = {"feedforward_modules": {model: inputs for model, (_, inputs) in DEFAULTS.items()}}

    @classmethod
    def leaves(cls, site: Site, config: Any, shared: Leaves) -> Leaves:
        on_input = on_input_of(site, config)
        if site.kind == "conv":
            channels = site.fan_in // math.prod(site.kernel) if on_input else site.fan_out
            return {"ia3_l": Leaf((1, channels, *(1 for _ in site.kernel)))}  # (1, channels, 1, ...)
        if on_input:
            return {"ia3_l": Leaf((1, site.fan_in))}  # (1, in)
        return {"ia3_l": Leaf((site.fan_out, 1))}  # (out, 1)

    def setup(self, config: Any) -> None:
        self.on_input = on_input_of(self.site, config)

    def reset(self, config: Any) -> None:
        if config.init_ia3_weights:
            self.ia3_l.fill_(1)
        else:
            self.ia3_l.normal_()

    @staticmethod
    def combine(methods: Sequence[Any], weights: Sequence[float], recipe: Recipe, rank: int) -> dict[str, Tensor]:
        scales = [m.ia3_l.detach() for m in methods]
        if len({m.on_input for m in methods}) > 1:
            raise ValueError(f"At '{methods[0].site.name}' one adapter scales the input, another the output.")
        return {"ia3_l": recipe.merge(scales, weights)}

    @staticmethod
    def combined_config(cls: Any, config: Any, configs: Sequence[Any], ranks: Mapping[str, int]) -> None:
        inputs = [c.feedforward_modules for c in configs if c.feedforward_modules]
        if any(isinstance(x, str) for x in inputs):
            config.feedforward_modules = {path for path in ranks if any(matches(x, path) is not None for x in inputs)}
        else:
            config.feedforward_modules = set().union(*inputs)

    def scale(self, x: Tensor) -> Tensor:
        """x with its feature axis scaled by l."""
        return x * self.site.spread(self.ia3_l.flatten().to(x.dtype))

    def weight(self, W: Tensor) -> Tensor:
        l = self.ia3_l.flatten()
        if not self.on_input:
            return W * l[:, None]
        return W * l.repeat_interleave(math.prod(self.site.kernel))  # a convolution's columns are channels · kernel

    def bias(self, b: Tensor | None) -> Tensor | None:
        return b if self.on_input or b is None else b * self.ia3_l.flatten()

    def before(self, x: Tensor, call: Call) -> Tensor:
        return self.scale(x) if self.on_input else x

    def after(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        return y if self.on_input else self.scale(y)
