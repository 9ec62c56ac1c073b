"""BEFT: a trained vector on top of the bias."""

from __future__ import annotations

import pytest

from tests.methods.nets import adapted, check_gradients, image, merging_changes_nothing, same
from tests.models import tokens, toy
from trimtab import BeftConfig


@pytest.mark.parametrize("name", ["linear", "conv", "grouped"])
def test_the_bias_moves_by_the_vector(name: str) -> None:
    model = adapted(BeftConfig(target_modules=[name]))
    layer = model.get_base_model().get_submodule(name)
    W, b, v = layer.base_layer.weight.clone(), layer.base_layer.bias.clone(), layer.beft_bias["default"]
    merging_changes_nothing(model, image())
    check_gradients(model, image())
    model.merge_adapter()
    same(layer.base_layer.weight, W)
    same(layer.base_layer.bias, b + v[0])


def test_a_layer_without_a_bias_gets_one_when_merged() -> None:
    model = adapted(BeftConfig(target_modules=["head"]), toy())
    v = model.get_base_model().head.beft_bias["default"]
    merging_changes_nothing(model, tokens())
    assert model.get_base_model().head.base_layer.bias is None
    same(model.merge_and_unload().head.bias, v[0])
