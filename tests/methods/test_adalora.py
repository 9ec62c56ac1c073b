"""AdaLoRA: the formula, the penalty and the budget of the paper in plain loops."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from tests.methods.nets import adapted, check_gradients, image, merged, merging_changes_nothing, numbers, same
from tests.models import llama, tokens
from trimtab import AdaLoraConfig, PeftModel, get_peft_model

SCHEDULE = {"init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 3, "deltaT": 2, "total_step": 12}


def test_formula() -> None:
    model = adapted(AdaLoraConfig(target_modules=["linear"], init_r=3, lora_alpha=5, total_step=9))
    layer = model.get_base_model().linear
    A, B, E = (numbers(getattr(layer, name)["default"]) for name in ("lora_A", "lora_B", "lora_E"))
    W = numbers(layer.base_layer.weight)
    s = 5 / (3 + 1e-5)
    for i, row in enumerate(W):
        for j in range(len(row)):
            row[j] += s * sum(B[i][k] * E[k][0] * A[k][j] for k in range(3))
    same(merged(model, "linear"), W)
    merging_changes_nothing(model, image())
    check_gradients(model, image())


@pytest.mark.parametrize("name", ["conv", "point"])
def test_convolutions(name: str) -> None:
    model = adapted(AdaLoraConfig(target_modules=[name], init_r=3, total_step=9))
    merging_changes_nothing(model, image())
    check_gradients(model, image())


def trained(config: AdaLoraConfig, steps: int, watch: Any = None) -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(llama(), config).train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for t in range(1, steps + 1):
        x = tokens(vocabulary=64, seed=t)
        model(input_ids=x, labels=x).loss.backward()
        optimiser.step()
        model.update_and_allocate(t)
        if watch is not None:
            watch(t, model)
        optimiser.zero_grad()
    return model


def adapters(model: PeftModel) -> list[Any]:
    return [m for m in model.modules() if hasattr(m, "lora_E") and hasattr(m, "base_layer")]


def test_penalty_is_added_to_the_loss_in_training_only() -> None:
    model = get_peft_model(llama(), AdaLoraConfig(init_r=4, total_step=12, orth_reg_weight=0.3))
    terms = []
    for layer in adapters(model):
        A, B = numbers(layer.lora_A["default"]), numbers(layer.lora_B["default"].T)
        for M in (A, B):
            gram = [[sum(a * b for a, b in zip(x, y)) - (i == j) for j, y in enumerate(M)] for i, x in enumerate(M)]
            terms.append(math.sqrt(sum(g * g for row in gram for g in row)))
    x = tokens(vocabulary=64)
    plain = model.eval()(input_ids=x, labels=x).loss
    penalised = model.train()(input_ids=x, labels=x).loss
    assert abs(float((penalised - plain).detach()) - 0.3 * sum(terms) / len(terms)) < 1e-5
    with model.disable_adapter():
        same(model(input_ids=x, labels=x).loss.detach(), plain.detach(), 1e-6)


def test_budget_and_importance() -> None:
    """The whole schedule: which triplets are left after each step follows from the gradients seen so far."""
    config = AdaLoraConfig(**SCHEDULE)
    averages: dict[tuple[int, str], tuple[Any, Any]] = {}
    held: dict[tuple[int, str], torch.Tensor] = {}  # after the optimiser's step, before anything is cut
    left: list[list[bool]] = []

    def watch(t: int, model: PeftModel) -> None:
        nonlocal left
        layers = adapters(model)
        end = config.total_step - config.tfinal
        scores = []
        for n, layer in enumerate(layers if t <= end else ()):
            parts = {}
            for name in ("lora_A", "lora_B", "lora_E"):
                p = getattr(layer, name)["default"]
                I, U = averages.get((n, name), (torch.zeros_like(p), torch.zeros_like(p)))
                if t < end:  # the last cut goes by what was seen before it
                    now = (held[n, name] * p.grad).abs().detach()
                    I = config.beta1 * I + (1 - config.beta1) * now
                    U = config.beta2 * U + (1 - config.beta2) * (now - I).abs()
                averages[n, name] = I, U
                parts[name] = numbers(I * U)
            A, B, E = parts["lora_A"], parts["lora_B"], parts["lora_E"]
            for k in range(config.init_r):
                mean = sum(A[k]) / len(A[k]) + sum(row[k] for row in B) / len(B)
                scores.append((E[k][0] + mean, n, k))
        if t == end or (config.tinit < t < end and t % config.deltaT == 0):
            total = config.init_r * len(layers)
            ratio = 1 - (t - config.tinit) / (end - config.tinit)
            final = config.target_r * len(layers)
            budget = int((total - final) * ratio**3 + final)
            left = [[False] * config.init_r for _ in layers]
            for _, n, k in sorted(scores, reverse=True)[:budget]:
                left[n][k] = True
        pattern = model.peft_config["default"].rank_pattern
        assert list((pattern or {}).values()) == left
        cut_now = t >= end or (left and t % config.deltaT == 0)
        for layer, keep in zip(layers, left, strict=False):
            if cut_now:
                assert [bool(e) for e in layer.lora_E["default"]] == keep

    def remember(optimiser: Any, args: Any, kwargs: Any) -> None:
        for i, p in enumerate(optimiser.param_groups[0]["params"]):
            held[i // 3, ("lora_A", "lora_B", "lora_E")[i % 3]] = p.detach().clone()

    hook = register_optimizer_step_post_hook(remember)
    model = trained(config, 14, watch)
    hook.remove()
    assert sum(map(sum, left)) == config.target_r * len(adapters(model))


def test_the_file_has_what_is_left(tmp_path: Path) -> None:
    model = trained(AdaLoraConfig(**SCHEDULE), 12).eval()
    x = tokens(vocabulary=64)
    y = model(x).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    pattern = model.peft_config["default"].rank_pattern
    assert [len(a.lora_E["default"]) for a in adapters(loaded)] == [sum(v) for v in pattern.values()]
    assert len({len(a.lora_E["default"]) for a in adapters(loaded)}) > 1
    same(loaded(x).logits, y, 1e-6)
    loaded.merge_adapter()
    same(loaded(x).logits, y, 1e-6)


def test_training_goes_on_from_a_file_and_a_file_goes_back_into_a_trained_model(tmp_path: Path) -> None:
    x = tokens(vocabulary=64)
    model = trained(AdaLoraConfig(**SCHEDULE), 12)
    model.save_pretrained(tmp_path / "best")
    y = model.eval()(x).logits
    again = PeftModel.from_pretrained(llama(), tmp_path / "best", is_trainable=True)
    for t in (5, 6, 13):  # whatever step it takes up
        again(input_ids=x, labels=x).loss.backward()
        again.update_and_allocate(t)
    again.save_pretrained(tmp_path / "further")
    same(PeftModel.from_pretrained(llama(), tmp_path / "further")(x).logits, again.eval()(x).logits, 1e-6)
    early = trained(AdaLoraConfig(**SCHEDULE), 3)
    early.load_adapter(tmp_path / "best", "default", is_trainable=True)  # as load_best_model_at_end does
    same(early.eval()(x).logits, y, 1e-6)
    early.save_pretrained(tmp_path / "once more")
    same(PeftModel.from_pretrained(llama(), tmp_path / "once more")(x).logits, y, 1e-6)


def test_an_adapter_that_was_cut_down_to_its_pattern_goes_on(tmp_path: Path) -> None:
    """Parked and back, saved in training and resumed, merged: with the smaller tensors."""
    model, x = trained(AdaLoraConfig(**SCHEDULE), 12).eval(), tokens(vocabulary=64)
    model.resize_modules_by_rank_pattern(model.peft_config["default"].rank_pattern, "default")
    kept = [tuple(a.lora_A["default"].shape) for a in adapters(model)]
    assert len(set(kept)) > 1
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    y = model(x).logits
    same(again.eval()(x).logits, y, 1e-6)
    for one in (model, again):
        one.train()(input_ids=x, labels=x).loss.backward()
        torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=0.1).step()
        one.update_and_allocate(14)
    y = model.eval()(x).logits
    same(again.eval()(x).logits, y, 1e-6)
    for n in range(10):  # so many that the first one leaves the module tree
        model.add_adapter(f"other{n}", AdaLoraConfig(init_r=2, target_r=1, total_step=9))
        model.set_adapter(f"other{n}")
    model.set_adapter("default")
    assert [tuple(a.lora_A["default"].shape) for a in adapters(model)] == kept
    same(model(x).logits, y, 1e-6)
    model.merge_adapter()
    same(model(x).logits, y, 1e-5)


def test_a_loaded_adapter_counts_a_step_it_is_told_of_once(tmp_path: Path) -> None:
    model = trained(AdaLoraConfig(**SCHEDULE), 5)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True).train()
    x = tokens(vocabulary=64)
    for one in (model, again):
        one(input_ids=x, labels=x).loss.backward()
        torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=0.1).step()
        one.update_and_allocate(6)
    kept = {key: value for key, value in model.state_dict().items() if "sensitivity" in key}
    assert kept
    assert all(torch.equal(again.state_dict()[key], value) for key, value in kept.items())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "does not work when `total_step` is None"),
        ({"total_step": 0}, "does not work when `total_step` is None"),
        ({"total_step": 10, "tinit": 5, "tfinal": 5}, "don't allow for a budgeting phase"),
        ({"total_step": 10, "use_dora": True}, "does not support DoRA"),
    ],
)
def test_errors(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaLoraConfig(**fields)


def test_fields_that_are_not_read_are_named() -> None:
    with pytest.warns(UserWarning, match="`r`, `alpha_pattern`.* is not used"):
        AdaLoraConfig(total_step=10, r=4, alpha_pattern={"q_proj": 3})


def test_in_the_trainer(tmp_path: Path) -> None:
    """The penalty is in the loss by itself; the schedule wants one call a step, as the Trainer's own event gives it."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Schedule(TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            model.update_and_allocate(state.global_step + 1)

    config = AdaLoraConfig(task_type="CAUSAL_LM", **SCHEDULE)
    model = get_peft_model(llama(), config)
    rows = [{"input_ids": x, "labels": x} for x in tokens(rows=24, vocabulary=64)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=12, per_device_train_batch_size=2, learning_rate=0.05, report_to=[], use_cpu=True,
        logging_steps=1, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[Schedule()])
    trainer.train()
    pattern = model.peft_config["default"].rank_pattern
    assert sum(map(sum, pattern.values())) == config.target_r * len(pattern)
    assert all(
        [bool(e) for e in layer.lora_E["default"]] == kept for layer, kept in zip(adapters(model), pattern.values())
    )
    first = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    x = torch.stack([row["input_ids"] for row in rows])
    plain = llama()(input_ids=x, labels=x).loss
    assert first > float(plain.detach()) + 0.5, "γ times the mean of the penalties, which are near 2 at the start"
