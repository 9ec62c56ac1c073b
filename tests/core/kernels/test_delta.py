"""A weight's change formed twice against the same change formed once and kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from trimtab.core.kernels import delta_linear

IN, OUT, RANK = 24, 40, 4
NAMES = ("a1", "b1", "a2", "b2")


def hadamard(a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
    """LoHa's change."""
    return (a1 @ b1) * (a2 @ b2)


def tensors(dtype: torch.dtype = torch.float64, factors: torch.dtype | None = None) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)
    t = {"x": make(3, 5, IN).to(dtype), "W": (make(OUT, IN) / 5).to(dtype), "b": make(OUT).to(dtype)}
    t |= {n: (make(*((OUT, RANK) if n[0] == "a" else (RANK, IN))) / 3).to(factors or dtype) for n in NAMES}
    for name in ("x", *NAMES):
        t[name].requires_grad_()
    return t


def ours(t: dict[str, Any]) -> Tensor:
    return delta_linear(t["x"], t["W"], t["b"], hadamard, *(t[n] for n in NAMES))


def formula(t: dict[str, Any]) -> Tensor:
    return F.linear(t["x"], t["W"] + hadamard(*(t[n] for n in NAMES)), t["b"])


def step(run: Any, t: dict[str, Any]) -> dict[str, Tensor]:
    y = run(t)
    weigh = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(y.dtype)
    y.backward(weigh)
    found = {"y": y.detach()} | {k: v.grad for k, v in t.items() if v is not None and v.grad is not None}
    for v in t.values():
        if v is not None:
            v.grad = None
    return found


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert value.dtype == wanted[name].dtype, name
        error = (value - wanted[name]).double().norm() / wanted[name].double().norm().clamp_min(1e-30)
        assert error <= tolerance, f"{name}: {error:.1e}"


VARIANTS: dict[str, Any] = {
    "all": lambda t: None,
    "no bias": lambda t: t.update(b=None),
    "trained bias": lambda t: t["b"].requires_grad_(),
    "frozen x": lambda t: t["x"].requires_grad_(False),
    "one frozen factor": lambda t: t["b1"].requires_grad_(False),
    "frozen factors": lambda t: [t[n].requires_grad_(False) for n in NAMES],
    "trained W": lambda t: t["W"].requires_grad_(),
    "one dimension": lambda t: t.update(x=t["x"].detach()[0, 0].clone().requires_grad_()),
    "transposed x": lambda t: t.update(x=t["x"].detach().mT.contiguous().mT.requires_grad_()),
    "empty": lambda t: t.update(x=t["x"].detach()[:0].requires_grad_()),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_formula(variant: str, dtype: torch.dtype) -> None:
    t = tensors(dtype)
    VARIANTS[variant](t)
    assert_same(step(ours, t), step(formula, t), 1e-6 if dtype == torch.float32 else 1e-14)


def test_first_and_second_derivatives() -> None:
    t = tensors()
    run = lambda x, *factors: delta_linear(x, t["W"], t["b"], hadamard, *factors)
    inputs = [t["x"], *(t[n] for n in NAMES)]
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16], ids=["fp32 factors", "bf16 factors"])
def test_half_precision(factors: torch.dtype) -> None:
    """The change has products of its own, whatever its factors' format."""
    t = tensors(torch.bfloat16, factors)
    exact = {k: v.detach().double().requires_grad_(v.requires_grad) for k, v in t.items()}
    found, truth = step(ours, t), step(formula, exact)
    for name, value in found.items():
        assert value.dtype == (t[name].dtype if name in t else torch.bfloat16)
        assert (value - truth[name]).norm() < 0.02 * truth[name].norm(), name


@pytest.mark.parametrize("inside", [True, False], ids=["backward inside", "backward outside"])
def test_autocast(inside: bool) -> None:
    """The weight and its change are added in fp32; parameters' gradients in their own format."""
    t = tensors(torch.float32)
    wanted = step(formula, t)
    with torch.autocast("cpu", torch.bfloat16):
        y = ours(t)
        assert y.dtype == torch.bfloat16
        if inside:
            found = step(ours, t)
    if not inside:
        weigh = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(y.dtype)
        y.backward(weigh)
        found = {"y": y.detach()} | {n: t[n].grad for n in ("x", *NAMES)}
    found["y"] = found["y"].float()
    assert_same(found, wanted, 0.01)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool) -> None:
    t = tensors()
    again = lambda t: checkpoint(lambda x: ours({**t, "x": x * x}), t["x"], use_reentrant=reentrant)
    assert_same(step(again, t), step(lambda t: formula({**t, "x": t["x"] * t["x"]}), t), 1e-13)


def test_used_twice_and_backward_twice() -> None:
    t = tensors()
    twice = lambda run: lambda t: run(t) + 2 * run({**t, "x": torch.sin(t["x"]) * t["x"]})
    wanted = step(twice(formula), t)
    assert_same(step(twice(ours), t), wanted, 1e-13)
    y = twice(ours)(t)
    y.sum().backward(retain_graph=True)
    once = t["a1"].grad.clone()
    y.sum().backward()
    assert torch.allclose(t["a1"].grad, 2 * once)


def test_compiled_in_one_graph() -> None:
    t = tensors()
    run = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert_same(step(run, t), step(formula, t), 1e-13)


def test_nothing_of_the_weights_size_is_kept() -> None:
    t = tensors()
    kept = [v for v in ours({**t, "x": t["x"] * t["x"]}).grad_fn.saved_tensors if v is not None]
    assert [v.shape for v in kept] == [t[n].shape for n in ("W", *NAMES)]
    assert kept[0] is t["W"]
