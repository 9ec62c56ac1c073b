"""DEFT against what is taken out and put in, in plain loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.methods.nets import Net, adapted, check_gradients, image, merged, merging_changes_nothing, numbers, same
from tests.methods.test_hra import orthogonal
from tests.methods.test_oft import times
from tests.models import tokens, toy
from trimtab import DeftConfig, LoraConfig, get_peft_model


def transposed(M: list) -> list:
    return [list(column) for column in zip(*M)]


def moved(W: list, P: list, R: list | None, qr: bool, s: float) -> list:
    """W - G Kᵀ W + s G R."""
    if qr:
        axes = orthogonal(transposed(P))
        K = G = transposed([[v / sum(a * a for a in u) ** 0.5 for v in u] for u in axes])
    else:
        G, K = P, [[max(v, 0.0) for v in row] for row in P]
    out = times(G, times(transposed(K), W))
    into = times(G, R) if R else [[0.0] * len(W[0]) for _ in W]
    if qr and R:  # the signs of the axes are the factorisation's
        Q = torch.linalg.qr(torch.tensor(P, dtype=torch.float64)).Q
        into = numbers(Q @ torch.tensor(R, dtype=torch.float64))
    return [[w - o + s * i for w, o, i in zip(*rows)] for rows in zip(W, out, into)]


@pytest.mark.parametrize("name", ["linear", "conv", "point"])
@pytest.mark.parametrize(
    ("options", "s"),
    [
        ({"r": 3}, 1.0),
        ({"r": 3, "alpha": 6}, 2.0),
        ({"r": 2, "decomposition_method": "qr", "alpha": 3}, 1.5),
        ({"r": 2, "para": True}, 1.0),
        ({"r": 2, "para": True, "decomposition_method": "qr"}, 1.0),
    ],
)
def test_formula(name: str, options: dict[str, Any], s: float) -> None:
    model = adapted(DeftConfig(target_modules=[name], **options))
    layer = model.get_base_model().get_submodule(name)
    P, R = (
        numbers(getattr(layer, f"deft_{n}")["default"]) if n == "P" or not options.get("para") else None for n in "PR"
    )
    W = numbers(layer.base_layer.weight.flatten(1))
    same(merged(model, name).flatten(1), moved(W, P, R, "decomposition_method" in options, s))
    merging_changes_nothing(model, image())
    check_gradients(model, image())


def test_embedding_and_a_stack() -> None:
    model = adapted(DeftConfig(target_modules=["embed", "up"], r=3), toy())
    model.add_adapter("b", LoraConfig(target_modules=["embed", "up"], r=2, init_lora_weights=False))
    for names in (["default", "b"], ["b", "default"]):
        model.set_adapter(names)
        y = model(tokens())
        model.merge_adapter(names)
        same(model(tokens()), y)
        model.unmerge_adapter()


def test_starts_and_errors() -> None:
    base = Net().double()(image())
    for options in ({}, {"alpha": 3}, {"decomposition_method": "qr", "r": 99}):
        same(get_peft_model(Net().double(), DeftConfig(target_modules=["linear"], **options))(image()), base)
    with pytest.raises(ValueError, match="`decomposition_method` should be one of 'relu', 'qr'"):
        DeftConfig(decomposition_method="svd")
    with pytest.raises(ValueError, match="`r` should be a positive integer"):
        get_peft_model(Net(), DeftConfig(target_modules=["linear"], r=0))
