"""The head and its cross-entropy in chunks against the two by themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from trimtab.core.kernels import linear_cross_entropy

WIDTH, VOCABULARY = 12, 31


def tensors(dtype: torch.dtype = torch.float32, masked: bool = True, rows: int = 3) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)
    labels = torch.randint(VOCABULARY, (rows, 7), generator=draw)
    if masked:
        labels[0] = labels[1, 2:5] = -100
    return {
        "x": make(rows, 7, WIDTH).requires_grad_(),
        "W": make(VOCABULARY, WIDTH),
        "b": make(VOCABULARY),
        "labels": labels,
    }


def plain(t: dict[str, Any], reduction: str = "mean", scale: float = 1.0, softcap: float | None = None) -> Tensor:
    logits = F.linear(t["x"], t["W"], t["b"])
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    losses = F.cross_entropy(logits.flatten(0, -2), t["labels"].flatten(), reduction=reduction)
    return losses.view(t["labels"].shape) if reduction == "none" else losses


def chunked(t: dict[str, Any], reduction: str = "mean", chunk: int | None = 4, **options: Any) -> Tensor:
    return linear_cross_entropy(t["x"], t["W"], t["labels"], bias=t["b"], reduction=reduction, chunk=chunk, **options)


def step(run: Any, t: dict[str, Any], *args: Any, weigh: bool = True, **options: Any) -> dict[str, Tensor]:
    loss = run(t, *args, **options)
    weights = torch.rand(loss.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(loss.dtype)
    loss.backward(weights if weigh else torch.ones_like(loss))
    found = {"loss": loss.detach()} | {k: v.grad for k, v in t.items() if v is not None and v.grad is not None}
    for v in t.values():
        if v is not None:
            v.grad = None
    return found


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert value.dtype == wanted[name].dtype, name
        error = (value - wanted[name]).double().norm() / wanted[name].double().norm()
        assert error <= tolerance, f"{name}: {error:.1e}"


TRAINED = {"frozen head": "x", "trained head": "xW", "all trained": "xWb", "the head alone": "W", "the bias alone": "b"}


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", [{}, {"scale": 0.3}, {"softcap": 2.0}, {"scale": 1.7, "softcap": 3.0}], ids=str)
def test_equals_the_plain_spelling(trained: str, reduction: str, options: dict[str, float]) -> None:
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-14)):
        t = tensors(dtype)
        for name in "xWb":
            t[name].requires_grad_(name in TRAINED[trained])
        assert_same(step(chunked, t, reduction, **options), step(plain, t, reduction, **options), tolerance)


@pytest.mark.parametrize("chunk", [1, 5, 100, None])
@pytest.mark.parametrize("masked", [True, False])
def test_chunks_and_masks(chunk: int | None, masked: bool) -> None:
    t = tensors(masked=masked) | {"b": None}
    assert_same(step(chunked, t, chunk=chunk), step(plain, t))


def test_gradcheck() -> None:
    t = tensors(torch.float64)
    for name in "Wb":
        t[name].requires_grad_()
    run = lambda x, W, b: chunked({**t, "x": x, "W": W, "b": b}, "none", softcap=4.0)
    assert torch.autograd.gradcheck(run, (t["x"], t["W"], t["b"]))


def test_another_index_is_ignored() -> None:
    t = tensors()
    loss = linear_cross_entropy(t["x"], t["W"], t["labels"].where(t["labels"] != -100, 5), bias=t["b"], ignore_index=5)
    t["labels"] = t["labels"].where(t["labels"] != 5, -100)
    assert torch.allclose(loss, plain(t))


def test_nothing_supervised() -> None:
    """As `F.cross_entropy`: no mean, and a sum of nothing."""
    t = tensors()
    t["labels"] = torch.full_like(t["labels"], -100)
    assert chunked(t).isnan()
    loss = chunked(t, "sum")
    loss.backward()
    assert loss == 0
    assert not t["x"].grad.any()
    assert not chunked(t, "none").any()


def test_large_logits() -> None:
    """Losses of hundreds, probabilities that underflow."""
    t = tensors()
    t["x"] = (t["x"].detach() * 100).requires_grad_()
    assert_same(step(chunked, t), step(plain, t))


@pytest.mark.parametrize("trained", ["frozen head", "all trained"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision(dtype: torch.dtype, trained: str) -> None:
    """Gradients no further from the truth than the plain spelling's; the loss in fp32."""
    t = tensors(dtype, rows=300)
    for name in "xWb":
        t[name].requires_grad_(name in TRAINED[trained])
    exact = {k: v.detach().double().requires_grad_(v.requires_grad) if k != "labels" else v for k, v in t.items()}
    truth, ours, theirs = (step(run, t, weigh=False) for run, t in ((plain, exact), (chunked, t), (plain, t)))
    assert ours["loss"].dtype == torch.float32
    assert torch.allclose(ours.pop("loss").double(), truth["loss"], rtol=1e-3)
    for name, gradient in ours.items():
        assert gradient.dtype == dtype
        error, bar = ((r[name].double() - truth[name]).norm() for r in (ours, theirs))
        assert error <= 1.1 * bar, name


@pytest.mark.parametrize("trained", ["frozen head", "all trained"])
def test_autocast(trained: str) -> None:
    t = tensors()
    for name in "xWb":
        t[name].requires_grad_(name in TRAINED[trained])
    wanted = step(plain, t)
    with torch.autocast("cpu", torch.bfloat16):
        loss = chunked(t)
        loss.backward()
    assert loss.dtype == torch.float32
    assert torch.allclose(loss, wanted["loss"], rtol=0.02)
    for name in TRAINED[trained]:
        assert t[name].grad.dtype == torch.float32


@pytest.mark.parametrize("trained", ["frozen head", "all trained"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool, trained: str) -> None:
    t = tensors(torch.float64)
    for name in "xWb":
        t[name].requires_grad_(name in TRAINED[trained])
    again = lambda t: checkpoint(lambda x: chunked({**t, "x": x * x}), t["x"], use_reentrant=reentrant)
    assert_same(step(again, t), step(lambda t: plain({**t, "x": t["x"] * t["x"]}), t), 1e-13)


def test_hidden_states_used_twice_and_backward_twice() -> None:
    t = tensors(torch.float64)
    twice = lambda run: lambda t: run(t) + 2 * run(t, "sum") + t["x"].square().sum()
    wanted = step(twice(plain), t)
    assert_same(step(twice(chunked), t), wanted, 1e-13)
    loss = twice(chunked)(t)
    loss.backward(retain_graph=True)
    once = t["x"].grad.clone()
    loss.backward()
    assert torch.allclose(t["x"].grad, 2 * once)


def test_without_gradients() -> None:
    t = tensors()
    with torch.no_grad():
        assert torch.allclose(chunked(t), plain(t))


def test_compiled_in_one_graph() -> None:
    t = tensors()
    run = torch.compile(chunked, fullgraph=True, backend="aot_eager")
    assert_same(step(run, t), step(plain, t))


def test_a_second_derivative_is_refused() -> None:
    t = tensors()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(chunked(t), t["x"], create_graph=True)


@pytest.mark.parametrize("trained", ["x", "xW"])
def test_no_logits_are_kept(trained: str) -> None:
    t, kept = tensors(masked=False), []
    for name in "xW":
        t[name].requires_grad_(name in trained)
    with torch.autograd.graph.saved_tensors_hooks(lambda v: kept.append(v) or v, lambda v: v):
        chunked(t)
    assert max(v.numel() for v in kept) <= max(t["x"].numel(), t["W"].numel()) < 21 * VOCABULARY
