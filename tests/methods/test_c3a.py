"""C3A against circulant blocks in plain loops."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.methods.nets import adapted, check_gradients, merged, merging_changes_nothing, numbers, same
from trimtab import C3AConfig, get_peft_model


@pytest.mark.parametrize("b", [1, 2, 3, 6])
def test_formula(b: int) -> None:
    torch.manual_seed(0)
    model = adapted(C3AConfig(target_modules=["0"], block_size=b), nn.Sequential(nn.Linear(12, 6)))
    layer = model.get_base_model()[0]
    c, W = numbers(layer.c3a_kernel["default"]), numbers(layer.base_layer.weight)
    for i in range(6):
        for j in range(12):
            W[i][j] += c[i // b][j // b][(j % b - i % b) % b] / 12
    same(merged(model, "0"), W)
    x = torch.randn(2, 4, 12, dtype=torch.float64)
    merging_changes_nothing(model, x)
    check_gradients(model, x)


def test_starts() -> None:
    spread = {}
    for start in (True, False, "gaussian", "kaiming_uniform", "xavier_uniform"):
        config = C3AConfig(target_modules=["0"], block_size=16, init_weights=start)
        c = get_peft_model(nn.Sequential(nn.Linear(64, 128)), config).get_base_model()[0].c3a_kernel["default"].detach()
        spread[start] = (float(c.abs().max()), float(c.std()))
    assert spread[True] == (0, 0)
    assert abs(spread["gaussian"][1] - 1) < 0.1
    for start, bound in (("kaiming_uniform", 64**-0.5), (False, 32**-0.5), ("xavier_uniform", 32**-0.5)):
        assert 0.97 * bound < spread[start][0] <= bound


def test_a_pattern_and_sizes_that_do_not_fit() -> None:
    net = nn.Sequential(nn.Linear(12, 6), nn.Linear(6, 9))
    config = C3AConfig(target_modules=["0", "1"], block_size=6, block_size_pattern={"1": 3})
    base = get_peft_model(net, config).get_base_model()
    assert [tuple(layer.c3a_kernel["default"].shape) for layer in base] == [(1, 2, 6), (3, 2, 3)]
    for size, said in ((4, "a factor of the output size"), (5, "a factor of the input size"), (0, "positive integer")):
        with pytest.raises(ValueError, match=said):
            get_peft_model(nn.Sequential(nn.Linear(12, 6)), C3AConfig(target_modules=["0"], block_size=size))
