"""RoAd against turned pairs in plain loops."""

from __future__ import annotations

import math

import pytest

from tests.methods.nets import Net, adapted, check_gradients, image, merged, merging_changes_nothing, numbers, same
from tests.models import tokens, toy
from trimtab import RoadConfig, get_peft_model


def turned(rows: list, theta: list, alpha: list, variant: str, g: int) -> list:
    """R times the matrix of these rows."""
    half, out = g // 2, [list(row) for row in rows]
    number = lambda which, start: alpha[start] * which(theta[start])
    for i in range(len(rows) // g):
        for j in range(half):
            if variant == "road_1":
                first = second = i * half + j
                places = (first, second, first, second)
            elif variant == "road_2":
                first, second = i * g + j, i * g + half + j
                places = (first, second, first, second)
            else:
                places = tuple(i * 2 * g + k * half + j for k in range(4))
            c1, c2 = (number(math.cos, p) for p in places[:2])
            s1, s2 = (number(math.sin, p) for p in places[2:])
            a, b = i * g + j, i * g + half + j
            out[a] = [c1 * x - s1 * y for x, y in zip(rows[a], rows[b])]
            out[b] = [s2 * x + c2 * y for x, y in zip(rows[a], rows[b])]
    return out


@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
@pytest.mark.parametrize(("name", "g"), [("point", 4), ("conv", 8), ("grouped", 2)])
def test_convolutions(variant: str, name: str, g: int) -> None:
    config = RoadConfig(target_modules=[name], group_size=g, variant=variant)
    if name == "grouped":  # its groups cannot hold the turned weight, but it runs
        model = adapted(config)
        check_gradients(model, image())
        return
    model = adapted(config)
    layer = model.get_base_model().get_submodule(name)
    theta, alpha = (numbers(t["default"]) for t in (layer.road_theta, layer.road_alpha))
    W = numbers(layer.base_layer.weight.flatten(1))
    same(merged(model, name).flatten(1), turned(W, theta, alpha, variant, g))
    merging_changes_nothing(model, image())
    check_gradients(model, image())


@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
def test_linear_with_its_bias(variant: str) -> None:
    model = adapted(RoadConfig(target_modules=["up"], group_size=10, variant=variant), toy())
    layer = model.get_base_model().up
    theta, alpha = (numbers(t["default"]) for t in (layer.road_theta, layer.road_alpha))
    W, b = numbers(layer.base_layer.weight), numbers(layer.base_layer.bias[:, None])
    merging_changes_nothing(model, tokens())
    model.merge_adapter()
    same(layer.base_layer.weight, turned(W, theta, alpha, variant, 10))
    same(layer.base_layer.bias[:, None], turned(b, theta, alpha, variant, 10))


def test_errors() -> None:
    for options, message in (
        ({"variant": "road_3"}, "Invalid variant road_3"),
        ({"group_size": 3}, "must be divisible by 2"),
        ({"group_size": 0}, "must be divisible by 2"),
        ({"group_size": 8}, "must be divisible by group_size"),
    ):
        with pytest.raises(ValueError, match=message):
            get_peft_model(Net(), RoadConfig(target_modules=["linear"], **options))
