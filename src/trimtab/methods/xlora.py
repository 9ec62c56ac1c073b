"""X-LoRA (Buehler & Buehler 2024, https://arxiv.org/abs/2402.07148, section 2).   y' = W x + g Σ_i σ_i s_i B_i A_i x.

Weights σ of frozen LoRA adapters i, for each token and, with `layerwise_scalings`, each layer: what a small network of
linear layers makes of the model's last hidden state in a pass before, in which every adapter has the same weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.core.config import PeftConfig, PeftType, help_field
from trimtab.core.logged import Logged
from trimtab.core.method import Call, require_rank
from trimtab.core.model_method import Mixture
from trimtab.core.report import warn
from trimtab.errors import ConfigError

Strengths = dict[str, dict[str, Tensor]] | dict[str, float]  # adapter -> layer -> (rows, tokens, 1); or one for all


@dataclass
class XLoraConfig(PeftConfig):
    """The configuration of a router among LoRA adapters."""

    hidden_size: int | None = help_field("The size of the model's hidden states; None: as its config says.", None)
    adapters: dict[str, str] | None = help_field("The adapters: {name: folder or Hub id}.", None)
    enable_softmax: bool = help_field("The weights of all adapters go through a softmax.", True)
    enable_softmax_topk: bool = help_field("Those of the `top_k_lora` adapters kept do.", False)
    layerwise_scalings: bool = help_field("Each layer has weights of its own.", False)
    xlora_depth: int = help_field("The number of linear layers of the network.", 1)
    xlora_size: int = help_field("Its width, where there is more than one.", 2048)
    xlora_dropout_p: float = help_field("Dropout between them.", 0.2)
    use_trainable_adapters: bool = help_field("Train the adapters, too.", False)
    softmax_temperature: float = help_field("The temperature of the softmax.", 1.0)
    top_k_lora: int | None = help_field("Use so many of the adapters at a token, those of the largest weights.", None)
    scaling_pass_value: float = help_field("Every adapter's weight in the pass before.", 0.0)
    global_scaling_weight: float = help_field("What all weights are multiplied by (g).", 1.0)

    modules_to_save: ClassVar[None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.XLORA
        if self.adapters is None:
            warn("No value was provided for `adapters`: name those that it is to work among, {name: folder}.")
        self.adapters = dict(sorted((self.adapters or {}).items()))  # the order they have in a file
        require_rank(self.xlora_depth, "xlora_depth")
        if self.top_k_lora is not None:
            require_rank(self.top_k_lora, "top_k_lora")
        elif self.enable_softmax_topk:
            raise ConfigError("`enable_softmax_topk` needs `top_k_lora`: how many adapters are kept.")
        if self.enable_softmax and self.enable_softmax_topk:
            warn(
                "`enable_softmax_topk` and `enable_softmax` are both enabled: the softmax of a softmax. Set one of "
                "them to False."
            )


class XLora(Logged, Mixture):
    """The network; its log of weights is what the model's `get_scalings_log` and its like answer from."""

    when = "several trained LoRA adapters, each token its own mixture"
    example = {"adapters": {"0": "", "1": ""}}
    config, place, field = XLoraConfig, "internal_xlora_classifier", "adapters"
    views = (
        *Logged.shown, "set_topk_lora", "set_scaling_pass_value", "get_global_scaling_weight",
        "set_global_scaling_weight",
    )  # fmt: skip

    @classmethod
    def trains(cls, config: Any) -> bool:
        return bool(config.use_trainable_adapters)

    @classmethod
    def admit(cls, config: Any, others: list[Any]) -> None:
        if others:
            raise ConfigError("A model can have one X-LoRA adapter: delete the other first.")

    @classmethod
    def mend(cls, tensors: dict[str, Tensor], read: Callable[[str], dict[str, Tensor]]) -> None:
        # PEFT takes the layers of the network for adapters called 0, 3, 6 ...: it puts them into their files.
        there = {int(key.rpartition(".layers.")[2].split(".")[0]) for key in tensors if ".layers." in key}
        for n in range(0, max(there, default=0) + 1, 3):
            for key, value in read(str(n)).items() if n not in there else ():
                if key.rpartition(".layers.")[2] in ("weight", "bias") and cls.place in key:
                    tensors[key.replace(".layers.", f".layers.{n}.")] = value

    def build(self, config: Any) -> None:
        count = len(config.adapters)
        if not count:
            raise ConfigError("`adapters` names no adapter: give {name: folder or Hub id} of at least one.")
        if config.top_k_lora is not None and config.top_k_lora > count:
            raise ConfigError(f"`top_k_lora`={config.top_k_lora} is more than the {count} `adapters`.")
        config.hidden_size = config.hidden_size or self.width
        if config.hidden_size is None or self.width not in (None, config.hidden_size):
            raise ConfigError(f"`hidden_size`={config.hidden_size}, and the model's hidden states have {self.width}.")
        self.options, layers = config, len(self.sites) if config.layerwise_scalings else 1
        widths = [config.hidden_size] + [config.xlora_size] * (config.xlora_depth - 1) + [count * layers]
        parts: list[nn.Module] = []
        for a, b in pairwise(widths):
            parts += [nn.Linear(a, b), nn.ReLU(), nn.Dropout(config.xlora_dropout_p)]  # (b, a) and (b,)
        self.layers = nn.Sequential(*parts[:-2])

    def __getstate__(self) -> dict[str, Any]:  # no copy of a graph
        return {**self.__dict__, "latest": None}

    def reset(self, config: Any, base: Any) -> None:
        for part in self.layers:
            if isinstance(part, nn.Linear):
                part.reset_parameters()

    def around(self, forward: Callable[..., Any], inputs: dict[str, Any], call: Call) -> Any:
        config = self.options
        first = {k: v for k, v in inputs.items() if k != "labels"}
        first |= {"output_hidden_states": True, "return_dict": True, "use_cache": False}
        value = config.scaling_pass_value
        with torch.no_grad():
            seen = forward(dict.fromkeys(config.adapters, value * config.global_scaling_weight), first)
        if getattr(seen, "hidden_states", None) is None:
            raise ConfigError(f"{type(seen).__name__} has no `hidden_states`, which X-LoRA reads.")
        scalings = self.scalings(seen.hidden_states[-1])
        self.note(scalings)
        return forward(self.strengths(scalings), inputs)

    def scalings(self, x: Tensor) -> Tensor:
        """Hidden states (rows, tokens, dim) -> weights (rows, tokens, layers, adapters)."""
        config, n = self.options, len(self.options.adapters)
        weight = next(self.layers.parameters())
        logits = self.layers(x.to(weight.dtype)).unflatten(-1, (-1, n))
        if config.enable_softmax:
            logits = torch.softmax(logits / config.softmax_temperature, -1)
        return logits.expand(*logits.shape[:-2], len(self.sites), n)

    def strengths(self, scalings: Tensor) -> Strengths:
        """What the adapters' updates are multiplied by: the weights of those kept, times g."""
        config = self.options
        scalings = kept(scalings, config) * config.global_scaling_weight
        layers = [part.unbind(-1) for part in scalings[..., None, :].unbind(-3)]
        return {
            name: {path: layer[i] for path, layer in zip(self.sites, layers, strict=True)}
            for i, name in enumerate(config.adapters)
        }

    # ------------------------------------------------------------------ what the model shows
    def set_topk_lora(self, value: int | None) -> None:
        """Use so many adapters at a token; None: all."""
        self.options.top_k_lora = value

    def set_scaling_pass_value(self, value: float | None) -> None:
        """Set every adapter's weight in the pass before; None: one over their number."""
        self.options.scaling_pass_value = 1 / len(self.options.adapters) if value is None else value

    def get_global_scaling_weight(self) -> float:
        """g"""
        return float(self.options.global_scaling_weight)

    def set_global_scaling_weight(self, weight: float) -> None:
        """Set g."""
        self.options.global_scaling_weight = weight


def kept(scalings: Tensor, config: Any) -> Tensor:
    """Weights (..., adapters) with zeros for all but the `top_k_lora` largest of each token."""
    if config.top_k_lora is None:
        return scalings
    best = scalings.topk(config.top_k_lora, -1)
    values = torch.softmax(best.values, -1) if config.enable_softmax_topk else best.values
    return torch.zeros_like(scalings).scatter(-1, best.indices, values)
