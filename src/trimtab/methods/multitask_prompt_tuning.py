"""Multitask prompts (Wang et al. 2023, https://arxiv.org/abs/2303.02861, eq. 1).   Pr(Y | [P ∘ (U_k V_k); X]).

The prompt P is shared; each task k has a low-rank U_k V_k that scales it. A call says its rows' tasks by `task_ids`.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.core.config import PeftType, help_field
from trimtab.core.method import Call, require_rank
from trimtab.core.model_method import PROMPT, PromptMethod
from trimtab.errors import ConfigError
from trimtab.methods.prompt_tuning import PromptTuningConfig

COLS, ROWS = "prefix_task_cols", "prefix_task_rows"


class MultitaskPromptTuningInit(str, enum.Enum):
    """How it starts: from a text, at random, or from what was trained on source tasks.

    Of a file of source tasks: the shared prompt with the mean of their factors, with those of one task, or alone.
    """

    TEXT = "TEXT"
    RANDOM = "RANDOM"
    AVERAGE_SOURCE_TASKS = "AVERAGE_SOURCE_TASKS"
    EXACT_SOURCE_TASK = "EXACT_SOURCE_TASK"
    ONLY_SOURCE_SHARED = "ONLY_SOURCE_SHARED"


Init = MultitaskPromptTuningInit


@dataclass
class MultitaskPromptTuningConfig(PromptTuningConfig):
    """The configuration of a prompt that tasks share."""

    starts: ClassVar[type[enum.Enum]] = Init

    prompt_tuning_init: Init | str = help_field(  # type: ignore[assignment]
        "TEXT, RANDOM, AVERAGE_SOURCE_TASKS, EXACT_SOURCE_TASK or ONLY_SOURCE_SHARED.", Init.RANDOM
    )
    prompt_tuning_init_state_dict_path: str | None = help_field("The file of source tasks to start from.", None)
    prompt_tuning_init_task: int | None = help_field("Which of its tasks EXACT_SOURCE_TASK takes.", 0)
    num_ranks: int | None = help_field("The rank of each task's matrix.", 1)
    num_tasks: int | None = help_field("The number of tasks.", 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.MULTITASK_PROMPT_TUNING
        start = Init(self.prompt_tuning_init)
        sourced = start not in (Init.TEXT, Init.RANDOM) and not self.inference_mode
        if sourced and not self.prompt_tuning_init_state_dict_path:
            raise ConfigError(
                f"prompt_tuning_init_state_dict_path needs to be specified with {start.value} init method"
            )
        require_rank(self.num_ranks, "num_ranks")
        require_rank(self.num_tasks, "num_tasks")


class MultitaskPromptTuning(PromptMethod):
    """P (virtual tokens, dim), U (tasks, virtual tokens, ranks), V (tasks, ranks, dim)."""

    when = "one prompt that many tasks start from"
    example = {"num_virtual_tokens": 20}
    config, extras = MultitaskPromptTuningConfig, ("task_ids",)

    def build(self, config: Any) -> None:
        count = config.num_virtual_tokens * config.num_transformer_submodules
        tasks, ranks = config.num_tasks, config.num_ranks
        self.prefix_task_cols = nn.Parameter(torch.empty(tasks, count, ranks))  # (tasks, n, ranks)
        self.prefix_task_rows = nn.Parameter(torch.empty(tasks, ranks, config.token_dim))  # (tasks, ranks, dim)
        self.embedding = nn.Embedding(count, config.token_dim)  # (n, dim)

    def reset(self, config: Any, base: Any) -> None:
        nn.init.normal_(self.prefix_task_cols, std=0.02)
        nn.init.normal_(self.prefix_task_rows, std=0.02)
        nn.init.normal_(self.embedding.weight)
        start = config.prompt_tuning_init
        if config.inference_mode or start == Init.RANDOM:
            return
        if start == Init.TEXT:
            table = base.get_input_embeddings()
            tokens = config.text(len(self.embedding.weight)).to(table.weight.device)
            self.embedding.weight.data.copy_(table(tokens).detach())
            return
        source = _read(config.prompt_tuning_init_state_dict_path)
        self.restore(PROMPT, source[PROMPT])
        for name in () if start == Init.ONLY_SOURCE_SHARED else (COLS, ROWS):
            one = source[name].mean(0) if start == Init.AVERAGE_SOURCE_TASKS else source[name][_task(config)]
            self.restore(name, one.expand_as(getattr(self, name)))  # every task starts from it

    def prompt(self, call: Call) -> Tensor:
        tasks = call.extras.get("task_ids")
        if tasks is None:
            raise ValueError("task_ids cannot be None: say the task of each row, `model(..., task_ids=tensor)`.")
        tasks = torch.as_tensor(tasks, device=self.embedding.weight.device)
        return self.embedding.weight * (self.prefix_task_cols[tasks] @ self.prefix_task_rows[tasks])  # (rows, n, dim)

    def saved(self) -> dict[str, Tensor]:
        return {COLS: self.prefix_task_cols, ROWS: self.prefix_task_rows, PROMPT: self.embedding.weight}

    def restore(self, name: str, value: Tensor) -> None:
        (self.embedding.weight if name == PROMPT else getattr(self, name)).data.copy_(value)


def _task(config: Any) -> int:
    if config.prompt_tuning_init_task is None:
        raise ConfigError("prompt_tuning_init_task has to be specified with EXACT_SOURCE_TASK.")
    return int(config.prompt_tuning_init_task)


def _read(path: str) -> dict[str, Tensor]:
    """The tensors of an adapter's file, safetensors or pickled."""
    if Path(path).suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    found: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return found
