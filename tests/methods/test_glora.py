"""GLoRA against its five terms in plain loops."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.methods.formulas import product
from tests.methods.nets import adapted, check_gradients, merged, merging_changes_nothing, numbers, same
from trimtab import GloraConfig

FORMS = [("lora", "lora", "constant"), ("vector", "vector", "vector"), ("constant", "none", "none"),
         ("none", "lora", "vector")]  # fmt: skip


def line(bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5, bias=bias))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("forms", FORMS, ids="-".join)
def test_formula(forms: tuple[str, str, str], bias: bool) -> None:
    config = GloraConfig(target_modules=["0"], r=2, **dict(zip(("config_A_B", "config_C", "config_D_E"), forms)))
    model = adapted(config, line(bias)) if forms[0] != "none" or bias else None
    if model is None:
        return
    layer = model.get_base_model()[0]

    def value(letter: str, i: int, j: int = 0) -> float:
        term = getattr(layer, f"glora_{letter}")["default"]
        if hasattr(term, "Xd"):
            return product(numbers(term.Xd), numbers(term.Xu))[i][j]
        X = numbers(getattr(term, "X", torch.zeros(1)))
        row = X[i] if len(X) > 1 else X[0]
        return row[0] if isinstance(row, list) else row

    W = numbers(layer.base_layer.weight)
    new = [[w + w * value("A", i, j) + value("B", i, j) for j, w in enumerate(row)] for i, row in enumerate(W)]
    same(merged(model, "0"), new)
    if bias:
        b = [
            c + c * value("D", i) + value("E", i) + sum(w * value("C", j) for j, w in enumerate(W[i]))
            for i, c in enumerate(numbers(layer.base_layer.bias))
        ]
        same(model(torch.zeros(1, 6, dtype=torch.float64))[0], b)
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    merging_changes_nothing(model, x)
    check_gradients(model, x)


@pytest.mark.parametrize("field", ["config_A_B", "config_C", "config_D_E"])
def test_forms_that_there_are_not(field: str) -> None:
    with pytest.raises(ValueError, match=f"Invalid {field} value: 'full'. Valid values are:"):
        GloraConfig(**{field: "full"})
