"""WaveFT against the inverse wavelet transform in plain loops, and the filters against what defines them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import trimtab.methods.waveft as waveft
from tests.methods.nets import adapted, check_gradients, merged, merging_changes_nothing, numbers, same
from trimtab import PeftModel, WaveFTConfig, get_peft_model

FILTERS = json.loads((Path(waveft.__file__).parent / "waveft.json").read_text())
OUT, INTO = 5, 6


def line() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(INTO, OUT))


def wave(name: str, size: int, detail: int, k: int) -> list[float]:
    """What coefficient k of the averages or details adds to each of `size` numbers."""
    low = FILTERS[name]
    n = len(low)
    taps = [(-1) ** t * low[n - 1 - t] for t in range(n)] if detail else low
    return [taps[i + n - 2 - 2 * k] if 0 <= i + n - 2 - 2 * k < n else 0.0 for i in range(size)]


@pytest.mark.parametrize("name", ["db1", "db2", "sym4", "coif1"])
def test_formula(name: str) -> None:
    config = WaveFTConfig(target_modules=["0"], n_frequency=8, scaling=7.0, wavelet_family=name)
    model = adapted(config, line())
    layer = model.get_base_model()[0]
    values, places = numbers(layer.waveft_spectrum["default"]), numbers(layer.waveft_places["default"])
    edge = (len(FILTERS[name]) - 2) // 2
    rows, columns = (OUT + 1) // 2 + edge, INTO // 2 + edge
    W = numbers(layer.base_layer.weight)
    for value, place in zip(values, places, strict=True):
        i, j = place // INTO + edge, place % INTO + edge
        down = wave(name, OUT, j // columns, i % rows)  # the upper right quarter: details along the rows
        across = wave(name, INTO, i // rows, j % columns)
        for a in range(OUT):
            for b in range(INTO):
                W[a][b] += 7 * value * down[a] * across[b]
    same(merged(model, "0"), W)
    x = torch.randn(2, 4, INTO, dtype=torch.float64)
    merging_changes_nothing(model, x)
    check_gradients(model, x)


def test_without_the_transform_the_coefficients_are_entries() -> None:
    model = adapted(WaveFTConfig(target_modules=["0"], n_frequency=8, scaling=7.0, use_idwt=False), line())
    layer = model.get_base_model()[0]
    W = numbers(layer.base_layer.weight)
    for value, place in zip(
        *(numbers(getattr(layer, f"waveft_{n}")["default"]) for n in ("spectrum", "places")), strict=True
    ):
        W[place // INTO][place % INTO] += 7 * value
    same(merged(model, "0"), W)


@pytest.mark.parametrize("name", waveft.FAMILIES)
def test_filters_are_orthonormal_and_see_no_polynomials(name: str) -> None:
    """Two facts define them: they keep lengths, and their details of polynomials are zero."""
    low = FILTERS[name]
    assert len(low) % 2 == 0
    assert abs(sum(low) - math.sqrt(2)) < 1e-9
    for shift in range(0, len(low), 2):
        product = sum(a * b for a, b in zip(low, low[shift:], strict=False))
        assert abs(product - (shift == 0)) < 1e-9
    for power in range(2):
        if name not in ("db1",) or power == 0:
            moment = sum((-1) ** t * v * t**power for t, v in enumerate(low))
            assert abs(moment) < 1e-6


def test_coefficients_shared_out_by_size(tmp_path: Path) -> None:
    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 20))

    config = WaveFTConfig(target_modules=["0", "1"], n_frequency=10, proportional_parameters=True)
    model = adapted(config, net())
    assert [len(layer.waveft_spectrum["default"]) for layer in model.get_base_model()] == [5, 15]  # 20 by 54 to 180
    model.save_pretrained(tmp_path)
    x = torch.randn(4, 6, dtype=torch.float64)
    same(PeftModel.from_pretrained(net().double(), str(tmp_path))(x), model(x), 1e-6)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"n_frequency": 0}, "`n_frequency` should be a positive integer value but the value passed is 0"),
        ({"n_frequency": 31}, "less than or equal to the product of the input and output dimensions"),
        ({"wavelet_family": "db11"}, "Wavelet family db11 not supported"),
        ({"n_frequency": 5, "random_loc_seed": None}, "`random_loc_seed` must be a number"),
    ],
)
def test_what_cannot_be(options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        get_peft_model(line(), WaveFTConfig(target_modules=["0"], **options))
