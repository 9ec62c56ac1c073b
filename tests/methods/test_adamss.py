"""AdaMSS against clusters' updates in plain loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.methods.nets import Net, adapted, check_gradients, image, merging_changes_nothing, numbers, same
from tests.methods.test_oft import times
from trimtab import AdamssConfig, get_peft_model
from trimtab.methods.adamss import rank_of


@pytest.mark.parametrize("name", ["linear", "conv", "point"])
@pytest.mark.parametrize("options", [{}, {"subspace_rank": 3}, {"num_subspaces": 99, "r": 2}])
def test_formula(name: str, options: dict[str, Any]) -> None:
    model = adapted(AdamssConfig(target_modules=[name], **{"r": 4, "num_subspaces": 2, **options}))
    layer = model.get_base_model().get_submodule(name)
    (method,) = layer.methods["default"]
    named = {n: numbers(p) for n, p in layer.named_parameters() if "adamss" in n}
    V = numbers(layer.adamss_newB["default"])
    W = numbers(torch.cat([layer.base_layer.weight.flatten(1), layer.base_layer.bias[:, None]], 1))
    assert sorted(int(i) for rows in method.clusters for i in rows) == list(range(len(W)))
    for k, rows in enumerate(method.clusters):
        update = times(times(named[f"adamss_B.default.{k}"], named[f"adamss_A.default.{k}"]), V)
        for i, new in zip(rows.tolist(), update):
            W[i] = [w + u for w, u in zip(W[i], new)]
    merging_changes_nothing(model, image())
    check_gradients(model, image())
    model.merge_adapter()
    same(torch.cat([layer.base_layer.weight.flatten(1), layer.base_layer.bias[:, None]], 1), W)


def test_the_start_is_the_identity_and_the_clusters_follow_from_the_base() -> None:
    config = AdamssConfig(target_modules=["linear"], r=4, num_subspaces=3)
    found = []
    for seed in (0, 1):
        net = Net().double()
        torch.manual_seed(seed)
        model = get_peft_model(net, config)
        same(model(image()), Net().double()(image()))
        (method,) = model.get_base_model().linear.methods["default"]
        found.append(([rows.tolist() for rows in method.clusters], method.adamss_newB.clone()))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


def test_dynamic_ranks_count_squared_singular_values() -> None:
    rows = torch.diag(torch.tensor([1.0, 0.8, 0.6, 0.1]))
    for threshold, most, rank in ((0.5, 4, 2), (0.3, 4, 3), (0.3, 2, 2), (2.0, 4, 1)):
        config = AdamssConfig(use_dynamic_rank=True, svd_threshold=threshold, subspace_rank=most)
        assert rank_of(rows, config) == rank


def test_errors() -> None:
    for options, message in (
        ({"init_weights": "zero"}, "init_weights must be 'orthogonal' or None"),
        ({"use_asa": True, "mask_interval": 0}, "`mask_interval` must be a positive integer"),
        ({"use_asa": True, "asa_schedule_exponent": 0}, "`asa_schedule_exponent` must be a positive number"),
        ({"use_asa": True, "init_warmup": 9, "final_warmup": 5}, "`init_warmup` must be smaller"),
        ({"r": 0}, "`r` should be a positive integer"),
    ):
        with pytest.raises(ValueError, match=message):
            get_peft_model(Net(), AdamssConfig(target_modules=["linear"], **options))
    with pytest.raises(NotImplementedError, match="use_asa"):
        get_peft_model(Net(), AdamssConfig(target_modules=["linear"], use_asa=True))
