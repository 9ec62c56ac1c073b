"""HiRA against the elementwise product in plain loops."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.methods.formulas import product, transposed
from tests.methods.nets import Net, adapted, check_gradients, image, merged, merging_changes_nothing, numbers, same
from trimtab import HiraConfig

R = 2


def test_linear() -> None:
    model = adapted(HiraConfig(target_modules=["linear"], r=R))
    layer = model.get_base_model().linear
    M = product(numbers(layer.hira_B["default"]), numbers(layer.hira_A["default"]))
    W = numbers(layer.base_layer.weight)
    expected = [[w + w * m for w, m in zip(row, scale, strict=True)] for row, scale in zip(W, M, strict=True)]
    same(merged(model, "linear"), expected)


def test_embedding() -> None:
    torch.manual_seed(0)
    model = adapted(HiraConfig(target_modules=["0"], r=R), nn.Sequential(nn.Embedding(7, 5)))
    layer = model.get_base_model()[0]
    A, B = (numbers(getattr(layer, f"hira_embedding_{n}")["default"]) for n in "AB")
    rows = numbers(layer.base_layer.weight)
    M = transposed(product(B, A))
    ids = torch.tensor([[1, 6], [0, 1]])
    expected = [[[w * (1 + m) for w, m in zip(rows[i], M[i], strict=True)] for i in row] for row in ids.tolist()]
    same(model(ids), expected)
    merging_changes_nothing(model, ids)


@pytest.mark.parametrize("name", ["conv", "grouped", "point", "linear"])
def test_spellings_and_gradients_agree(name: str) -> None:
    model = adapted(HiraConfig(target_modules=[name], r=R))
    merging_changes_nothing(model, image())
    check_gradients(model, image())


def test_grouped_convolution_stays_within_its_groups() -> None:
    model = adapted(HiraConfig(target_modules=["grouped"], r=R))
    layer = model.get_base_model().grouped
    A, B = (numbers(getattr(layer, f"hira_{n}")["default"].flatten(1)) for n in "AB")
    W = layer.base_layer.weight.detach().clone().flatten(1)  # (4, 4·9), each half of the outputs with its own channels
    for o in range(4):
        for j in range(36):
            group = o // 2
            W[o, j] *= 1 + B[o][0] * A[group][group * 36 + j]  # of a rank of 2 each group has 1
    same(merged(model, "grouped").flatten(1), W)


def test_two_at_once_both_scale_the_base() -> None:
    model = adapted(HiraConfig(target_modules=["linear"], r=R, init_weights=False))
    model.add_adapter("second", HiraConfig(target_modules=["linear"], r=R, init_weights=False))
    layer = model.get_base_model().linear
    deltas = layer.get_delta_weight("default") + layer.get_delta_weight("second")
    model.base_model.set_adapter(["default", "second"])
    same(merged(model, "linear"), layer.base_layer.weight + deltas)
    merging_changes_nothing(model.eval(), image())


def test_rank_pattern_and_starts() -> None:
    config = HiraConfig(target_modules=["conv", "linear"], r=R, rank_pattern={"linear": 3}, init_weights="gaussian")
    base = adapted(config, Net(), amount=0).get_base_model()
    assert (base.conv.r["default"], base.linear.r["default"]) == (R, 3)
    assert not base.linear.hira_B["default"].any()
    assert 0.2 < float(base.linear.hira_A["default"].detach().std()) * 3 < 3
