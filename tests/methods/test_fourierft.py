"""FourierFT against the inverse discrete Fourier transform in plain loops."""

from __future__ import annotations

import cmath
import math

import pytest
import torch
from torch import nn

from tests.methods.nets import adapted, check_gradients, merged, merging_changes_nothing, numbers, same
from trimtab import FourierFTConfig, PeftModel, get_peft_model


def line() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5))


def test_formula() -> None:
    model = adapted(FourierFTConfig(target_modules=["0"], n_frequency=8, scaling=7.0), line())
    layer = model.get_base_model()[0]
    values, places = numbers(layer.fourierft_spectrum["default"]), numbers(layer.fourierft_places["default"])
    assert len(set(places)) == 8
    W = numbers(layer.base_layer.weight)
    for i in range(5):
        for j in range(6):
            waves = (
                v * cmath.exp(2j * math.pi * (p // 6 * i / 5 + p % 6 * j / 6)).real
                for v, p in zip(values, places, strict=True)
            )
            W[i][j] += 7 * sum(waves) / 30
    same(merged(model, "0"), W)
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    merging_changes_nothing(model, x)
    check_gradients(model, x)


def test_places_follow_from_the_seed_and_are_drawn_again_on_load(tmp_path) -> None:
    model = adapted(FourierFTConfig(target_modules=["0"], n_frequency=8, random_loc_seed=3), line())
    model.save_pretrained(tmp_path)
    read = PeftModel.from_pretrained(line().double(), str(tmp_path))
    x = torch.randn(4, 6, dtype=torch.float64)
    same(read(x), model(x), 1e-6)
    places = [m.get_base_model()[0].fourierft_places["default"] for m in (model, read)]
    assert torch.equal(*places)
    other = get_peft_model(line(), FourierFTConfig(target_modules=["0"], n_frequency=8, random_loc_seed=4))
    assert not torch.equal(places[0], other.get_base_model()[0].fourierft_places["default"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"n_frequency": 0}, "`n_frequency` should be a positive integer value but the value passed is 0"),
        ({"n_frequency": 31}, "less than or equal to the product of the input and output dimensions"),
        ({"n_frequency": 5, "random_loc_seed": None}, "`random_loc_seed` must be a number"),
    ],
)
def test_what_cannot_be(options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        get_peft_model(line(), FourierFTConfig(target_modules=["0"], **options))
