"""IA3 against diag(l) W and W diag(l) in plain loops."""

from __future__ import annotations

import pytest
import torch

from tests.methods.nets import adapted, check_gradients, image, merged, merging_changes_nothing, numbers, same
from tests.models import llama, toy
from trimtab import IA3Config, get_peft_model


@pytest.mark.parametrize("inputs", [True, False])
def test_linear(inputs: bool) -> None:
    model = adapted(IA3Config(target_modules=["linear"], feedforward_modules=["linear"] if inputs else []))
    layer = model.get_base_model().linear
    l, W = numbers(layer.ia3_l["default"].flatten()), numbers(layer.base_layer.weight)
    expected = [[(l[j] if inputs else l[i]) * w for j, w in enumerate(row)] for i, row in enumerate(W)]
    same(merged(model, "linear"), expected)
    x = torch.randn(7, 12, dtype=torch.float64)
    b = numbers(layer.base_layer.bias)
    scaled = [c * (1 if inputs else l[i]) for i, c in enumerate(b)]
    same(layer(x), [[sum(w * v for w, v in zip(row, xs)) + c for row, c in zip(expected, scaled)] for xs in numbers(x)])


@pytest.mark.parametrize("name", ["conv", "grouped", "point"])
@pytest.mark.parametrize("inputs", [True, False])
def test_convolution(name: str, inputs: bool) -> None:
    model = adapted(IA3Config(target_modules=[name], feedforward_modules=[name] if inputs else []))
    layer = model.get_base_model().get_submodule(name)
    l, W = numbers(layer.ia3_l["default"].flatten()), layer.base_layer.weight.detach().clone()
    each = len(W) // layer.base_layer.groups  # output channels of a group
    for o in range(W.shape[0]):
        for c in range(W.shape[1]):
            W[o, c] *= l[o // each * W.shape[1] + c] if inputs else l[o]
    same(merged(model, name), W)
    merging_changes_nothing(model, image())
    check_gradients(model, image())


def test_two_at_once_multiply() -> None:
    model = adapted(IA3Config(target_modules=["linear"], feedforward_modules=["linear"]))
    model.add_adapter("b", IA3Config(target_modules=["linear"], feedforward_modules=[], init_ia3_weights=False))
    model.set_adapter(["default", "b"])
    layer = model.get_base_model().linear
    expected = layer.ia3_l["b"] * layer.base_layer.weight * layer.ia3_l["default"]
    same(merged(model, "linear"), expected, 1e-7)


def test_defaults_follow_the_architecture() -> None:
    config = get_peft_model(llama(), IA3Config()).peft_config["default"]
    assert config.target_modules == {"k_proj", "v_proj", "down_proj"}
    assert config.feedforward_modules == {"down_proj"}


def test_errors() -> None:
    with pytest.raises(ValueError, match="should be a subset of `target_modules`"):
        IA3Config(target_modules=["k_proj"], feedforward_modules=["down_proj"])
    with pytest.raises(ValueError, match="Please specify `feedforward_modules`"):
        get_peft_model(toy(), IA3Config(target_modules=["up"]))
    with pytest.raises(TypeError):
        IA3Config(layers_to_transform=[0])
