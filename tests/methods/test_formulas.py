"""Methods against their papers' formulas, over random shapes, ranks and scales, in double precision."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.contract.cases import move, tensors
from tests.methods import formulas
from trimtab import LoraConfig, TrainableTokensConfig, get_peft_model

quickly = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
sizes = st.integers(2, 7)
ranks = st.integers(1, 4)
alphas = st.integers(1, 9)
seeds = st.integers(0, 2**16)


def numbers(t: Tensor) -> Any:
    assert t.dtype == torch.float64
    return t.detach().tolist()


class One(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def layer(kind: str, into: int, out: int, seed: int) -> tuple[nn.Module, Tensor]:
    """(a layer in double precision, its weight as (out, in))."""
    torch.manual_seed(seed)
    module: nn.Module
    if kind == "Conv1D":
        module = Conv1D(out, into).double()
        nn.init.normal_(module.bias)
        nn.init.normal_(module.weight)
        return module, module.weight.detach().T
    module = nn.Linear(into, out, bias=kind == "Linear").double()
    return module, module.weight.detach()


def adapt(module: nn.Module, config: Any) -> Any:
    model = get_peft_model(One(module), config).eval()
    move(model, "default")
    return model


def pair(model: Any, names: tuple[str, str] = ("lora_A", "lora_B")) -> tuple[Any, Any]:
    found = tensors(model)
    A, B = (next(t for n, t in found.items() if f".{name}." in n) for name in names)
    return numbers(A), numbers(B)


def assert_equal(actual: Tensor, expected: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(
        actual.detach(), torch.tensor(expected, dtype=torch.float64), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("kind", ["Linear", "Linear without bias", "Conv1D"])
@pytest.mark.parametrize("scale", ["lora", "rslora"])
@quickly
@given(into=sizes, out=sizes, r=ranks, alpha=alphas, seed=seeds)
def test_lora(kind: str, scale: str, into: int, out: int, r: int, alpha: int, seed: int) -> None:
    module, W = layer(kind, into, out, seed)
    bias = None if module.bias is None else numbers(module.bias)
    model = adapt(module, LoraConfig(r=r, lora_alpha=alpha, use_rslora=scale == "rslora", target_modules=["layer"]))
    x = torch.randn(3, into, dtype=torch.float64)
    new = getattr(formulas, scale)(numbers(W), *pair(model), r, alpha)
    assert_equal(model(x), formulas.linear(new, bias, numbers(x)))
    model.merge_adapter()
    assert_equal(model(x), formulas.linear(new, bias, numbers(x)))


@quickly
@given(into=sizes, out=sizes, r=ranks, alpha=alphas, seed=seeds)
def test_lora_bias(into: int, out: int, r: int, alpha: int, seed: int) -> None:
    """y = W x + b + s (B A x + c), with c the bias of B."""
    module, W = layer("Linear", into, out, seed)
    model = adapt(module, LoraConfig(r=r, lora_alpha=alpha, lora_bias=True, target_modules=["layer"]))
    found = tensors(model)
    A, B = (
        numbers(next(t for n, t in found.items() if n.endswith(f"{e}.default.weight"))) for e in ("lora_A", "lora_B")
    )
    c = numbers(next(t for n, t in found.items() if n.endswith("lora_B.default.bias")))
    x = torch.randn(3, into, dtype=torch.float64)
    bias = [b + alpha / r * e for b, e in zip(numbers(module.bias), c, strict=True)]
    assert_equal(model(x), formulas.linear(formulas.lora(numbers(W), A, B, r, alpha), bias, numbers(x)))


@pytest.mark.parametrize("kind", ["Linear", "Linear without bias", "Conv1D"])
@quickly
@given(into=sizes, out=sizes, r=ranks, alpha=alphas, seed=seeds)
def test_dora(kind: str, into: int, out: int, r: int, alpha: int, seed: int) -> None:
    module, W = layer(kind, into, out, seed)
    bias = None if module.bias is None else numbers(module.bias)
    model = get_peft_model(
        One(module), LoraConfig(r=r, lora_alpha=alpha, use_dora=True, target_modules=["layer"])
    ).eval()
    magnitude = next(t for n, t in tensors(model).items() if "magnitude" in n)
    assert_equal(magnitude, formulas.norms(numbers(W)))  # m starts as ||W||, so that W' = W
    move(model, "default")
    x = torch.randn(3, into, dtype=torch.float64)
    new = formulas.dora(numbers(W), *pair(model), numbers(magnitude), r, alpha)
    assert_equal(model(x), formulas.linear(new, bias, numbers(x)), 1e-10)


def test_dora_takes_its_norm_as_a_constant_in_the_backward_pass() -> None:
    """Section 4.3: the gradient is that of m V / C with C fixed."""
    module, W = layer("Linear without bias", 4, 3, 0)
    model = adapt(module, LoraConfig(r=2, lora_alpha=3, use_dora=True, target_modules=["layer"]))
    x = torch.randn(5, 4, dtype=torch.float64)
    model(x).square().sum().backward()
    found = {n.split(".")[3]: t for n, t in tensors(model).items()}
    A, B, m = (found[n].detach().clone().requires_grad_() for n in ("lora_A", "lora_B", "lora_magnitude_vector"))
    V = W + 1.5 * B @ A
    y = x @ (m[:, None] * V / V.detach().norm(dim=1, keepdim=True)).T
    y.square().sum().backward()
    for name, expected in (("lora_A", A), ("lora_B", B), ("lora_magnitude_vector", m)):
        torch.testing.assert_close(found[name].grad, expected.grad)


@pytest.mark.parametrize("use_dora", [False, True])
@quickly
@given(vocabulary=sizes, dim=sizes, r=ranks, alpha=alphas, seed=seeds)
def test_embedding(use_dora: bool, vocabulary: int, dim: int, r: int, alpha: int, seed: int) -> None:
    """W' = W + s B A with A (r, vocabulary), B (dim, r); a token is a column of W'."""
    torch.manual_seed(seed)
    module = nn.Embedding(vocabulary, dim).double()
    rows = numbers(module.weight)
    config = LoraConfig(r=r, lora_alpha=alpha, use_dora=use_dora, target_modules=["layer"])
    model = adapt(module, config)
    ids = torch.randint(vocabulary, (6,))
    A, B = pair(model, ("lora_embedding_A", "lora_embedding_B"))
    W = formulas.transposed(rows)
    if use_dora:
        m = numbers(next(t for n, t in tensors(model).items() if "magnitude" in n))
        new = formulas.dora(W, A, B, m, r, alpha)
    else:
        new = formulas.lora(W, A, B, r, alpha)
    assert_equal(model(ids), formulas.lookup(formulas.transposed(new), ids.tolist()), 1e-10)


@quickly
@given(vocabulary=st.integers(4, 9), dim=sizes, count=st.integers(1, 4), seed=seeds)
def test_trainable_tokens(vocabulary: int, dim: int, count: int, seed: int) -> None:
    torch.manual_seed(seed)
    module = nn.Embedding(vocabulary, dim).double()
    rows = numbers(module.weight)
    chosen = torch.randperm(vocabulary)[:count].tolist()
    model = adapt(module, TrainableTokensConfig(token_indices=chosen, target_modules=["layer"]))
    new = numbers(next(iter(tensors(model).values())))
    ids = torch.randint(vocabulary, (7,))
    assert_equal(model(ids), formulas.lookup(formulas.trainable_tokens(rows, chosen, new), ids.tolist()))


# ---------------------------------------------------------------------- how A and B start
def start(
    name: Any, into: int, out: int, r: int, alpha: int, seed: int, use_dora: bool = False
) -> tuple[Any, Tensor, Tensor, Tensor, Tensor]:
    """(model, W before, W after, A, B)."""
    module, W = layer("Linear", into, out, seed)
    W = W.clone()
    config = LoraConfig(r=r, lora_alpha=alpha, init_lora_weights=name, target_modules=["layer"], use_dora=use_dora)
    model = get_peft_model(One(module), config).eval()
    found = tensors(model)
    A, B = (next(t for n, t in found.items() if f".{e}." in n).detach() for e in ("lora_A", "lora_B"))
    return model, W, model.base_model.model.layer.base_layer.weight.detach(), A, B


@quickly
@given(into=sizes, out=sizes, alpha=alphas, seed=seeds, data=st.data())
def test_pissa_moves_the_top_of_the_spectrum(into: int, out: int, alpha: int, seed: int, data: Any) -> None:
    """A = S^½ Vᵀ and B = U S^½ of the r largest singular values, over √s each; the base keeps the rest (eq. 2-4)."""
    r = data.draw(st.integers(1, min(into, out)))
    _, W, rest, A, B = start("pissa", into, out, r, alpha, seed)
    values = torch.linalg.svdvals(W)
    s = alpha / r
    torch.testing.assert_close(rest + s * B @ A, W, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch.linalg.svdvals(s * B @ A)[:r], values[:r])
    torch.testing.assert_close(torch.linalg.svdvals(rest)[: len(values) - r], values[r:], rtol=1e-8, atol=1e-10)
    for i in range(r):  # the two factors share each singular value evenly
        torch.testing.assert_close(s * A[i].square().sum(), values[i])
        torch.testing.assert_close(s * B[:, i].square().sum(), values[i])


@pytest.mark.parametrize("rounds", [1, 4, 16])
def test_pissa_niter_comes_near_the_exact_one_and_is_the_same_each_time(rounds: int) -> None:
    name = f"pissa_niter_{rounds}"
    _, W, rest, A, B = start(name, 30, 20, 3, 6, 0)
    torch.testing.assert_close(rest + 2 * B @ A, W, rtol=1e-10, atol=1e-10)
    best = torch.linalg.svdvals(W)[3]
    assert float(torch.linalg.matrix_norm(rest, 2)) < float(best) * {1: 1.6, 4: 1.2, 16: 1.05}[rounds]
    _, _, again, A2, B2 = start(name, 30, 20, 3, 6, 0)
    assert torch.equal(again, rest)
    assert torch.equal(A2, A)
    assert torch.equal(B2, B)
    torch.manual_seed(7)
    module = One(nn.Linear(8, 8))
    before = torch.get_rng_state()
    get_peft_model(module, LoraConfig(r=2, init_lora_weights=name, target_modules=["layer"]))
    assert torch.equal(torch.get_rng_state(), before), "the caller's random numbers are left alone"


@quickly
@given(into=sizes, out=sizes, alpha=alphas, seed=seeds, data=st.data())
def test_olora_starts_from_qr(into: int, out: int, alpha: int, seed: int, data: Any) -> None:
    """B = the first r columns of Q (orthonormal), A = the first r rows of R (upper triangular); W keeps W - s B A."""
    r = data.draw(st.integers(1, min(into, out)))
    _, W, rest, A, B = start("olora", into, out, r, alpha, seed)
    torch.testing.assert_close(B.T @ B, torch.eye(r, dtype=torch.float64), rtol=1e-10, atol=1e-10)
    assert float(A.tril(-1).abs().max()) < 1e-10
    torch.testing.assert_close(rest, W - alpha / r * B @ A, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(B @ (B.T @ W), B @ A, rtol=1e-9, atol=1e-9)  # B A is W seen through those columns


@quickly
@given(into=sizes, out=sizes, half=st.integers(1, 3), seed=seeds)
def test_orthogonal_starts_at_zero_with_neither_factor_zero(into: int, out: int, half: int, seed: int) -> None:
    _, W, now, A, B = start("orthogonal", into, out, 2 * half, 4, seed)
    assert torch.equal(now, W)
    assert float((B @ A).abs().max()) < 1e-14
    assert float(A.abs().max()) > 0
    assert float(B.abs().max()) > 0


def test_orthogonal_wants_an_even_rank() -> None:
    with pytest.raises(ValueError, match="rank to be even, got 3"):
        start("orthogonal", 4, 4, 3, 1, 0)


def test_default_start_is_that_of_a_linear_layer() -> None:
    """A uniform in ±1/sqrt(in) (kaiming with a = sqrt 5), B zero."""
    _, _, _, A, B = start(True, 64, 32, 16, 8, 0)
    assert not B.any()
    assert 0.9 / 8 < float(A.abs().max()) <= 1 / 8
    torch.testing.assert_close(float(A.std()), 1 / 8 / math.sqrt(3), rtol=0.05, atol=0)


def test_gaussian_start_has_deviation_one_over_r() -> None:
    _, _, _, A, B = start("gaussian", 128, 8, 16, 8, 0)
    assert not B.any()
    torch.testing.assert_close(float(A.std()), 1 / 16, rtol=0.05, atol=0)


def test_random_start_has_both_factors() -> None:
    _, _, _, A, B = start(False, 8, 8, 4, 8, 0)
    assert float(A.abs().min()) > 0
    assert float(B.abs().min()) > 0


def test_embedding_starts_with_a_zero_and_b_normal() -> None:
    module = nn.Embedding(200, 50).double()
    model = get_peft_model(One(module), LoraConfig(r=4, target_modules=["layer"]))
    layer = model.base_model.model.layer
    assert not layer.lora_embedding_A["default"].any()
    torch.testing.assert_close(float(layer.lora_embedding_B["default"].std()), 1.0, rtol=0.15, atol=0)


def test_dora_with_pissa_takes_its_magnitude_of_what_is_left_and_added() -> None:
    model, W, _, _, _ = start("pissa", 5, 4, 2, 4, 0, use_dora=True)
    magnitude = model.base_model.model.layer.lora_magnitude_vector["default"].weight
    torch.testing.assert_close(magnitude.detach(), W.norm(dim=1))


@pytest.mark.parametrize("name", ["pissa_niter_x", "nonsense"])
def test_unknown_starts_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        start(name, 4, 4, 2, 1, 0)


# ---------------------------------------------------------------------- fields that choose per layer
class Two(nn.Module):
    """A model of two layers of one size."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


@quickly
@given(r=ranks, alpha=alphas, own_r=ranks, own_alpha=alphas)
def test_patterns_give_layers_their_own_rank_and_scale(r: int, alpha: int, own_r: int, own_alpha: int) -> None:
    model = get_peft_model(
        Two(),
        LoraConfig(
            r=r,
            lora_alpha=alpha,
            target_modules=["first", "second"],
            rank_pattern={"sec.*": own_r},
            alpha_pattern={"second": own_alpha},
        ),
    )
    first, second = model.base_model.model.first, model.base_model.model.second
    assert (first.r["default"], first.lora_alpha["default"], first.scaling["default"]) == (r, alpha, alpha / r)
    assert (second.r["default"], second.scaling["default"]) == (own_r, own_alpha / own_r)
    assert second.lora_A["default"].weight.shape == (own_r, 6)


def test_dropout_keeps_the_mean_and_spares_the_base_path() -> None:
    """E[y] is the output without dropout; each mask scales what it keeps by 1 / (1 - p)."""
    module, _ = layer("Linear", 6, 4, 0)
    model = adapt(module, LoraConfig(r=2, lora_dropout=0.5, target_modules=["layer"]))
    x = torch.randn(1, 6, dtype=torch.float64)
    expected = model(x)
    model.train()
    draws = model(x.expand(20000, 6))
    assert float((draws - module(x)).abs().max()) > 0
    torch.testing.assert_close(draws.mean(0, keepdim=True), expected, rtol=0, atol=float(draws.std(0).max()) * 0.04)
