"""Poly in plain loops: skills mixed by tasks, splits, noise in training, beams, mixed and packed batches."""

from __future__ import annotations

from math import exp

import pytest
import torch

from tests.methods.nets import adapted, check_gradients, image, merged, merging_changes_nothing, numbers, same
from tests.models import llama, tokens, toy
from trimtab import PolyConfig, get_peft_model
from trimtab.core.method import Call
from trimtab.errors import ReadOnlyWeight

LAYERS = ["q_proj", "down_proj"]


def delta(layer, r, splits, skills, task, name="default"):
    """What a task adds to a layer's weight."""
    A, B = numbers(layer.poly_lora_A[name]), numbers(layer.poly_lora_B[name])
    logits = numbers(layer.poly_router[name].module_logits)[task]
    z = [[1 / (1 + exp(-logits[q * skills + s])) for s in range(skills)] for q in range(splits)]
    z = [[v / (sum(row) + 1e-12) for v in row] for row in z]
    into, out = len(A[0][0]), len(B[0][0][0])
    a = [
        [sum(z[q][s] * A[q][s][i][k] for s in range(skills)) for k in range(r)]
        for q in range(splits)
        for i in range(into)
    ]
    b = [
        [sum(z[q][s] * B[q][s][k][o] for s in range(skills)) for k in range(r)]
        for q in range(splits)
        for o in range(out)
    ]
    return [[sum(x * y for x, y in zip(row, column)) / r for column in a] for row in b]


@pytest.mark.parametrize("splits", [1, 2])
def test_formula_of_one_task(splits: int) -> None:
    model = adapted(PolyConfig(target_modules=["linear" if splits == 1 else "up"], r=3, n_skills=2, n_splits=splits),
                    None if splits == 1 else toy())  # fmt: skip
    name = "linear" if splits == 1 else "up"
    layer = model.get_base_model().get_submodule(name)
    W = numbers(layer.base_layer.weight)
    D = delta(layer, 3, splits, 2, 0)
    same(merged(model, name), [[w + d for w, d in zip(*rows)] for rows in zip(W, D)])
    x = image() if splits == 1 else tokens()
    merging_changes_nothing(model, x)
    if splits == 1:
        check_gradients(model, x)


def many(**fields):
    config = PolyConfig(task_type="CAUSAL_LM", target_modules=LAYERS, r=2, n_tasks=3, **fields)
    model = adapted(config, llama())
    for module in model.modules():
        for router in getattr(module, "poly_router", {}).values() if hasattr(module, "poly_router") else ():
            torch.nn.init.normal_(router.module_logits, std=3)
    return model


def test_each_row_has_its_task_s_weight() -> None:
    model, x = many(), tokens(vocabulary=64)
    tasks = torch.tensor([2, 0, 1, 2])
    together = model(x, task_ids=tasks).logits
    for row, task in enumerate(tasks):
        base = llama().double()
        for name, layer in base.named_modules():
            if name.endswith(tuple(LAYERS)):
                own = model.get_base_model().get_submodule(name)
                layer.weight.data += torch.tensor(delta(own, 2, 1, 4, int(task)), dtype=torch.float64)
        same(base(x[row : row + 1]).logits[0], together[row], 1e-10)


def test_tasks_must_be_said_and_several_have_no_weight() -> None:
    model, x = many(), tokens(vocabulary=64)
    with pytest.raises(ValueError, match="task_ids should not be None"):
        model(x)
    with pytest.raises(RuntimeError, match="task_ids"):
        model(x, task_ids=[0, 1, 2])
    with pytest.raises(ReadOnlyWeight, match="cannot be merged"):
        model.merge_adapter()
    with model.disable_adapter():
        same(model(x, task_ids=[0] * 4).logits, llama().double()(x).logits)


def test_generation_with_beams_and_in_a_mixed_batch() -> None:
    model, x = many(), tokens(vocabulary=64)
    tasks = torch.tensor([2, 0, 1, 2])
    ask = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": 2, "pad_token_id": 0}
    got = model.generate(input_ids=x, task_ids=tasks, **ask)
    for row in range(4):
        assert torch.equal(
            model.generate(input_ids=x[row : row + 1], task_ids=tasks[row : row + 1], **ask)[0], got[row]
        )
    names = ["default", "__base__", "default", "default"]
    mixed, alone = model(x, task_ids=tasks, adapter_names=names).logits, model(x, task_ids=tasks).logits
    same(mixed[[0, 2, 3]], alone[[0, 2, 3]])
    same(mixed[1], llama().double()(x[1:2]).logits[0])


def test_training_draws_a_relaxed_bernoulli_for_each_row() -> None:
    """A sigmoid of logits and logistic noise: its mean over draws is the share of skills it leaves."""
    model = get_peft_model(toy(), PolyConfig(target_modules=["up"], r=2, n_skills=2)).train()
    method = model.get_base_model().up.methods["default"][0]
    method.poly_router_module_logits.data.copy_(torch.tensor([[0.0, 2.0]]))
    torch.manual_seed(0)
    z = method._skills(Call(), 4000).detach()[:, 0]
    same(z.sum(-1), torch.ones(4000), 1e-6)
    u = torch.rand(200000, 2, dtype=torch.float64)
    y = torch.sigmoid(torch.logit(u) + torch.tensor([0.0, 2.0]))
    y = y / y.sum(-1, keepdim=True)
    same(z.mean(0), y.mean(0), 0.02)
    same(z.std(0), y.std(0), 0.02)
    model.eval()
    assert method._skills(Call(), 2).std(0).max() == 0


def test_errors() -> None:
    with pytest.raises(ValueError, match="n_splits"):
        get_peft_model(toy(), PolyConfig(target_modules=["head"], n_splits=2))
    with pytest.raises(ValueError, match="n_skills"):
        PolyConfig(n_skills=0)
    with pytest.raises(ValueError, match="positive integer"):
        get_peft_model(toy(), PolyConfig(target_modules=["up"], r=0))
    with pytest.raises(ValueError, match="poly_type"):
        PolyConfig(poly_type="moe")
