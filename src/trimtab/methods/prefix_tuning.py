"""Prefix tuning (Li & Liang 2021, https://arxiv.org/abs/2101.00190, section 4).   Layers attend to [P_k; K], [P_v; V].

With `prefix_projection` the prefix comes out of a small MLP in training (section 4.3); only what comes out is saved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from trimtab.core.config import PeftType, PromptLearningConfig, help_field
from trimtab.core.method import Call
from trimtab.core.model_method import PromptMethod

ZERO = "zero"  # a start


@dataclass
class PrefixTuningConfig(PromptLearningConfig):
    """The configuration of a trained prefix."""

    init_weights: bool | str | None = help_field('"zero": as zeros; anything else: at random.', None)
    encoder_hidden_size: int | None = help_field("The width of the MLP; the token dimension when None.", None)
    prefix_projection: bool = help_field("Train the prefix through an MLP.", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.PREFIX_TUNING


class PrefixTuning(PromptMethod):
    """Keys and values (virtual tokens, layers · 2 · dim)."""

    when = "generation steered through every layer; the weights untouched"
    example = {"num_virtual_tokens": 20}
    config, cached = PrefixTuningConfig, True

    def build(self, config: Any) -> None:
        width = config.num_layers * 2 * config.token_dim
        self.projected = config.prefix_projection and not config.inference_mode
        self.embedding = nn.Embedding(
            config.num_virtual_tokens, config.token_dim if self.projected else width
        )  # (n, dim)
        if self.projected:
            self.unfinished = (
                "the MLP it came from: load it without is_trainable=True, or train it further with "
                "prefix_projection=False"
            )
            self.transform = nn.Sequential(
                nn.Linear(config.token_dim, config.encoder_hidden_size),  # (hidden, dim)
                nn.Tanh(),
                nn.Linear(config.encoder_hidden_size, width),  # (layers·2·dim, hidden)
            )

    def reset(self, config: Any, base: Any) -> None:
        for module in self.modules():
            if isinstance(module, nn.Embedding | nn.Linear):
                module.reset_parameters()
        if config.init_weights == ZERO:  # keys that take some attention from every token, and values that add nothing
            for part in (self.transform[-1] if self.projected else self.embedding).parameters():
                nn.init.zeros_(part)

    def prompt(self, call: Call) -> Tensor:
        return self.transform(self.embedding.weight) if self.projected else self.embedding.weight

    def restore(self, name: str, value: Tensor) -> None:
        if self.projected:
            before, (count, width) = self.embedding.weight, value.shape
            self.embedding = nn.Embedding(count, width, device=before.device)  # (n, layers·2·dim)
            self.embedding.requires_grad_(before.requires_grad)
            del self.transform
            self.projected, self.unfinished = False, ""
        self.embedding.weight.data.copy_(value)
