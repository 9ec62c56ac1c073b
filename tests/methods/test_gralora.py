"""GraLoRA block by block in plain loops, and the sizes it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.methods.nets import adapted, check_gradients, merged, merging_changes_nothing, numbers, same
from trimtab import GraloraConfig, LoraConfig


class Net(nn.Module):
    """One layer, whose sides are multiples of three."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(6, 9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(x))


def inputs() -> torch.Tensor:
    return torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("extra", [0, 2])
def test_formula(extra: int) -> None:
    k, r, s = 3, 6, 5 / (6 + extra)
    model = adapted(GraloraConfig(target_modules=["linear"], r=r, gralora_k=k, alpha=5, hybrid_r=extra), Net())
    layer = model.get_base_model().linear
    A, B = numbers(layer.gralora_A["default"]), numbers(layer.gralora_B["default"])
    W = numbers(layer.base_layer.weight)
    rank = r // k
    for q in range(9):
        for p in range(6):
            i, j = q // 3, p // 2  # the block
            W[q][p] += s * sum(A[j][p % 2][i * rank + c] * B[i][j * rank + c][q % 3] for c in range(rank))
    if extra:
        a = numbers(layer.gralora_A_general["default"].weight)
        b = numbers(layer.gralora_B_general["default"].weight)
        for q in range(9):
            for p in range(6):
                W[q][p] += s * sum(b[q][c] * a[c][p] for c in range(extra))
    same(merged(model, "linear"), W)
    merging_changes_nothing(model, inputs())
    check_gradients(model, inputs())


def test_as_many_parameters_as_lora_and_more_rank() -> None:
    model = adapted(GraloraConfig(target_modules=["linear"], r=3, gralora_k=3), Net())
    lora = adapted(LoraConfig(target_modules=["linear"], r=3), Net())
    count = lambda m: sum(p.numel() for p in m.parameters() if p.requires_grad)
    assert count(model) == count(lora)
    change = merged(model, "linear") - model.get_base_model().linear.base_layer.weight
    assert torch.linalg.matrix_rank(change) > 3


def test_sizes_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="r should be divisible by gralora_k, but got 4 and 3"):
        GraloraConfig(r=4, gralora_k=3)
    with pytest.raises(ValueError, match="in_features should be divisible by gralora_k, but got 6 and 4"):
        adapted(GraloraConfig(target_modules=["linear"], r=4, gralora_k=4), Net())
    with pytest.raises(ValueError, match="`hybrid_r` should be a non-negative integer value"):
        adapted(GraloraConfig(target_modules=["linear"], hybrid_r=-1), Net())
