"""PSOFT against a turned principal subspace in plain loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.methods.nets import Net, adapted, check_gradients, image, merged, merging_changes_nothing, numbers, same
from tests.methods.test_oft import rotation, times
from tests.models import tokens, toy
from trimtab import PsoftConfig, get_peft_model


def turned(layer: torch.nn.Module, r: int, how: str) -> list:
    """W + U S (diag(b) R diag(a) - I) V, as lists."""
    W = layer.base_layer.weight.detach().flatten(1)
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    named = {n.removeprefix("psoft_R.default."): numbers(p) for n, p in layer.named_parameters() if "psoft" in n}
    v = named["weight"]
    R = v if how == "free" else rotation(v, r, 4) if how == "series" else rotation([-x for x in v], r)
    a, b = (named.get(f"vector_{side}", [1.0] * r) for side in "ab")
    M = [[b[i] * R[i][j] * a[j] - (i == j) for j in range(r)] for i in range(r)]
    update = times(times(numbers(U[:, :r] * S[:r]), M), numbers(V[:r]))
    return [[w + u for w, u in zip(*rows)] for rows in zip(numbers(W), update)]


@pytest.mark.parametrize("name", ["linear", "conv", "point"])
@pytest.mark.parametrize(
    ("options", "how"),
    [
        ({}, "exact"),
        ({"psoft_alpha": 7, "psoft_mag_a": False}, "exact"),
        ({"psoft_orth": False, "psoft_mag_b": False}, "free"),
        ({"use_cayley_neumann": True}, "series"),
    ],
)
def test_formula(name: str, options: dict[str, Any], how: str) -> None:
    model = adapted(PsoftConfig(target_modules=[name], r=3, **options))
    layer = model.get_base_model().get_submodule(name)
    same(merged(model, name).flatten(1), turned(layer, 3, how), 1e-6)  # the subspace is kept in fp32
    merging_changes_nothing(model, image())
    check_gradients(model, image())


def test_the_starts_split_one_approximation() -> None:
    """However the singular values are split, s B A is the best approximation of rank r."""
    for options in ({}, {"psoft_alpha": 9}, {"ab_svd_init": "pissa_init"}):
        model = get_peft_model(Net(), PsoftConfig(target_modules=["linear"], r=3, **options))
        (method,) = model.get_base_model().linear.methods["default"]
        A, B = (method.tensor(f"_psoft_{n}_cache") for n in "AB")
        U, S, V = torch.linalg.svd(model.get_base_model().linear.base_layer.weight, full_matrices=False)
        same(method.scaling * B @ A, U[:, :3] * S[:3] @ V[:3], 1e-5)


def test_embedding() -> None:
    merging_changes_nothing(adapted(PsoftConfig(target_modules=["embed", "scaled"], r=3), toy()), tokens())


def test_errors() -> None:
    for options, message in (
        ({"r": 0}, "`r` must be a positive integer"),
        ({"r": 6}, r"`r` \(6\) must be less than or equal to min"),
        ({"r": 2, "ab_svd_init": "x"}, "`ab_svd_init` should be one of"),
        ({"r": 2, "use_cayley_neumann": True, "num_cayley_neumann_terms": 0}, "`num_cayley_neumann_terms` must be"),
        ({"r": 2, "use_cayley_neumann": True, "cayley_neumann_eps": 2.0}, r"`cayley_neumann_eps` must be in \(0, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            get_peft_model(Net(), PsoftConfig(target_modules=["linear"], **options))
