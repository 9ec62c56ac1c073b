"""Each optimiser's formula against plain loops, a loss that falls, and the errors."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models import tokens, toy
from trimtab import (
    IA3Config,
    LoraConfig,
    create_lorafa_optimizer,
    create_loraplus_optimizer,
    create_riemannian_optimizer,
    get_peft_model,
)
from trimtab.errors import PeftWarning
from trimtab.train.optimizers import LoraFAOptimizer, OptimizerError, projected

MAKERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "loraplus": lambda m: create_loraplus_optimizer(m, torch.optim.AdamW, lr=2e-3, loraplus_lr_ratio=8),
    "lorafa": lambda m: create_lorafa_optimizer(m, 4, 8, lr=1e-2),
    "riemannian": lambda m: create_riemannian_optimizer(m, torch.optim.AdamW, lr=5e-3),
}


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def adapted(moved: bool = True, **fields: Any) -> Any:
    """The toy in double precision with LoRA of rank 4; `moved`: both factors off their start."""
    fields = {"target_modules": ["up", "down"], **fields}
    model = get_peft_model(toy(torch.float64), LoraConfig(r=4, lora_alpha=8, **fields)).double().train()
    if moved:
        torch.manual_seed(2)
        with torch.no_grad():
            for p in (p for p in model.parameters() if p.requires_grad):
                p.copy_(torch.randn_like(p) / 2)
    return model


def loss_of(model: nn.Module) -> Tensor:
    out = model(tokens())
    return (out - torch.linspace(-1, 1, out.shape[-1], dtype=out.dtype)).square().mean()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    loss_of(model).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def product(X: Tensor, Y: Tensor) -> Tensor:
    """X·Y in plain loops."""
    out = torch.zeros(X.shape[0], Y.shape[1], dtype=X.dtype)
    for i in range(X.shape[0]):
        for j in range(Y.shape[1]):
            for k in range(X.shape[1]):
                out[i, j] += X[i, k] * Y[k, j]
    return out


def inverse(M: Tensor, ridge: float) -> Tensor:
    """(M + ridge·I)⁻¹ by Gauss and Jordan."""
    n = M.shape[0]
    rows = [[float(M[i, j]) + ridge * (i == j) for j in range(n)] + [float(i == j) for j in range(n)] for i in range(n)]
    for i in range(n):
        best = max(range(i, n), key=lambda k: abs(rows[k][i]))
        rows[i], rows[best] = rows[best], rows[i]
        rows[i] = [x / rows[i][i] for x in rows[i]]
        for k in range(n):
            if k != i:
                rows[k] = [x - rows[k][i] * y for x, y in zip(rows[k], rows[i])]
    return torch.tensor([row[n:] for row in rows], dtype=M.dtype)


# ---------------------------------------------------------------------- the formulas
def test_loraplus_steps_b_further() -> None:
    model = adapted(target_modules=["up", "embed"], bias="lora_only")
    before, g = state(model), gradients(model)
    optimizer = create_loraplus_optimizer(
        model, torch.optim.SGD, lr=0.1, loraplus_lr_ratio=4, loraplus_lr_embedding=0.3, loraplus_weight_decay=0.5
    )
    optimizer.step()
    rates = {"lora_A": (0.1, 0.5), "lora_B": (0.4, 0.5), "lora_embedding": (0.3, 0.5), "bias": (0.4, 0.0)}
    seen = set()
    for name, p in model.named_parameters():
        if name not in g:
            assert torch.equal(p, before[name])
            continue
        kind = next(k for k in rates if k in name)
        rate, decay = rates[kind]
        seen.add(kind)
        torch.testing.assert_close(p, before[name] - rate * (g[name] + decay * before[name]))
    assert seen == set(rates)


@pytest.mark.parametrize("correct_bias", [True, False])
def test_lorafa_formula(correct_bias: bool) -> None:
    model = adapted()
    optimizer = create_lorafa_optimizer(model, 4, 8, lr=0.05, weight_decay=0.1)
    optimizer.param_groups[0]["correct_bias"] = correct_bias
    name = "base_model.model.up.lora_B.default.weight"
    A = state(model)[name.replace("lora_B", "lora_A")]  # (r, in)
    right, scaling = inverse(product(A, A.T), 1e-8), 2.0
    B = state(model)[name]
    m, v = torch.zeros_like(B), torch.zeros_like(B)
    for t in range(1, 5):
        g = product(gradients(model)[name], right) / scaling**2
        optimizer.step()
        rate = 0.05 * (math.sqrt(1 - 0.999**t) / (1 - 0.9**t) if correct_bias else 1)
        for i in range(B.shape[0]):
            for j in range(B.shape[1]):
                m[i, j] = 0.9 * m[i, j] + 0.1 * g[i, j]
                v[i, j] = 0.999 * v[i, j] + 0.001 * g[i, j] ** 2
                B[i, j] -= rate * m[i, j] / (math.sqrt(v[i, j]) + 1e-6)
                B[i, j] -= 0.05 * 0.1 * B[i, j]
        torch.testing.assert_close(state(model)[name], B, rtol=1e-6, atol=1e-9)


def test_lorafa_takes_the_step_nearest_to_the_full_gradient() -> None:
    """s·g'·A is the full gradient, projected onto the rows of A."""
    model = adapted(target_modules=["up"])
    layer = model.base_model.model.up
    layer.base_layer.weight.requires_grad_(True)
    optimizer = create_lorafa_optimizer(model, 4, 8, lr=0.1)
    assert isinstance(optimizer, LoraFAOptimizer)
    gradients(model)
    G, A, B = layer.base_layer.weight.grad, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    best = torch.linalg.lstsq(A.T, G.T).solution.T / 2.0  # argmin ‖s·g·A − G‖, s = 2
    torch.testing.assert_close(projected(optimizer.pairs[B], B.grad), best, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("fields", [{"target_modules": ["conv", "embed"]}, {"use_dora": True}, {"lora_bias": True}])
def test_lorafa_trains_every_kind_of_pair_and_no_a(fields: dict[str, Any]) -> None:
    model = adapted(**fields)
    optimizer = create_lorafa_optimizer(model, 4, 8, lr=0.01)
    before, g = state(model), gradients(model)
    optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (name not in g), name
        assert not (p.requires_grad and ("lora_A" in name or "lora_embedding_A" in name)), name
    assert any("lora_B" in name for name in g)


def test_lorafa_on_a_convolution_is_that_of_its_matrix() -> None:
    model = adapted(target_modules=["conv"])
    optimizer = create_lorafa_optimizer(model, 4, 8, lr=0.05)
    name = "base_model.model.conv.lora_B.default.weight"
    before = state(model)
    g = gradients(model)[name].flatten(1)  # (out, r)
    A = before[name.replace("lora_B", "lora_A")].flatten(1)  # (r, in·k)
    g = product(g, inverse(product(A, A.T), 1e-8)) / 4
    optimizer.step()
    expected = before[name].flatten(1) - 0.05 * g / (g.abs() + 1e-6 / math.sqrt(0.001))
    torch.testing.assert_close(state(model)[name].flatten(1), expected)


class Experts(nn.Module):
    """A stack of three matrices in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5, 7))  # (experts, out, in)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("eoi,bi->beo", self.weight, x)


@pytest.mark.parametrize("kind", ["lorafa", "riemannian"])
def test_experts_are_taken_one_by_one(kind: str) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=[], target_parameters=["experts.weight"])
    model = get_peft_model(nn.ModuleDict({"experts": Experts()}), config).double()
    factors = {n: p for n, p in model.named_parameters() if "lora_" in n}
    (A,), (B,) = ([p for n, p in factors.items() if leaf in n] for leaf in ("lora_A", "lora_B"))
    for p in (A, B):
        nn.init.normal_(p)
    layer = model.base_model.model["experts"]
    before = A.detach().clone().unflatten(0, (3, 2)), B.detach().clone().unflatten(1, (2, 3))
    x = torch.randn(4, 7, dtype=torch.float64)
    if kind == "lorafa":
        optimizer = create_lorafa_optimizer(model, 2, 4, lr=0.1)
    else:
        optimizer = create_riemannian_optimizer(model, torch.optim.SGD, lr=0.1, reg=0.03)
    layer(x).square().mean().backward()
    g = B.grad.clone().unflatten(1, (2, 3))  # (out, r, experts)
    optimizer.step()
    for e in range(3):
        right = inverse(product(before[0][e], before[0][e].T), 1e-8 if kind == "lorafa" else 0.03)
        step = product(g[..., e], right)
        if kind == "lorafa":
            step = step / 4 / ((step / 4).abs() + 1e-6 / math.sqrt(0.001))
        torch.testing.assert_close(B.detach().unflatten(1, (2, 3))[..., e], before[1][..., e] - 0.1 * step)


def test_riemannian_formula() -> None:
    model = adapted(target_modules=["up", "down", "embed", "conv"])
    before, g = state(model), gradients(model)
    create_riemannian_optimizer(model, torch.optim.SGD, lr=0.1, reg=0.03).step()
    for name, gradient in g.items():
        if ".conv." not in name and ".lora_A." in name:
            B = before[name.replace("lora_A", "lora_B")]
            gradient = product(inverse(product(B.T, B), 0.03), gradient)
        elif ".conv." not in name and ".lora_B." in name:
            A = before[name.replace("lora_B", "lora_A")]
            gradient = product(gradient, inverse(product(A, A.T), 0.03))
        torch.testing.assert_close(state(model)[name], before[name] - 0.1 * gradient)


def test_riemannian_step_does_not_depend_on_how_the_product_is_split() -> None:
    """(B·c, A/c) is the same update of the weight: without damping, it moves alike. Plain SGD's step does not."""
    moves: dict[bool, list[Tensor]] = {True: [], False: []}
    for preconditioned, found in moves.items():
        for c in (1.0, 5.0):
            model = adapted(target_modules=["up"])
            layer = model.base_model.model.up
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            with torch.no_grad():
                A.div_(c), B.mul_(c)
            start = B.detach() @ A.detach()
            gradients(model)
            if preconditioned:
                create_riemannian_optimizer(model, torch.optim.SGD, lr=1e-3, reg=0.0).step()
            else:
                torch.optim.SGD([A, B], lr=1e-3).step()
            found.append(B.detach() @ A.detach() - start)
    torch.testing.assert_close(*moves[True])
    assert not torch.allclose(*moves[False], rtol=0.1)


# ---------------------------------------------------------------------- use
@pytest.mark.parametrize("name", MAKERS)
def test_the_loss_falls(name: str) -> None:
    model = adapted(moved=False)
    optimizer = MAKERS[name](model)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("name", MAKERS)
def test_its_state_goes_through_a_file_and_schedules_act(name: str) -> None:
    def run(resume: bool) -> dict[str, Tensor]:
        model = adapted()
        optimizer = MAKERS[name](model)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        for _ in range(4):
            gradients(model)
            optimizer.step()
            schedule.step()
            if resume:
                saved = pickle.loads(pickle.dumps(optimizer.state_dict()))
                optimizer = MAKERS[name](model)
                optimizer.load_state_dict(saved)
                schedule.optimizer = optimizer
        return state(model)

    torch.testing.assert_close(run(True), run(False))


def test_half_precision_keeps_its_format() -> None:
    model = adapted().to(torch.bfloat16)
    for make in MAKERS.values():
        optimizer = make(model)
        if isinstance(optimizer, LoraFAOptimizer):
            for p in (p for n, p in model.named_parameters() if "lora_" in n):
                p.requires_grad_(True)
        gradients(model)
        optimizer.step()
        assert all(p.dtype == torch.bfloat16 and p.isfinite().all() for p in model.parameters())


def test_lorafa_runs_a_closure_and_is_adamw_without_pairs() -> None:
    model = adapted()
    optimizer = create_lorafa_optimizer(model, 4, 8, lr=0.01)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    assert optimizer.step(closure) > loss_of(model)
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    a.grad, b.grad = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([1.0, -2.0, 3.0])
    LoraFAOptimizer([a], lr=0.1, eps=0.0).step()
    torch.optim.AdamW([b], lr=0.1, eps=0.0, weight_decay=0.0).step()
    torch.testing.assert_close(a, b)


def test_bitsandbytes_keeps_embeddings_in_32_bits() -> None:
    import bitsandbytes as bnb

    model = adapted(modules_to_save=["embed"]).float()
    create_loraplus_optimizer(model, bnb.optim.AdamW8bit, lr=1e-3, loraplus_lr_ratio=4)
    rules = bnb.optim.GlobalOptimManager.get_instance().module_weight_config_triple
    mine = [rule for module, _, rule in rules if any(module is m for m in model.modules())]
    assert mine == [{"optim_bits": 32}] * sum(isinstance(m, nn.Embedding) for m in model.modules())


# ---------------------------------------------------------------------- errors
def test_errors() -> None:
    ia3 = get_peft_model(toy(), IA3Config(target_modules=["up"], feedforward_modules=[]))
    with pytest.raises(OptimizerError, match="no LoRA pair"):
        create_lorafa_optimizer(ia3, 4, 8, lr=0.1)
    with pytest.raises(OptimizerError, match="no trainable pair"):
        create_riemannian_optimizer(ia3, torch.optim.SGD, lr=0.1)
    model = adapted()
    with pytest.raises(OptimizerError, match="at least 0, not -1"):
        create_riemannian_optimizer(model, torch.optim.SGD, lr=0.1, reg=-1)
    with pytest.raises(OptimizerError, match="take SGD or AdamW"):
        create_riemannian_optimizer(model, torch.optim.LBFGS, lr=0.1)
    optimizer = create_riemannian_optimizer(model, torch.optim.SGD, lr=0.1)
    with pytest.raises(OptimizerError, match="no closure"):
        optimizer.step(lambda: 0.0)
    with pytest.raises(OptimizerError, match="no closure"):
        optimizer.step(closure=lambda: 0.0)
    for wrong in ({"lr": -1.0}, {"eps": -1.0}, {"weight_decay": -1.0}, {"betas": (0.9, 1.0)}):
        with pytest.raises(OptimizerError, match="LoRA-FA needs"):
            LoraFAOptimizer([nn.Parameter(torch.zeros(1))], **wrong)


def test_lorafa_checks_what_it_is_told() -> None:
    with pytest.warns(
        PeftWarning, match=r"No layer has r=8, lora_alpha=8; they have \(r, lora_alpha\) in \[\(4, 8\)\]"
    ):
        create_lorafa_optimizer(adapted(), 8, 8, lr=0.1)
    with pytest.warns(FutureWarning, match="deprecated"):
        create_lorafa_optimizer(adapted(use_rslora=True), 4, 8, lr=0.1, use_rslora=True)
    with pytest.warns(FutureWarning), pytest.raises(OptimizerError, match=r"say otherwise: \['default'\]"):
        create_lorafa_optimizer(adapted(), 4, 8, lr=0.1, use_rslora=True)


def test_lorafa_refuses_grouped_convolutions() -> None:
    model = get_peft_model(
        nn.Sequential(nn.Conv1d(4, 4, 1, groups=2)), LoraConfig(r=4, lora_alpha=8, target_modules=["0"])
    )
    with pytest.raises(OptimizerError, match="in groups: 0"):
        create_lorafa_optimizer(model, 4, 8, lr=0.1)


def test_lorafa_of_two_adapters_trains_the_active_one() -> None:
    model = adapted()
    model.add_adapter("other", LoraConfig(r=2, lora_alpha=4, target_modules=["up"]))
    model.set_adapter("other")
    optimizer = create_lorafa_optimizer(model, 2, 4, lr=0.01)
    before = state(model)
    gradients(model)
    optimizer.step()
    assert [n for n, p in model.named_parameters() if not torch.equal(p, before[n])] == [
        "base_model.model.up.lora_B.other.weight"
    ]
