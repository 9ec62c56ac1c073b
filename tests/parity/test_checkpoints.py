"""Checkpoints of the Trainer where PEFT's do not go on where they stopped. Ours do: tests/as_peft/test_trainer.py, where
the Trainer takes our models for PEFT's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from tests.parity.models import build
from tests.parity.pairs import quiet

ROWS = [{"input_ids": row, "labels": row} for row in torch.randint(3, 40, (16, 6)).tolist()]


class FirstIsBest(TrainerCallback):
    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        metrics["eval_age"] = state.global_step


def adapted(library: Any, family: str, tmp_path: Path) -> Any:
    torch.manual_seed(3)
    base = build("llama", scale=2.0)
    common = {"task_type": "CAUSAL_LM"}
    if family == "encoded":
        config = library.PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=16, **common)
    elif family == "projected":
        config = library.PrefixTuningConfig(
            num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=8, **common
        )
    elif family == "examples":
        config = library.CPTConfig(cpt_token_ids=[5, 9, 3, 8], cpt_tokens_type_mask=[1, 2, 3, 4], **common)
    else:
        folders = {}
        for name in ("0", "1"):
            lora = library.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, **common)
            folders[name] = str(tmp_path / name)
            library.get_peft_model(build("llama"), lora).save_pretrained(folders[name])
        base.config.use_cache = False
        config = library.XLoraConfig(hidden_size=base.config.hidden_size, adapters=folders, **common)
    return quiet(library.get_peft_model, base, config)


def trainer(model: Any, folder: Path, **more: Any) -> Trainer:
    settings = TrainingArguments(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=4, learning_rate=0.05, report_to=[], use_cpu=True,
        save_steps=2, seed=3, disable_tqdm=True, lr_scheduler_type="constant", **more,
    )  # fmt: skip
    return Trainer(model=model, args=settings, train_dataset=ROWS, eval_dataset=ROWS[:8], callbacks=[FirstIsBest()])


def lost(library: Any, family: str, tmp_path: Path) -> float:
    """How far the evaluation's loss of the best model, put back at the end, is from what it was."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_age", "greater_is_better": False}
    ran = trainer(adapted(library, family, tmp_path), tmp_path / "best", eval_strategy="steps", eval_steps=2, **best)
    quiet(ran.train)
    first = next(row["eval_loss"] for row in ran.state.log_history if "eval_loss" in row)
    return abs(ran.evaluate()["eval_loss"] - first)


def apart(library: Any, family: str, tmp_path: Path) -> float:
    """How far an adapter whose training was resumed is from one whose training was not interrupted."""
    found = []
    for folder, start in ((tmp_path / "whole", None), (tmp_path / "again", str(tmp_path / "whole" / "checkpoint-2"))):
        model = adapted(library, family, tmp_path)
        quiet(trainer(model, folder).train, resume_from_checkpoint=start)
        found.append(library.get_peft_model_state_dict(model))
    return max((found[0][key] - found[1][key]).abs().max().item() for key in found[0])


@pytest.mark.parametrize("family", ["encoded", "examples"])
def test_the_best_model_is_another_one(family: str, tmp_path: Path) -> None:
    assert lost(peft, family, tmp_path) > 1e-4


def test_the_best_model_of_a_projected_prefix(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="When using prompt learning PEFT methods|size mismatch"):
        lost(peft, "projected", tmp_path)


@pytest.mark.parametrize(("family", "least"), [("encoded", 1e-2), ("examples", 1e-4)])
def test_resuming_goes_elsewhere(family: str, least: float, tmp_path: Path) -> None:
    assert apart(peft, family, tmp_path) > least


def test_resuming_a_router(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        apart(peft, "router", tmp_path)
