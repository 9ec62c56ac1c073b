"""What the tests of single methods check, in double precision, on `Net` and other models of the zoo."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.models import Net as Net
from trimtab import PeftConfig, PeftModel, get_peft_model


def image(seed: int = 1) -> Tensor:
    """An input of `Net`."""
    return torch.randn(3, 6, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def adapted(config: PeftConfig, model: nn.Module | None = None, amount: float = 0.3) -> PeftModel:
    """`Net` (or another model) in double precision with an adapter whose tensors have moved, in evaluation mode."""
    peft = get_peft_model((Net() if model is None else model).double(), config).eval()
    with torch.no_grad():
        for parameter in (p for p in peft.parameters() if p.requires_grad):
            parameter.add_(torch.randn(parameter.shape), alpha=amount)
    return peft


def numbers(t: Tensor) -> Any:
    """A tensor as nested lists."""
    return t.detach().tolist()


def merged(model: PeftModel, layer: str) -> Tensor:
    """The layer's weight with the adapter folded in, as it lies."""
    model.merge_adapter()
    weight = model.get_base_model().get_submodule(layer).base_layer.weight.detach().clone()
    model.unmerge_adapter()
    return weight


def same(a: Any, b: Any, tolerance: float = 1e-12) -> None:
    """Equal to within rounding."""
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    assert a.shape == b.shape
    assert float((a - b).detach().abs().max()) <= tolerance


def merging_changes_nothing(model: PeftModel, x: Tensor) -> None:
    """Forward and merged forward agree; unmerging is exact."""
    y = model(x)
    model.merge_adapter()
    same(model(x), y)
    model.unmerge_adapter()
    assert torch.equal(model(x), y)


def check_gradients(model: PeftModel, x: Tensor) -> None:
    """Every adapter tensor's gradient against finite differences."""
    weight = torch.randn(model(x).shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    (model(x) * weight).sum().backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            for at in range(0, p.numel(), max(1, p.numel() // 3)):
                values = []
                for step in (1e-5, -2e-5, 1e-5):
                    with torch.no_grad():
                        p.view(-1)[at] += step
                        values.append(float((model(x) * weight).sum()))
                assert abs((values[0] - values[1]) / 2e-5 - float(p.grad.view(-1)[at])) < 1e-6, name
