"""HRA against reflections one after another in plain loops."""

from __future__ import annotations

import pytest
import torch

from tests.methods.nets import Net, adapted, check_gradients, image, merged, merging_changes_nothing, numbers, same
from trimtab import HRAConfig, get_peft_model


def reflected(W: list, axes: list) -> list:
    """W H_1 ... H_r for the axes u_1 ... u_r."""
    for u in axes:
        square = sum(v * v for v in u)
        W = [[w - 2 * sum(a * b for a, b in zip(row, u)) * v / square for w, v in zip(row, u)] for row in W]
    return W


def orthogonal(axes: list) -> list:
    """Gram and Schmidt."""
    done: list = []
    for u in axes:
        for q in done:
            dot = sum(a * b for a, b in zip(u, q)) / sum(a * a for a in q)
            u = [a - dot * b for a, b in zip(u, q)]
        done.append(u)
    return done


@pytest.mark.parametrize("name", ["linear", "conv", "point"])
@pytest.mark.parametrize(("r", "GS"), [(4, False), (3, False), (2, True)])
def test_formula(name: str, r: int, GS: bool) -> None:
    model = adapted(HRAConfig(target_modules=[name], r=r, apply_GS=GS))
    layer = model.get_base_model().get_submodule(name)
    axes = numbers(layer.hra_u["default"].T)
    W = numbers(layer.base_layer.weight.flatten(1))
    same(merged(model, name).flatten(1), reflected(W, orthogonal(axes) if GS else axes))
    merging_changes_nothing(model, image())
    check_gradients(model, image())


def test_more_reflections_than_inputs() -> None:
    model = adapted(HRAConfig(target_modules=["linear"], r=20))
    layer = model.get_base_model().linear
    same(merged(model, "linear"), reflected(numbers(layer.base_layer.weight), numbers(layer.hra_u["default"].T)))


def test_starts() -> None:
    base = Net().double()(image())
    same(get_peft_model(Net().double(), HRAConfig(target_modules=["linear"], r=4))(image()), base)
    for options, reason in (({"r": 3}, "r is odd"), ({"r": 4, "apply_GS": True}, "orthogonal axes")):
        with pytest.warns(UserWarning, match=reason):
            model = get_peft_model(Net().double(), HRAConfig(target_modules=["linear"], **options))
        assert torch.isfinite(model(image())).all()
    with pytest.raises(ValueError, match="no 13 axes"):
        get_peft_model(Net(), HRAConfig(target_modules=["linear"], r=13, apply_GS=True))
