"""SHiRA against a sparse sum in plain loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.methods.nets import adapted, check_gradients, merged, merging_changes_nothing, numbers, same
from trimtab import PeftModel, ShiraConfig, get_peft_model


def line() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5))


def corner(layer: Any, r: int, random_seed: int | None = None) -> Tensor:
    """The first entries."""
    return (torch.arange(layer.weight.numel()) < r * sum(layer.weight.shape)).view_as(layer.weight)


def test_formula() -> None:
    model = adapted(ShiraConfig(target_modules=["0"], r=2), line())
    layer = model.get_base_model()[0]
    values, (rows, columns) = numbers(layer.shira_weight["default"]), numbers(layer.shira_indices["default"])
    assert len({*zip(rows, columns, strict=True)}) == 24
    W = numbers(layer.base_layer.weight)
    for value, i, j in zip(values, rows, columns, strict=True):
        W[i][j] += value
    same(merged(model, "0"), W)
    x = torch.randn(2, 4, 7, dtype=torch.float64)
    merging_changes_nothing(model, x)
    check_gradients(model, x)


def test_entries_that_a_function_chooses_are_in_the_file(tmp_path: Any) -> None:
    config = ShiraConfig(target_modules=["0"], r=1)
    config.mask_fn = corner
    model = adapted(config, line())
    assert numbers(model.get_base_model()[0].shira_indices["default"]) == [[0] * 7 + [1] * 5, [*range(7), *range(5)]]
    model.save_pretrained(tmp_path)
    read = PeftModel.from_pretrained(line().double(), str(tmp_path))
    x = torch.randn(4, 7, dtype=torch.float64)
    same(read(x), model(x), 1e-6)
    config.mask_fn = lambda layer, r, random_seed: torch.ones_like(layer.weight)
    with pytest.raises(ValueError, match="chose 35 entries"):
        get_peft_model(line(), config)


def test_entries_of_another_type_are_chosen_by_a_function(tmp_path: Any) -> None:
    said = r"Argument self.mask_type='custom' is not recognized, please supply your own masking function"
    with pytest.warns(UserWarning, match=said):
        config = ShiraConfig(target_modules=["0"], r=1, mask_type="custom", random_seed=3)
    with pytest.raises(ValueError, match=r"needs a function that chooses: set `config.mask_fn`"):
        get_peft_model(line(), config)
    config.mask_fn = lambda layer, r: corner(layer, r)  # without a seed, which is that of "random"
    model = adapted(config, line())
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=said):
        read = PeftModel.from_pretrained(line().double(), str(tmp_path))
    x = torch.randn(4, 7, dtype=torch.float64)
    same(read(x), model(x), 1e-6)


def test_a_seed_and_ranks_that_cannot_be() -> None:
    def places(seed: int) -> Any:
        config = ShiraConfig(target_modules=["0"], r=1, random_seed=seed)
        return numbers(get_peft_model(line(), config).get_base_model()[0].shira_indices["default"])

    assert places(3) == places(3) != places(4)
    for r, said in ((0, "`r` should be a positive integer"), (3, "more shira params than the total number")):
        with pytest.raises(ValueError, match=said):
            get_peft_model(line(), ShiraConfig(target_modules=["0"], r=r))
