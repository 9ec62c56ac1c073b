"""TRL's trainers with `peft_config=`, and with a model that has an adapter already."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from tests.as_peft import tiny

SETTINGS = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "save_strategy": "no",
}


def config(**changes) -> LoraConfig:
    return LoraConfig(r=4, task_type="CAUSAL_LM", **{"target_modules": ["q_proj", "v_proj"], **changes})


def pairs() -> Dataset:
    return Dataset.from_dict(
        {
            "prompt": ["the red cat"] * 4 + ["a blue dog"] * 4,
            "chosen": [" sees a bird", " likes a fish"] * 4,
            "rejected": [" eats a small dog today", " finds one big fish"] * 4,
        }
    )


def trained(trainer) -> list[str]:
    """The parameters that training changed; it must be the trainable ones."""
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    changed = [n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])]
    assert changed
    assert set(changed) <= {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    return changed


@pytest.mark.parametrize("checkpointing", [False, True])
def test_sft(tmp_path, tokenizer, checkpointing):
    args = SFTConfig(output_dir=str(tmp_path), **SETTINGS | {"gradient_checkpointing": checkpointing}, max_length=16)
    trainer = SFTTrainer(
        model=tiny.llama(len(tokenizer)),
        args=args,
        train_dataset=Dataset.from_dict({"text": tiny.SENTENCES}),
        peft_config=config(),
        processing_class=tokenizer,
    )
    assert isinstance(trainer.model, PeftModel)
    assert all(".default." in n for n in trained(trainer))
    trainer.save_model()
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {p.name for p in tmp_path.iterdir()}
    again = PeftModel.from_pretrained(tiny.llama(len(tokenizer)), tmp_path)
    ids = tiny.batch(vocab=len(tokenizer))
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, trainer.model.eval()(ids).logits)


def test_dpo_with_a_config_takes_the_base_as_its_reference(tmp_path, tokenizer):
    trainer = DPOTrainer(
        model=tiny.llama(len(tokenizer)),
        args=DPOConfig(output_dir=str(tmp_path), **SETTINGS),
        train_dataset=pairs(),
        peft_config=config(),
        processing_class=tokenizer,
    )
    trained(trainer)
    # B starts at zero: model and reference agree, and the loss is -log(1/2).
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert trainer.state.log_history[1]["loss"] < 0.6931


def test_dpo_of_a_trained_adapter_takes_a_copy_of_it_as_its_reference(tmp_path, tokenizer):
    model = get_peft_model(tiny.llama(len(tokenizer)), config())
    tiny.moved(model)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(output_dir=str(tmp_path), **SETTINGS),
        train_dataset=pairs(),
        processing_class=tokenizer,
    )
    assert set(trainer.model.peft_config) == {"default", "ref"}
    changed = trained(trainer)
    assert all(".default." in n for n in changed)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=1e-4)  # the copy is exact
    for name, value in start.items():
        if ".default." in name:
            torch.testing.assert_close(dict(model.named_parameters())[name.replace(".default.", ".ref.")], value)
    assert model.active_adapters == ["default"]


def test_grpo(tmp_path, tokenizer):
    args = GRPOConfig(
        output_dir=str(tmp_path),
        **SETTINGS,
        num_generations=4,
        max_completion_length=6,
        beta=0.1,
        temperature=1.0,
    )
    trainer = GRPOTrainer(
        model=tiny.llama(len(tokenizer)),
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["the red cat", "a blue dog"] * 4}),
        reward_funcs=lambda completions, **_: [float(len(set(c.split()))) + 0.1 * i for i, c in enumerate(completions)],
        peft_config=config(),
        processing_class=tokenizer,
    )
    assert all(".default." in n for n in trained(trainer))
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in trainer.state.log_history if "loss" in row)
    assert "kl" in trainer.state.log_history[0]
