"""Super-tuning against a sparse sum in plain loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.methods.formulas import product
from tests.methods.nets import adapted, check_gradients, merged, merging_changes_nothing, numbers, same
from trimtab import PeftModel, SupertuningConfig, get_peft_model


def line() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5))


@pytest.mark.parametrize("top", [True, False])
@pytest.mark.parametrize("r", [None, 2])
def test_formula(r: int | None, top: bool) -> None:
    model = adapted(SupertuningConfig(target_modules=["0"], sparsity=0.7, select_top=top, r=r), line())
    layer = model.get_base_model()[0]
    W = numbers(layer.base_layer.weight)
    by_size = sorted(range(35), key=lambda p: abs(W[p // 7][p % 7]), reverse=top)
    values, places = numbers(layer.supertuning_values["default"]), numbers(layer.supertuning_indices["default"])
    assert sorted(places) == sorted(by_size[:10])
    for value, place in zip(values, places, strict=True):
        W[place // 7][place % 7] += value
    if r:
        A, B = (numbers(getattr(layer, f"supertuning_lora_{n}")["default"].weight) for n in "AB")
        W = [[w + 2 * d for w, d in zip(*rows, strict=True)] for rows in zip(W, product(B, A), strict=True)]
    same(merged(model, "0"), W)
    x = torch.randn(2, 4, 7, dtype=torch.float64)
    merging_changes_nothing(model, x)
    check_gradients(model, x)


@pytest.mark.parametrize("kept", [True, False])
def test_places_in_the_file_or_found_again(kept: bool, tmp_path: Any) -> None:
    model = adapted(SupertuningConfig(target_modules=["0"], sparsity=0.7, save_precomputed_indices=kept), line())
    model.save_pretrained(tmp_path)
    x = torch.randn(4, 7, dtype=torch.float64)
    same(PeftModel.from_pretrained(line().double(), str(tmp_path))(x), model(x), 1e-6)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sparsity": 1.0}, "sparsity must be in"),
        ({"r": 0}, "r must be a positive integer or None"),
        ({"lora_alpha": 3.0}, "lora_alpha is set but r is None"),
        ({"r": 2, "lora_dropout": 1.5}, "`lora_dropout` should be a share"),
        ({"sparsity": 0.99}, "leaves no trainable entries"),
    ],
)
def test_what_cannot_be(options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        get_peft_model(line(), SupertuningConfig(target_modules=["0"], **options))
