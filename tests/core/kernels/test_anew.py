"""A step that is formed again in the backward pass against the same step kept by autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from trimtab.core.kernels import anew

Run = Callable[..., Tensor]
ROWS, IN, OUT = 3, 6, 4


def form(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.tanh(x @ a) * torch.fft.rfft(b).abs().sum() + (x.sin() @ a)


def kept(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return form(x, a, b)


def formed(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return anew(form, x, a, b)


def tensors(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = ((ROWS, IN), (IN, OUT), (5,))
    return [torch.randn(*s, generator=draw, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def step(run: Run, given: list[Tensor]) -> list[Tensor]:
    """The output, and the gradients of what asks for one."""
    own = [t.detach().clone().requires_grad_(t.requires_grad) for t in given]
    y = run(*own)
    (y * torch.linspace(-1, 2, y.numel()).view_as(y)).sum().backward()
    return [y.detach(), *(t.grad for t in own if t.grad is not None)]


@pytest.mark.parametrize("frozen", [(), (0,), (1,), (0, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_what_autograd_keeps(frozen: tuple[int, ...], dtype: torch.dtype) -> None:
    given = tensors(dtype)
    for i in frozen:
        given[i].requires_grad_(False)
    for a, b in zip(step(formed, given), step(kept, given), strict=True):
        assert torch.equal(a, b)


def test_first_and_second_derivatives() -> None:
    assert torch.autograd.gradcheck(formed, tensors())
    assert torch.autograd.gradgradcheck(formed, tensors())


@pytest.mark.parametrize(
    "around",
    [
        lambda run: lambda x, a, b: run(torch.nn.functional.silu(x) * x, a, b),  # an input that can be formed again
        lambda run: lambda x, a, b: run(x, a, b) + 2 * run(x * x, a, b),
        lambda run: lambda x, a, b: checkpoint(run, x * x, a, b, use_reentrant=False),
        lambda run: lambda x, a, b: checkpoint(run, x * x, a, b, use_reentrant=True),
    ],
)
def test_inputs_that_others_made(around: Callable[[Run], Run]) -> None:
    for a, b in zip(step(around(formed), tensors()), step(around(kept), tensors()), strict=True):
        assert torch.allclose(a, b, rtol=1e-13, atol=1e-13)
    second = lambda run: torch.autograd.functional.hessian(lambda x: around(run)(x, *own).sum(), x)
    x, *own = tensors()
    if "checkpoint" not in around(formed).__code__.co_names:
        assert torch.allclose(second(formed), second(kept), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("inside", [True, False], ids=["backward inside", "backward outside"])
def test_autocast(inside: bool) -> None:
    """The step is formed the second time in the number formats of the first."""
    found = []
    for run in (formed, kept):
        own = tensors(torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            y = run(*own).float().sum()
            if inside:
                y.backward()
        if not inside:
            y.backward()
        found.append([y.detach(), *(t.grad for t in own)])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_compiled_in_one_graph() -> None:
    run = torch.compile(formed, fullgraph=True, backend="aot_eager")
    for a, b in zip(step(run, tensors()), step(kept, tensors()), strict=True):
        assert torch.allclose(a, b, rtol=1e-13, atol=1e-13)


def test_only_the_arguments_are_kept() -> None:
    x, a, b = tensors()
    saved = [t for t in formed(x, a, b).grad_fn.saved_tensors if t is not None]
    assert all(found is given for found, given in zip(saved, (x, a, b), strict=True))
    made = torch.nn.functional.silu(x) * x  # which the graph can form again
    assert [t.shape for t in formed(made, a, b).grad_fn.saved_tensors if t is not None] == [a.shape, b.shape]
