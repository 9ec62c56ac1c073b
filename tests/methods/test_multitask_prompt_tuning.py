"""Multitask prompts in plain loops, and what they start from."""

from __future__ import annotations

import pytest
import torch

from tests.methods.nets import numbers, same
from tests.models import llama, tokens
from trimtab import MultitaskPromptTuningConfig, PeftModel, get_peft_model


def model(**fields):
    config = MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, **{"num_tasks": 4, "num_ranks": 2, **fields}
    )
    return get_peft_model(llama().double(), config).double().eval()


def test_formula() -> None:
    adapted = model()
    own = adapted.prompt_encoder["default"]
    P, U, V = (numbers(t) for t in (own.embedding.weight, own.prefix_task_cols, own.prefix_task_rows))
    want = [
        [[p * sum(U[k][i][r] * V[k][r][j] for r in range(2)) for j, p in enumerate(row)] for i, row in enumerate(P)]
        for k in (3, 0, 3)
    ]
    same(adapted.get_prompt(3, task_ids=torch.tensor([3, 0, 3])), want)


def test_each_row_gets_its_task_s_prompt() -> None:
    adapted, x = model(), tokens(vocabulary=64)
    together = adapted(x, task_ids=torch.arange(len(x))).logits
    for task, row in enumerate(x):
        same(adapted(row[None], task_ids=[task]).logits[0], together[task])
    with pytest.raises(ValueError, match="task_ids"):
        adapted(x)


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("init", ["AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"])
def test_starts_from_source_tasks(init: str, tasks: int, tmp_path) -> None:
    source = model()
    source.save_pretrained(tmp_path)
    started = model(
        num_tasks=tasks, prompt_tuning_init=init, prompt_tuning_init_task=2,
        prompt_tuning_init_state_dict_path=str(tmp_path / "adapter_model.safetensors"),
    ).prompt_encoder["default"]  # fmt: skip
    old = source.prompt_encoder["default"]
    same(started.embedding.weight, old.embedding.weight)
    wanted = {"AVERAGE_SOURCE_TASKS": old.prefix_task_cols.mean(0), "EXACT_SOURCE_TASK": old.prefix_task_cols[2]}
    for own in started.prefix_task_cols:
        if init in wanted:
            same(own, wanted[init], 1e-8)  # a prompt is made in fp32
        else:
            assert own.abs().max() < 0.2


def test_a_source_must_be_named_and_is_not_needed_again(tmp_path) -> None:
    with pytest.raises(ValueError, match="prompt_tuning_init_state_dict_path"):
        model(prompt_tuning_init="EXACT_SOURCE_TASK")
    source = model()
    source.save_pretrained(tmp_path / "source")
    path = tmp_path / "source" / "adapter_model.safetensors"
    started = model(prompt_tuning_init="ONLY_SOURCE_SHARED", prompt_tuning_init_state_dict_path=str(path))
    started.save_pretrained(tmp_path / "started")
    path.unlink()
    loaded = PeftModel.from_pretrained(llama().double(), tmp_path / "started")
    x = tokens(vocabulary=64)
    same(loaded(x, task_ids=[1] * len(x)).logits, started(x, task_ids=[1] * len(x)).logits, 1e-6)
