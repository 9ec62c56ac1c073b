"""MiSS against the repeated matrix in plain loops."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.methods.nets import adapted, check_gradients, merged, merging_changes_nothing, numbers, same
from trimtab import MissConfig, get_peft_model

SIZES = {True: (7, 5), "mini": (7, 6), "bat": (9, 6)}  # into, out


def line(form: bool | str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(*SIZES[form]))


def config(form: bool | str, **more: object) -> MissConfig:
    return MissConfig(target_modules=["0"], r=3, mini_r=2, init_weights=form, **more)


@pytest.mark.parametrize("form", SIZES)
def test_formula(form: bool | str) -> None:
    model = adapted(config(form), line(form))
    layer = model.get_base_model()[0]
    D, W = numbers(layer.miss_block["default"]), numbers(layer.base_layer.weight)
    into, out = SIZES[form]
    expected = [list(row) for row in W]
    for i in range(out):
        for j in range(into):
            if form == "bat":
                block = D[i // 3]
                expected[i][j] += sum(W[i][j // 3 * 3 + k] * block[k][j % 3] for k in range(3)) + block[i % 3][j % 3]
            else:
                expected[i][j] += D[j % 3][i % 2 if form == "mini" else i]
    same(merged(model, "0"), expected)
    x = torch.randn(2, 4, into, dtype=torch.float64)
    merging_changes_nothing(model, x)
    check_gradients(model, x)


def test_two_at_once_both_see_the_base() -> None:
    model = adapted(config("bat"), line("bat"))
    model.add_adapter("second", config("bat"))
    layer = model.get_base_model()[0]
    with torch.no_grad():
        layer.miss_block["second"].normal_()
    deltas = layer.get_delta_weight("default") + layer.get_delta_weight("second")
    model.base_model.set_adapter(["default", "second"])
    same(merged(model, "0"), layer.base_layer.weight + deltas)


@pytest.mark.parametrize(
    ("form", "sizes", "options", "said"),
    [
        (True, (7, 5), {"r": 0}, "`r` should be a positive integer value but the value passed is 0"),
        (True, (7, 5), {"r": 8}, "must be less than or equal to in_features"),
        ("bat", (7, 6), {"r": 3}, "must be fully divisible into"),
        ("mini", (7, 5), {"r": 3, "mini_r": 2}, "must divide the 5 outputs"),
    ],
)
def test_sizes_that_do_not_fit(form: bool | str, sizes: tuple[int, int], options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        get_peft_model(nn.Sequential(nn.Linear(*sizes)), MissConfig(target_modules=["0"], init_weights=form, **options))
