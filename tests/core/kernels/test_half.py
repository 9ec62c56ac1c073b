"""Half-precision activations times factors in fp32: exact, block by block, nothing wide kept for the backward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from trimtab.core.kernels import half as kernels

halves = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


def tensors(dtype: torch.dtype, scaled: bool) -> dict[str, Tensor | None]:
    draw = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=draw)
    found = {
        "x": make(3, 7, 24).to(dtype),
        "A": make(4, 24),
        "y": make(3, 7, 10).to(dtype),
        "M": make(10, 4),
        "scale": make(10) if scaled else None,
        "shift": make(10) if scaled else None,
    }
    return {k: None if v is None else v.requires_grad_() for k, v in found.items()}


def both_steps(t: dict[str, Any], loss: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    out = kernels.add_product(t["y"], kernels.project(t["x"], t["A"]), t["M"], t["scale"], t["shift"])
    out.backward(loss.to(out.dtype))
    return out.detach(), {k: v.grad for k, v in t.items() if v is not None}


def plain(t: dict[str, Any], loss: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    t = {k: None if v is None else v.detach().double().requires_grad_() for k, v in t.items()}
    y = t["y"] if t["scale"] is None else t["y"] * t["scale"] + t["shift"]
    out = y + t["x"] @ t["A"].T @ t["M"].T
    out.backward(loss.double())
    return out.detach(), {k: v.grad for k, v in t.items() if v is not None}


@halves
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("block", [1, 50, kernels.BLOCK])
def test_exact(dtype: torch.dtype, scaled: bool, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rounding to the activations' format, none for the factors' gradients; however many blocks there are."""
    monkeypatch.setattr(kernels, "BLOCK", block)
    loss = torch.randn(3, 7, 10, generator=torch.Generator().manual_seed(1)).to(dtype)
    out, gradients = both_steps(tensors(dtype, scaled), loss)
    exact, wanted = plain(tensors(dtype, scaled), loss)
    rounding = torch.finfo(dtype).eps
    assert out.dtype == dtype
    assert torch.allclose(out.double(), exact, rtol=rounding, atol=1e-6)
    for name, gradient in gradients.items():
        assert gradient.dtype == (dtype if name in "xy" else torch.float32)
        tolerance = {"rtol": rounding if name in "xy" else 1e-4, "atol": 1e-5}
        assert torch.allclose(gradient.double(), wanted[name], **tolerance), name


@halves
def test_nothing_wide_is_kept(dtype: torch.dtype) -> None:
    """No activation is saved in fp32."""
    kept: list[Tensor] = []
    t = tensors(dtype, scaled=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda v: kept.append(v) or v, lambda v: v):
        kernels.add_product(t["y"], kernels.project(t["x"], t["A"]), t["M"], t["scale"], t["shift"])
    assert max(v.numel() for v in kept if v.dtype == torch.float32) <= max(t["A"].numel(), 3 * 7 * 4)  # A, M and h


@halves
def test_compiles(dtype: torch.dtype) -> None:
    """In one graph, forward and backward."""
    loss = torch.randn(3, 7, 10, generator=torch.Generator().manual_seed(1)).to(dtype)
    step = torch.compile(
        lambda y, x, A, M: kernels.add_product(y, kernels.project(x, A), M), fullgraph=True, backend="aot_eager"
    )
    t = tensors(dtype, scaled=False)
    out = step(t["y"], t["x"], t["A"], t["M"])
    out.backward(loss)
    plain_out, gradients = both_steps(u := tensors(dtype, scaled=False), loss)
    assert u is not t
    assert torch.equal(out, plain_out)
    for name, gradient in gradients.items():
        assert torch.allclose(t[name].grad, gradient, rtol=1e-5, atol=1e-6)
