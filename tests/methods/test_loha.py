"""LoHa against the elementwise product of two low-rank matrices in plain loops."""

from __future__ import annotations

import pytest
import torch

from tests.methods.nets import adapted, check_gradients, image, merged, merging_changes_nothing, numbers, same
from trimtab import LoHaConfig, get_peft_model

R, ALPHA = 3, 5


def factors(layer: torch.nn.Module) -> list:
    return [numbers(getattr(layer, f"hada_{n}")["default"]) for n in ("w1_a", "w1_b", "w2_a", "w2_b")]


def test_linear() -> None:
    model = adapted(LoHaConfig(target_modules=["linear"], r=R, alpha=ALPHA))
    layer = model.get_base_model().linear
    a1, b1, a2, b2 = factors(layer)
    W = numbers(layer.base_layer.weight)
    for i, row in enumerate(W):
        for j in range(len(row)):
            first = sum(a1[i][k] * b1[k][j] for k in range(R))
            row[j] += ALPHA / R * first * sum(a2[i][k] * b2[k][j] for k in range(R))
    same(merged(model, "linear"), W)


@pytest.mark.parametrize("name", ["conv", "grouped"])
def test_cores_of_a_convolution(name: str) -> None:
    model = adapted(LoHaConfig(target_modules=[name], r=R, alpha=ALPHA, use_effective_conv2d=True))
    layer = model.get_base_model().get_submodule(name)
    a1, b1, a2, b2 = factors(layer)
    t1, t2 = (numbers(getattr(layer, f"hada_{t}")["default"]) for t in ("t1", "t2"))
    W = layer.base_layer.weight.detach().clone()
    for o in range(W.shape[0]):
        for c in range(W.shape[1]):
            for x in range(3):
                for y in range(3):
                    first, second = (
                        sum(t[i][j][x][y] * a[i][o] * b[j][c] for i in range(R) for j in range(R))
                        for t, a, b in ((t1, a1, b1), (t2, a2, b2))
                    )
                    W[o, c, x, y] += ALPHA / R * first * second
    same(merged(model, name), W)


@pytest.mark.parametrize("cores", [True, False])
@pytest.mark.parametrize("name", ["conv", "grouped", "point", "linear"])
def test_spellings_and_gradients_agree(name: str, cores: bool) -> None:
    model = adapted(LoHaConfig(target_modules=[name], r=R, alpha=ALPHA, use_effective_conv2d=cores))
    merging_changes_nothing(model, image())
    check_gradients(model, image())


def test_patterns() -> None:
    patterns = {"rank_pattern": {"linear": 2}, "alpha_pattern": {"conv": 7}}
    base = adapted(LoHaConfig(target_modules=["conv", "linear"], r=R, alpha=ALPHA, **patterns)).get_base_model()
    assert (base.conv.r["default"], base.conv.scaling["default"]) == (R, 7 / R)
    assert (base.linear.r["default"], base.linear.scaling["default"]) == (2, ALPHA / 2)


def test_rank_dropout_leaves_rows_out_and_keeps_the_sum() -> None:
    layer = adapted(LoHaConfig(target_modules=["linear"], rank_dropout=0.5)).train().get_base_model().linear
    x = torch.eye(12, dtype=torch.float64)
    whole = layer.get_delta_weight("default").detach()
    for _ in range(10):
        ratio = (layer(x) - layer.base_layer(x)).detach().T / whole
        rows = ratio.mean(1)
        same(ratio, rows[:, None].expand_as(ratio), 1e-6)
        kept = (rows > 0.5).sum()
        assert kept == 0 or abs(float(rows.max()) - len(rows) / float(kept)) < 1e-6


def test_module_dropout_skips_the_whole_layer() -> None:
    layer = adapted(LoHaConfig(target_modules=["linear"], module_dropout=0.5)).train().get_base_model().linear
    x = torch.randn(2, 12, dtype=torch.float64)
    plain = [torch.equal(layer(x), layer.base_layer(x)) for _ in range(40)]
    assert 8 < sum(plain) < 32
    assert not torch.equal(layer.eval()(x), layer.base_layer(x))


def test_rank_must_be_positive() -> None:
    from tests.methods.nets import Net

    with pytest.raises(ValueError, match="`r` should be a positive integer value but the value passed is 0"):
        get_peft_model(Net(), LoHaConfig(target_modules=["linear"], r=0))
