"""OSF against its decomposition, and the directions its gradients keep to."""

from __future__ import annotations

import pytest
import torch

from tests.methods.nets import Net, adapted, image, merged, merging_changes_nothing, numbers, same
from tests.methods.test_oft import times
from tests.models import tokens, toy
from trimtab import OSFConfig, get_peft_model


@pytest.mark.parametrize(("name", "high"), [("linear", 2), ("conv", 5), ("point", 1)])
def test_formula(name: str, high: int) -> None:
    model = adapted(OSFConfig(target_modules=[name], effective_rank=high))
    layer = model.get_base_model().get_submodule(name)
    named = {n.rpartition(".")[2]: p for n, p in layer.named_parameters() if "osf" in n}
    W = layer.base_layer.weight.detach().flatten(1)
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    large = times(numbers(U[:, :high] * S[:high]), numbers(V[:high]))
    small = times([[u * s for u, s in zip(row, numbers(named["S_low"]))] for row in numbers(named["U_low"])],
                  numbers(named["V_low"]))  # fmt: skip
    expected = [[a + b for a, b in zip(*rows)] for rows in zip(large, small)]
    same(merged(model, name).flatten(1), expected, 1e-5)  # the decomposition is kept in fp32
    merging_changes_nothing(model, image())


@pytest.mark.parametrize("name", ["linear", "conv", "point"])
def test_gradients_are_at_right_angles_to_the_largest_directions(name: str) -> None:
    model = adapted(OSFConfig(target_modules=[name], effective_rank=2))
    layer = model.get_base_model().get_submodule(name)
    U, _, V = torch.linalg.svd(layer.base_layer.weight.detach().flatten(1), full_matrices=False)
    model(image()).square().sum().backward()
    named = {n.rpartition(".")[2]: p for n, p in layer.named_parameters() if "osf" in n}
    size = max(float(p.grad.abs().max()) for p in named.values())
    assert size > 1e-3
    for p in named.values():
        assert p.grad.abs().max() > 0
    assert float((U[:, :2].T @ named["U_low"].grad).abs().max()) < 1e-6 * max(size, 1)
    assert float((named["V_low"].grad @ V[:2].T).abs().max()) < 1e-6 * max(size, 1)


def test_ranks() -> None:
    for options, left in (
        ({}, 3),
        ({"effective_rank": 0.25}, 4),
        ({"effective_rank": 2}, 3),
        ({"rank_pattern": {"linear": 4}}, 1),
    ):
        model = get_peft_model(Net(), OSFConfig(target_modules=["linear"], **options))
        assert [len(p) for n, p in model.named_parameters() if "S_low" in n] == [left]
    with pytest.raises(ValueError, match="`effective_rank` should be a positive integer"):
        get_peft_model(Net(), OSFConfig(target_modules=["linear"], effective_rank=0))


def test_embedding() -> None:
    merging_changes_nothing(adapted(OSFConfig(target_modules=["embed", "scaled"]), toy()), tokens())
