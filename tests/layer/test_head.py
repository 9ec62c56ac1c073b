"""The head and the loss in one step, inside the model's own forward."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Trainer,
    TrainingArguments,
)

from tests.contract.cases import move, tensors
from tests.models import LLAMA, classifier, gpt2, llama, tokens
from trimtab import LoraConfig, get_peft_model
from trimtab.layer.head import fuse_loss

TARGETS = ["q_proj", "down_proj"]


def adapted(base: Any = None, **options: Any) -> Any:
    base = llama() if base is None else base
    targets = TARGETS if "target_modules" not in options else options.pop("target_modules")
    model = get_peft_model(base, LoraConfig(r=3, target_modules=targets, **options))
    move(model, "default")
    return model.train()


def batch(masked: int = 4) -> dict[str, Tensor]:
    ids = tokens(3, 9, 64)
    labels = ids.clone()
    labels[:, :masked] = -100
    labels[1, 6:] = -100
    return {"input_ids": ids, "labels": labels}


def step(model: Any, **inputs: Any) -> dict[str, Tensor]:
    torch.manual_seed(3)
    model.zero_grad()
    out = model(**{**batch(), **inputs})
    out.loss.backward()
    return {"loss": out.loss.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (found[name] - value).norm() <= tolerance * value.norm(), name


@pytest.mark.parametrize(
    "inputs",
    [
        {},
        {"num_items_in_batch": torch.tensor(31)},
        {"num_items_in_batch": 7},
        {"logits_to_keep": torch.arange(2, 9), "labels": batch()["labels"][:, 2:]},
        {"shift_labels": batch()["labels"].roll(-1, 1)},
        {"labels": torch.full((3, 9), -100), "num_items_in_batch": 7},
        {"attention_mask": torch.ones(3, 9).triu(-5)},
    ],
    ids=["mean", "items", "count", "sliced", "shifted", "nothing supervised", "masked"],
)
@pytest.mark.parametrize("base", [llama, gpt2], ids=["llama", "gpt2"])
def test_loss_and_gradients_are_the_models_own(base: Any, inputs: dict[str, Any]) -> None:
    model = adapted(base(), target_modules=TARGETS if base is llama else ["c_attn"], lora_dropout=0.2)
    wanted = step(model, **inputs)
    fused = fuse_loss(model)
    assert fused is not None
    assert_same(step(model, **inputs), wanted)
    assert model(**batch()).logits is None, "it was fused"
    fused.remove()
    assert model(**batch()).logits.shape[-1] == 64
    assert_same(step(model, **inputs), wanted, 0)


def test_outside_training_nothing_changes() -> None:
    model = adapted()
    fuse_loss(model)
    assert model(input_ids=batch()["input_ids"]).logits is not None
    assert len(model(**batch(), return_dict=False)[1].shape) == 3
    with torch.no_grad():
        assert model(**batch()).logits is not None
    assert model.eval()(**batch()).logits is not None


def test_other_outputs_are_there() -> None:
    model = adapted()
    fuse_loss(model)
    out = model(**batch(), output_hidden_states=True)
    assert len(out.hidden_states) == LLAMA["num_hidden_layers"] + 1
    assert "logits" not in out


def test_a_model_that_alters_its_logits_is_left_alone() -> None:
    small = {k: v for k, v in LLAMA.items() if k != "pad_token_id"}
    capped = Gemma2ForCausalLM(Gemma2Config(**small, head_dim=4, final_logit_softcapping=5.0))
    scaled = CohereForCausalLM(CohereConfig(**small, logit_scale=0.5))
    for base in (capped, scaled, classifier()):
        model = adapted(base)
        before, state = step_or_none(model), torch.get_rng_state()
        assert fuse_loss(model) is None
        assert torch.equal(torch.get_rng_state(), state)
        assert "_loss_function" not in base.__dict__
        if before:
            assert_same(step(model), before, 0)


def step_or_none(model: Any) -> dict[str, Tensor] | None:
    return None if hasattr(model.get_base_model(), "score") else step(model)


def test_a_head_with_an_adapter_or_a_hook_is_left_alone() -> None:
    assert fuse_loss(adapted(target_modules=["q_proj", "lm_head"])) is None
    assert fuse_loss(adapted(modules_to_save=["lm_head"])) is None
    model = adapted()
    wanted = step(model)
    fuse_loss(model)
    seen: list[Any] = []
    model.get_base_model().lm_head.register_forward_hook(lambda m, args, y: seen.append(y.shape))
    assert_same(step(model), wanted, 0)
    assert seen == [(3, 9, 64)]


def test_a_trained_head() -> None:
    model = llama().train()
    wanted = step(model)
    fuse_loss(model)
    assert_same(step(model), wanted)
    assert "lm_head.weight" in wanted


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_and_autocast(reentrant: bool) -> None:
    model = adapted()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    wanted = step(model)
    with torch.autocast("cpu", torch.bfloat16):
        half = step(model)
    fuse_loss(model)
    assert_same(step(model), wanted)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(step(model), half, 0.03)


@pytest.mark.usefixtures("one_process")
def test_sharded_parameters() -> None:
    """Under FSDP 2, the head in the root's shard, or in one of its own."""
    for own in (False, True):
        model = adapted()
        wanted, mesh = step(model), init_device_mesh("cpu", (1,))
        fused = fuse_loss(model)
        assert fused is not None
        for part in (*model.get_base_model().model.layers, *([model.get_output_embeddings()] if own else [])):
            fully_shard(part, mesh=mesh)
        fully_shard(model, mesh=mesh)
        for _ in range(2):
            found = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in step(model).items()}
            assert_same(found, wanted)


def test_copies_and_errors() -> None:
    """A copy is fused in itself; a forward that fails leaves nothing behind."""
    model = adapted()
    wanted = step(model)
    fuse_loss(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(step(twin), wanted)
        move(twin, "default")
        assert not torch.equal(step(twin)["loss"], wanted["loss"])
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.tensor([[999]]), labels=torch.tensor([[1]]))
    assert "forward" not in model.get_base_model().lm_head.__dict__
    assert_same(step(model), wanted)


def test_the_trainer_of_transformers(tmp_path: Path) -> None:
    """The same losses, evaluation included."""
    rows = [{k: v[i].tolist() for k, v in batch(i).items()} for i in range(3) for _ in range(4)]
    losses, weights = [], []
    for fused in (False, True):
        model = adapted(lora_dropout=0.1)
        if fused:
            assert fuse_loss(model) is not None
        arguments = TrainingArguments(
            str(tmp_path), max_steps=4, gradient_accumulation_steps=2, per_device_train_batch_size=2, logging_steps=1,
            learning_rate=1e-2, report_to=[], use_cpu=True, seed=3, eval_strategy="steps", eval_steps=2,
            remove_unused_columns=False,
        )  # fmt: skip
        data = Dataset.from_list(rows)
        trainer = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)
        trainer.train()
        losses.append([v for row in trainer.state.log_history for k, v in row.items() if k in ("loss", "eval_loss")])
        weights.append({n: p.detach().clone() for n, p in tensors(model).items()})
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert_same(weights[1], weights[0], 1e-3)
