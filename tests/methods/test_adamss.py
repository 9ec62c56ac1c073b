"""AdaMSS against clusters' updates in plain loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.methods.nets import Net, adapted, check_gradients, image, merging_changes_nothing, numbers, same
from tests.methods.test_oft import times
from trimtab import AdamssConfig, PeftModel, get_peft_model
from trimtab.methods.adamss import SCHEDULE, rank_of


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


ASA = {"use_asa": True, "asa_target_subspaces": 2, "init_warmup": 2, "final_warmup": 8, "mask_interval": 3}


def asa() -> Any:
    torch.manual_seed(3)
    config = AdamssConfig(target_modules=["linear", "point"], r=4, num_subspaces=3, subspace_rank=2, **ASA)
    return get_peft_model(Net().double(), config)


def left(model: Any) -> list[str]:
    return [n for n, p in model.named_parameters() if p.requires_grad and "adamss_A" in n]


def test_a_schedule_that_does_not_act_may_be_none() -> None:
    none = dict.fromkeys(SCHEDULE)
    assert AdamssConfig(**none).to_dict().items() >= none.items()
    adapted(AdamssConfig(target_modules=["linear"], r=4, num_subspaces=2, **none))
    for name in SCHEDULE:
        with pytest.raises(ValueError, match=f"needs numbers for its schedule, and {name} are None"):
            AdamssConfig(use_asa=True, **{name: None})


def test_clusters_of_least_importance_are_frozen() -> None:
    model = asa()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    held = dict(model.named_parameters())
    alive = set(left(model))
    assert len(alive) == 6
    I, U = ({n: torch.zeros_like(p) for n, p in held.items() if ".adamss_" in n} for _ in range(2))
    for t in range(1, 11):
        optimizer.zero_grad()
        model(image().double()).square().mean().backward()
        before = {n: p.detach().clone() for n, p in held.items()}
        grads = {n: p.grad.clone() for n, p in held.items() if p.grad is not None}
        optimizer.step()
        for name in held:
            moved = name in alive or name.replace("adamss_B", "adamss_A") in alive
            assert moved or torch.equal(held[name], before[name])
        if not 2 < t <= 8:
            continue
        scores = {}
        for name in alive:
            scores[name] = 0.0
            for key in (name, name.replace("adamss_A", "adamss_B")):
                now = (held[key].detach() * grads[key]).abs()
                U[key] = 0.85 * U[key] + 0.15 * (now - I[key]).abs()
                I[key] = 0.85 * I[key] + 0.15 * now
                scores[name] += float((I[key] * U[key]).mean())
        if t in (3, 6, 8):
            count = int(2 + 4 * ((8 - t) / 6) ** 3)
            alive = set(sorted(scores, key=scores.get)[-count:])  # type: ignore[arg-type]
            assert set(left(model)) == alive
            I, U = ({n: torch.zeros_like(p) for n, p in held.items() if ".adamss_" in n} for _ in range(2))
    assert len(left(model)) == 2
    assert model.get_nb_trainable_parameters()[0] == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_training_goes_on_with_the_clusters_that_are_left(tmp_path: Any) -> None:
    model = asa()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(4):
        optimizer.zero_grad()
        model(image().double()).square().mean().backward()
        optimizer.step()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Net().double(), tmp_path, is_trainable=True)
    optimizer = torch.optim.SGD([p for p in loaded.parameters() if p.requires_grad], lr=0.05)
    loaded(image().double()).square().mean().backward()
    optimizer.step()
    assert left(loaded) == left(model)
    assert len(left(model)) == 4
