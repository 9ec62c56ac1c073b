"""PEANuT against its network of the weight, in plain loops."""

from __future__ import annotations

import math

import pytest

from tests.methods.nets import Net, adapted, check_gradients, image, merged, merging_changes_nothing, numbers, same
from tests.methods.test_oft import times
from tests.models import tokens, toy
from trimtab import LoraConfig, PeanutConfig, get_peft_model

ACT = {"relu": lambda v: max(v, 0.0), "tanh": math.tanh}


def activated(M: list, name: str) -> list:
    return [[ACT[name](v) for v in row] for row in M]


@pytest.mark.parametrize("name", ["linear", "conv", "point"])
@pytest.mark.parametrize(("depth", "act"), [(0, "relu"), (1, "tanh"), (2, "tanh")])
def test_formula(name: str, depth: int, act: str) -> None:
    model = adapted(PeanutConfig(target_modules=[name], r=3, depth=depth, act_fn=act, scaling=1.5))
    layer = model.get_base_model().get_submodule(name)
    A, B = (numbers(getattr(layer, f"peanut_{n}")["default"].weight) for n in "AB")
    square = {n: numbers(p) for n, p in layer.named_parameters() if "coders" in n}
    W = numbers(layer.base_layer.weight.flatten(1))
    z, given = activated(times(A, W), act), []
    for i in range(depth):
        given.append(z)
        z = activated(times(square[f"peanut_encoders.default.{i}.weight"], z), act)
    for i in range(depth):
        new = activated(times(square[f"peanut_decoders.default.{i}.weight"], z), act)
        z = [[a + b for a, b in zip(*rows)] for rows in zip(new, given[depth - 1 - i])]
    update = times(B, z)
    same(merged(model, name).flatten(1), [[w + 1.5 * u for w, u in zip(*rows)] for rows in zip(W, update)])
    merging_changes_nothing(model, image())
    check_gradients(model, image())


def test_embedding_and_a_stack() -> None:
    model = adapted(PeanutConfig(target_modules=["embed", "up"], r=3, act_fn="silu"), toy())
    model.add_adapter("b", LoraConfig(target_modules=["embed", "up"], r=2, init_lora_weights=False))
    for names in (["default", "b"], ["b", "default"]):
        model.set_adapter(names)
        y = model(tokens())
        model.merge_adapter(names)
        same(model(tokens()), y)
        model.unmerge_adapter()


def test_errors() -> None:
    for options, message in (
        ({"r": 0}, "`r` must be a positive integer"),
        ({"depth": -1}, "`depth` can only be a non-negative integer"),
        ({"act_fn": "nope"}, "Unsupported `act_fn`: nope"),
    ):
        with pytest.raises(ValueError, match=message):
            get_peft_model(Net(), PeanutConfig(target_modules=["linear"], **options))
