"""P-tuning (Liu et al. 2021, https://arxiv.org/abs/2103.10385, section 3).   Pr(Y | [MLP(LSTM(P)); X]), all trained.

The encoder serves training only: what comes out of it is saved.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from trimtab.core.config import PeftType, PromptLearningConfig, help_field
from trimtab.core.method import Call
from trimtab.core.model_method import PromptMethod
from trimtab.core.report import warn

LAYERS = 2  # the default number of LSTM layers


class PromptEncoderReparameterizationType(str, enum.Enum):
    """What the prompt comes out of: an MLP, or an LSTM and an MLP behind it."""

    MLP = "MLP"
    LSTM = "LSTM"


@dataclass
class PromptEncoderConfig(PromptLearningConfig):
    """The configuration of a prompt that comes out of an encoder."""

    encoder_reparameterization_type: PromptEncoderReparameterizationType | str = help_field(
        "The encoder: MLP or LSTM.", PromptEncoderReparameterizationType.MLP
    )
    encoder_hidden_size: int | None = help_field("The encoder's width; the token dimension when None.", None)
    encoder_num_layers: int = help_field("Layers of the LSTM; the MLP always has three.", LAYERS)
    encoder_dropout: float = help_field("Dropout between the LSTM's layers.", 0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.P_TUNING
        self.encoder_reparameterization_type = PromptEncoderReparameterizationType(self.encoder_reparameterization_type)
        if self.encoder_reparameterization_type == "MLP" and self.encoder_num_layers != LAYERS:
            warn(f"`encoder_num_layers` is the LSTM's: the MLP has three layers, not {self.encoder_num_layers}.")


class PTuning(PromptMethod):
    """P (virtual tokens, dim), and the encoder it goes through in training."""

    when = "prompts for understanding tasks, trained through a network"
    example = {"num_virtual_tokens": 20}
    config = PromptEncoderConfig

    def build(self, config: Any) -> None:
        dim, width = config.token_dim, config.encoder_hidden_size
        self.embedding = nn.Embedding(config.num_virtual_tokens * config.num_transformer_submodules, dim)  # (n, dim)
        self.encoded = not config.inference_mode
        if not self.encoded:
            return
        self.unfinished = (
            "the encoder it came from: load it without is_trainable=True, or train it further as a PromptTuningConfig's"
        )
        if config.encoder_reparameterization_type == PromptEncoderReparameterizationType.MLP:
            sizes = [dim, width, width, dim]
        else:
            self.lstm_head = nn.LSTM(
                dim, width, config.encoder_num_layers, dropout=config.encoder_dropout, bidirectional=True,
                batch_first=True,
            )  # fmt: skip
            sizes = [2 * width, 2 * width, dim]
        layers = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.ReLU())]  # (out, in)
        self.mlp_head = nn.Sequential(*layers[:-1])

    def reset(self, config: Any, base: Any) -> None:
        for module in self.modules():
            if isinstance(module, nn.Embedding | nn.LSTM | nn.Linear):
                module.reset_parameters()

    def prompt(self, call: Call) -> Tensor:
        if not self.encoded:
            return self.embedding.weight
        hidden = self.lstm_head(self.embedding.weight)[0] if hasattr(self, "lstm_head") else self.embedding.weight
        out: Tensor = self.mlp_head(hidden)
        return out

    def restore(self, name: str, value: Tensor) -> None:
        for part in ("mlp_head", "lstm_head"):
            self._modules.pop(part, None)
        self.encoded, self.unfinished = False, ""
        self.embedding.weight.data.copy_(value)
