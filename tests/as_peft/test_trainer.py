"""The Hugging Face Trainer with adapters: columns, checkpoints, resuming, the best model, gradient checkpointing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import (
    AdaLoraConfig,
    CPTConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
    TrainableTokensConfig,
    XLoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from transformers import Trainer, TrainerCallback, TrainingArguments

from tests.as_peft import tiny


def data(rows: int = 16, unused: bool = True) -> Dataset:
    ids = tiny.batch(rows).tolist()
    columns = {"input_ids": ids, "labels": ids, "attention_mask": [[1] * 8] * rows}
    return Dataset.from_dict(columns | ({"text": ["not a column of the model"] * rows} if unused else {}))


def arguments(folder: Path, **changes) -> TrainingArguments:
    settings = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "save_steps": 2,
        "seed": 3,
    }
    return TrainingArguments(**settings | changes)


def adapted(**config) -> PeftModel:
    return get_peft_model(
        tiny.llama(),
        LoraConfig(task_type=TaskType.CAUSAL_LM, r=4, **{"target_modules": ["q_proj", "v_proj"], **config}),
    )


def losses(trainer: Trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def test_training_changes_only_the_adapter_and_drops_unused_columns(tmp_path):
    model = adapted()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer = Trainer(model=model, args=arguments(tmp_path, max_steps=8, learning_rate=5e-2), train_dataset=data(4))
    trainer.train()
    assert trainer._signature_columns[:4] == ["input_ids", "attention_mask", "position_ids", "past_key_values"]
    assert len(losses(trainer)) == 8
    assert losses(trainer)[-1] < losses(trainer)[0]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == ("lora_" not in name), name


def test_checkpoints_hold_the_adapter_only_and_resume_where_they_stopped(tmp_path):
    whole = Trainer(model=adapted(), args=arguments(tmp_path / "whole", max_steps=4), train_dataset=data())
    whole.train()
    folder = tmp_path / "whole" / "checkpoint-2"
    names = {p.name for p in folder.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "trainer_state.json"} <= names
    assert "model.safetensors" not in names
    resumed = Trainer(model=adapted(), args=arguments(tmp_path / "again", max_steps=4), train_dataset=data())
    resumed.train(resume_from_checkpoint=str(folder))
    assert resumed.state.global_step == 4
    assert losses(resumed)[-2:] == pytest.approx(losses(whole)[-2:], abs=1e-6)
    ours = dict(resumed.model.named_parameters())
    for name, parameter in whole.model.named_parameters():
        torch.testing.assert_close(parameter, ours[name], atol=1e-6, rtol=0)


def test_the_best_model_comes_back_at_the_end(tmp_path):
    settings = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "learning_rate": 1e-2,
        "save_total_limit": 2,
    }
    model = adapted()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    # The learning rate explodes after step 2, so that the best model is not the last.
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 2 else 1e4)
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path, **settings),
        train_dataset=data(),
        eval_dataset=data(8),
        optimizers=(optimizer, schedule),
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    best = min(row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best, abs=1e-6)


FAMILIES = {
    "whole": lambda: LoraConfig(task_type=TaskType.CAUSAL_LM, r=4, modules_to_save=["lm_head"]),
    "tokens": lambda: LoraConfig(task_type=TaskType.CAUSAL_LM, r=4, trainable_token_indices=[3, 4]),
    "tokens-alone": lambda: TrainableTokensConfig(task_type=TaskType.CAUSAL_LM, token_indices=list(range(4, 20))),
    "prompt": lambda: PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4),
    "prefix": lambda: PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4),
    "examples": lambda: CPTConfig(
        task_type=TaskType.CAUSAL_LM, cpt_token_ids=[5, 9, 3, 8], cpt_tokens_type_mask=[1, 2, 3, 4]
    ),
    "ranks": lambda: AdaLoraConfig(
        task_type=TaskType.CAUSAL_LM, total_step=8, tinit=1, tfinal=2, init_r=4, target_r=2, target_modules=["q_proj"]
    ),
}
NETWORKS = {
    "projected": lambda: PrefixTuningConfig(
        task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=16
    ),
    "encoded": lambda: PromptEncoderConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4, encoder_hidden_size=16),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_resumes_where_it_stopped(tmp_path, family):
    trained = []
    for folder, start in (("whole", None), ("again", str(tmp_path / "whole" / "checkpoint-2"))):
        model = get_peft_model(tiny.llama(), FAMILIES[family]())
        trainer = Trainer(model=model, args=arguments(tmp_path / folder, learning_rate=0.05), train_dataset=data())
        trainer.train(resume_from_checkpoint=start)
        trained.append(get_peft_model_state_dict(model))
    assert trained[0].keys() == trained[1].keys()
    for name, tensor in trained[0].items():
        torch.testing.assert_close(trained[1][name], tensor, atol=2e-6, rtol=0)


def test_a_router_among_adapters_resumes_where_it_stopped(tmp_path):
    for name in ("0", "1"):
        adapted(init_lora_weights=False).save_pretrained(tmp_path / name)
    trained = []
    for folder, start in (("whole", None), ("again", str(tmp_path / "whole" / "checkpoint-2"))):
        adapters = {name: str(tmp_path / name) for name in ("0", "1")}
        config = XLoraConfig(task_type=TaskType.CAUSAL_LM, hidden_size=32, adapters=adapters)
        torch.manual_seed(0)
        model = get_peft_model(tiny.llama(use_cache=False), config)
        trainer = Trainer(model=model, args=arguments(tmp_path / folder, learning_rate=0.05), train_dataset=data())
        trainer.train(resume_from_checkpoint=start)
        trained.append(get_peft_model_state_dict(model))
    for name, tensor in trained[0].items():
        torch.testing.assert_close(trained[1][name], tensor, atol=2e-6, rtol=0)


class FirstIsBest(TrainerCallback):
    """Whatever the losses say."""

    def on_evaluate(self, args, state, control, metrics, **_):
        metrics["eval_age"] = state.global_step


@pytest.mark.parametrize("family", [*FAMILIES, *NETWORKS])
def test_the_best_model_of_every_family_comes_back(tmp_path, family):
    """Also of prompts whose file has what comes out of a network, not the network: they are used from then on."""
    model = get_peft_model(tiny.llama(), {**FAMILIES, **NETWORKS}[family]())
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_age", "greater_is_better": False}
    settings = arguments(tmp_path, learning_rate=0.5, eval_strategy="steps", eval_steps=2, **best)
    sets = {"train_dataset": data(), "eval_dataset": data(8)}
    trainer = Trainer(model=model, args=settings, callbacks=[FirstIsBest()], **sets)
    trainer.train()
    first, last = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert first != pytest.approx(last, abs=1e-4)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(first, abs=1e-5)
    trainer.save_model(str(tmp_path / "best"))
    again = PeftModel.from_pretrained(tiny.llama(), tmp_path / "best")
    ids = tiny.batch(2)
    torch.testing.assert_close(again(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


@pytest.mark.parametrize("family", NETWORKS)
def test_training_does_not_go_on_from_what_came_out_of_a_network(tmp_path, family):
    for start in (None, str(tmp_path / "checkpoint-2")):
        model = get_peft_model(tiny.llama(), NETWORKS[family]())
        trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=data())
        if start is None:
            trainer.train()
            continue
        with pytest.raises(RuntimeError, match=r"not the .* it came from"):
            trainer.train(resume_from_checkpoint=start)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_losses(tmp_path, reentrant):
    plain = Trainer(model=adapted(), args=arguments(tmp_path / "plain"), train_dataset=data())
    plain.train()
    settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    checked = Trainer(model=adapted(), args=arguments(tmp_path / "checked", **settings), train_dataset=data())
    checked.train()
    assert losses(checked) == pytest.approx(losses(plain), abs=1e-6)


def test_a_methods_penalty_is_in_the_loss(tmp_path):
    firsts = []
    for weight in (0.1, 0.2, 0.3):
        config = AdaLoraConfig(task_type="CAUSAL_LM", init_r=4, target_r=2, total_step=10, orth_reg_weight=weight)
        torch.manual_seed(0)
        model = get_peft_model(tiny.llama(), config)
        trainer = Trainer(model=model, args=arguments(tmp_path, max_steps=1), train_dataset=data())
        trainer.train()
        firsts.append(losses(trainer)[0])
    assert firsts[1] > firsts[0]
    assert firsts[2] - firsts[1] == pytest.approx(firsts[1] - firsts[0], rel=1e-3)


def test_a_classifier_trains_and_saves_its_head(tmp_path):
    model = get_peft_model(tiny.bert(), LoraConfig(task_type=TaskType.SEQ_CLS, r=4))
    rows = Dataset.from_dict({"input_ids": tiny.batch(16).tolist(), "label": [i % 2 for i in range(16)]})
    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=rows, eval_dataset=rows)
    trainer.train()
    assert "eval_loss" in trainer.evaluate()
    trainer.save_model()
    again = PeftModel.from_pretrained(tiny.bert(), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again(tiny.batch()).logits, trainer.model.eval()(tiny.batch()).logits)


def test_the_model_card_names_the_adapter(tmp_path):
    trainer = Trainer(model=adapted(), args=arguments(tmp_path, max_steps=1), train_dataset=data())
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(model_name="tiny")
    assert "library_name: peft" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("middle", [2, 4])
def test_adalora_prunes_with_nobody_calling_anything_and_resumes_with_its_averages(tmp_path, middle):
    def model():
        torch.manual_seed(0)
        schedule = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 1, "total_step": 6}
        return get_peft_model(
            tiny.llama(), AdaLoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], **schedule)
        )

    def train(folder, resume=None):
        made = arguments(tmp_path / folder, max_steps=6, save_steps=2)
        trainer = Trainer(model=model(), args=made, train_dataset=data())
        trainer.train(resume_from_checkpoint=resume)
        adapter = trainer.model.graft.adapters["default"]
        tensors = {f"{m.site.name}.{leaf}": m.tensor(leaf) for m in adapter.methods for leaf in m.declared}
        return adapter.t, adapter.config.rank_pattern, tensors

    t, pattern, tensors = train("whole")
    assert t == 6
    assert sum(map(sum, pattern.values())) == 2 * len(pattern)
    again = train("again", str(tmp_path / "whole" / f"checkpoint-{middle}"))
    assert again[:2] == (t, pattern)
    for key, tensor in tensors.items():
        torch.testing.assert_close(again[2][key], tensor, atol=1e-6, rtol=0)
