"""Prompt tuning (Lester et al. 2021, https://arxiv.org/abs/2104.08691, section 2).   Pr(Y | [P; X]),   P trained."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.core.config import PeftType, PromptLearningConfig, help_field
from trimtab.core.method import Call
from trimtab.core.model_method import PromptMethod
from trimtab.errors import ConfigError


class PromptTuningInit(str, enum.Enum):
    """How a prompt starts: as the embeddings of a text, of tokens drawn from the vocabulary, or at random."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


@dataclass
class PromptTuningConfig(PromptLearningConfig):
    """The configuration of a trained prompt."""

    starts: ClassVar[type[enum.Enum]] = PromptTuningInit  # how it may start

    prompt_tuning_init: PromptTuningInit | str = help_field("TEXT, SAMPLE_VOCAB or RANDOM.", PromptTuningInit.RANDOM)
    prompt_tuning_init_text: str | None = help_field("The text to start from.", None)
    tokenizer_name_or_path: str | None = help_field("The tokenizer that reads the text.", None)
    tokenizer_kwargs: dict[str, Any] | None = help_field("Arguments of its from_pretrained.", None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.PROMPT_TUNING
        self.prompt_tuning_init = self.starts(self.prompt_tuning_init)  # type: ignore[assignment]
        if self.prompt_tuning_init == "TEXT":
            for name in ("tokenizer_name_or_path", "prompt_tuning_init_text"):
                if not getattr(self, name):
                    raise ConfigError(f"When prompt_tuning_init='TEXT', {name} can't be {getattr(self, name)!r}.")
        elif self.tokenizer_kwargs:
            raise ConfigError("tokenizer_kwargs only valid when using prompt_tuning_init='TEXT'.")

    def text(self, count: int) -> Tensor:
        """The ids of the text to start from, over and over, `count` of them."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.tokenizer_name_or_path, **(self.tokenizer_kwargs or {}))
        text = tokenizer(self.prompt_tuning_init_text)["input_ids"]
        return torch.tensor((text * (count // len(text) + 1))[:count])


class PromptTuning(PromptMethod):
    """P (virtual tokens, dim)."""

    when = "large models, many tasks, tiny files"
    example = {"num_virtual_tokens": 20}
    config = PromptTuningConfig

    def build(self, config: Any) -> None:
        total = config.num_virtual_tokens * config.num_transformer_submodules
        self.embedding = nn.Embedding(total, config.token_dim)  # (n, dim)

    def reset(self, config: Any, base: Any) -> None:
        count, table = len(self.embedding.weight), base.get_input_embeddings()
        if config.prompt_tuning_init == PromptTuningInit.RANDOM:
            nn.init.normal_(self.embedding.weight)
            return
        if config.prompt_tuning_init == PromptTuningInit.SAMPLE_VOCAB:
            tokens = torch.randint(0, table.num_embeddings, (count,))
        else:
            tokens = config.text(count)
        self.embedding.weight.data.copy_(table(tokens.to(table.weight.device)).detach())

    def prompt(self, call: Call) -> Tensor:
        return self.embedding.weight

    def restore(self, name: str, value: Tensor) -> None:
        self.embedding.weight.data.copy_(value)
