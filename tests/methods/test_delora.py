"""DeLoRA against B diag(λ / (r ‖A_i‖ ‖B_i‖)) A diag(‖W_j‖) in plain loops, and the bound it promises."""

from __future__ import annotations

import math

import torch

from tests.methods.formulas import norms, transposed
from tests.methods.nets import adapted, check_gradients, image, merged, merging_changes_nothing, numbers, same
from trimtab import DeloraConfig


def test_formula() -> None:
    model = adapted(DeloraConfig(target_modules=["linear"], r=3, delora_lambda=2))
    layer = model.get_base_model().linear
    A, B = numbers(layer.delora_A["default"]), numbers(layer.delora_B["default"])
    (strength,) = numbers(layer.delora_lambda["default"])
    W = numbers(layer.base_layer.weight)
    columns, a, b = norms(transposed(W)), norms(A), norms(transposed(B))
    expected = [
        [
            W[i][j] + sum(B[i][k] * strength / (3 * a[k] * b[k]) * A[k][j] for k in range(3)) * columns[j]
            for j in range(len(W[0]))
        ]
        for i in range(len(W))
    ]
    same(merged(model, "linear"), expected)
    merging_changes_nothing(model, image())
    check_gradients(model, image())


def test_the_change_is_bounded_by_lambda() -> None:
    """Each of r directions has norm λ / r: without the weight's norms, the sum has λ at most, however large A and B."""
    model = adapted(DeloraConfig(target_modules=["linear"], r=3, delora_lambda=2), amount=0.0)
    layer = model.get_base_model().linear
    with torch.no_grad():
        layer.delora_A["default"].normal_(std=100)
        layer.delora_B["default"].normal_(std=100)
    change = (merged(model, "linear") - layer.base_layer.weight) / layer.delora_w_norm["default"]
    assert 0 < change.norm() <= 2 + 1e-9
    assert math.isclose(
        float(layer.delora_w_norm["default"][1]), norms(transposed(numbers(layer.base_layer.weight)))[1]
    )
