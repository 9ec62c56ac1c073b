"""LoKr against the Kronecker product in plain loops."""

from __future__ import annotations

import pytest
import torch

from tests.methods.formulas import product
from tests.methods.nets import adapted, check_gradients, image, merged, merging_changes_nothing, numbers, same
from trimtab import LoKrConfig

ALPHA = 5


def test_linear() -> None:
    model = adapted(LoKrConfig(target_modules=["linear"], r=1, alpha=ALPHA, decompose_both=True))
    layer = model.get_base_model().linear  # 12 -> 5: w1 is (1, 3), w2 is (5, 4)
    w1_a, w1_b, w2_a, w2_b = (numbers(getattr(layer, f"lokr_{n}")["default"]) for n in ("w1_a", "w1_b", "w2_a", "w2_b"))
    w1, w2 = product(w1_a, w1_b), product(w2_a, w2_b)
    W = numbers(layer.base_layer.weight)
    for i in range(5):
        for j in range(12):
            W[i][j] += ALPHA * w1[i // 5][j // 4] * w2[i % 5][j % 4]
    same(merged(model, "linear"), W)


@pytest.mark.parametrize("name", ["conv", "grouped"])
def test_cores_of_a_convolution(name: str) -> None:
    options = {"r": 1, "alpha": ALPHA, "use_effective_conv2d": True, "decompose_factor": 1 if name == "grouped" else 2}
    model = adapted(LoKrConfig(target_modules=[name], **options))
    layer = model.get_base_model().get_submodule(name)
    w1, a, b, t = (numbers(getattr(layer, f"lokr_{n}")["default"]) for n in ("w1", "w2_a", "w2_b", "t2"))
    W = layer.base_layer.weight.detach().clone()
    k, n = len(a[0]), len(b[0])
    for o in range(W.shape[0]):
        for c in range(W.shape[1]):
            for x in range(3):
                for y in range(3):
                    W[o, c, x, y] += ALPHA * w1[o // k][c // n] * t[0][0][x][y] * a[0][o % k] * b[0][c % n]
    same(merged(model, name), W)


@pytest.mark.parametrize("options", [{}, {"decompose_both": True, "use_effective_conv2d": True}, {"r": 50}], ids=str)
@pytest.mark.parametrize("name", ["conv", "grouped", "point", "linear"])
def test_spellings_and_gradients_agree(name: str, options: dict) -> None:
    model = adapted(LoKrConfig(target_modules=[name], **{"r": 1, "alpha": ALPHA, "init_weights": False, **options}))
    merging_changes_nothing(model, image())
    check_gradients(model, image())


@pytest.mark.parametrize("rescale", [True, False])
def test_rank_dropout_leaves_rows_out(rescale: bool) -> None:
    config = LoKrConfig(target_modules=["linear"], init_weights=False, rank_dropout=0.5, rank_dropout_scale=rescale)
    layer = adapted(config).train().get_base_model().linear
    x = torch.eye(12, dtype=torch.float64)
    whole = layer.get_delta_weight("default").detach()
    seen = set()
    for _ in range(20):
        rows = ((layer(x) - layer.base_layer(x)).detach().T / whole).mean(1)
        kept = int((rows > 0.5).sum())
        seen.add(kept)
        assert kept == 0 or abs(float(rows.max()) - (len(rows) / kept if rescale else 1)) < 1e-6
    assert len(seen) > 1


def test_module_dropout_skips_the_whole_layer() -> None:
    config = LoKrConfig(target_modules=["linear"], module_dropout=0.5)
    layer = adapted(config).train().get_base_model().linear
    x = torch.randn(2, 12, dtype=torch.float64)
    assert 8 < sum(torch.equal(layer(x), layer.base_layer(x)) for _ in range(40)) < 32
