"""Combining adapters: every formula against plain loops, the exact sum, what the result is, and every error."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import trimtab
from tests.models import classifier, llama, tokens, toy
from trimtab.core.combining import TYPES, Recipe, agree, drop, split, split_product, total, trim

pytestmark = pytest.mark.filterwarnings("ignore:Adapter name")  # "a" is part of "lora_"
LAYERS = ["embed", "scaled", "up", "down", "head"]
WEIGHTS = {"a": 1.0, "b": -0.5, "c": 0.7}
PRUNING = [name for name in TYPES if name not in ("cat", "linear", "svd")]


def model(configs: dict[str, dict[str, Any]], base: Any = None) -> Any:
    """The toy (or `base`) with an adapter for each config, every tensor of them random."""
    torch.manual_seed(3)
    shared = {"r": 3, "lora_alpha": 6, "target_modules": LAYERS}
    made = {n: trimtab.LoraConfig(**{**shared, **c}) for n, c in configs.items()}
    (first, config), *more = made.items()
    adapted = trimtab.get_peft_model(toy() if base is None else base, config, first)
    for name, config in more:
        adapted.add_adapter(name, config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    return adapted.eval()


def three(**changes: Any) -> Any:
    """Three adapters of equal rank and different scale."""
    return model({"a": changes, "b": {"lora_alpha": 3, **changes}, "c": {"lora_alpha": 9, **changes}})


def combined(adapted: Any, kind: str, names: str = "abc", **more: Any) -> Any:
    """The model after the adapters `names` were combined as "new"."""
    if kind in PRUNING:
        more.setdefault("density", 0.6)
    adapted.add_weighted_adapter(list(names), [WEIGHTS[n] for n in names], "new", kind, **more)
    return adapted


def deltas(adapted: Any, name: str) -> dict[str, Tensor]:
    """{layer: s·B·A (out, in)} of an adapter."""
    layers = adapted.base_model.graft.layers
    return {path: layer.methods[name][0].delta().detach() for path, layer in layers.items() if name in layer.methods}


def pairs(adapted: Any, name: str) -> dict[str, tuple[Tensor, Tensor, float]]:
    """{layer: (A, B, scale)} of an adapter."""
    methods = {p: x.methods[name][0] for p, x in adapted.base_model.graft.layers.items() if name in x.methods}
    return {p: (m.factors[0].detach(), m.factors[1].detach(), m.scaling) for p, m in methods.items()}


def weighted(adapted: Any, names: str = "abc") -> dict[str, Tensor]:
    """{layer: Σ w·s·B·A}, of the adapters that are there."""
    out: dict[str, Tensor] = {}
    for name in names:
        for path, delta in deltas(adapted, name).items():
            out[path] = out.get(path, 0) + WEIGHTS[name] * delta
    return out


# ---------------------------------------------------------------------- task tensors, entry by entry
def loop_trim(task: Tensor, density: float) -> Tensor:
    flat = task.flatten().tolist()
    keep = sorted(range(len(flat)), key=lambda i: -abs(flat[i]))[: int(density * len(flat))]
    return torch.tensor([v if i in keep else 0.0 for i, v in enumerate(flat)]).view_as(task)


def loop_agree(tasks: list[Tensor], weights: list[float], sign: str) -> Tensor:
    out = []
    for values in zip(*[t.flatten().tolist() for t in tasks], strict=True):
        votes = [math.copysign(1, v) if v else 0 for v in values] if sign == "frequency" else values
        elected = 1 if sum(votes) >= 0 else -1
        kept = [w * v for w, v in zip(weights, values, strict=True) if v * elected > 0]
        out.append(sum(kept) / len(kept) if kept else 0.0)
    return torch.tensor(out).view_as(tasks[0])


@pytest.mark.parametrize("density", [0.01, 0.3, 0.6, 1.0])
def test_trim_keeps_the_largest(density: float) -> None:
    task = torch.randn(5, 7)
    assert torch.equal(trim(task, density), loop_trim(task, density))


@pytest.mark.parametrize("sign", ["total", "frequency"])
def test_agree_elects_and_averages(sign: str) -> None:
    tasks = [trim(torch.randn(6, 8), 0.5) for _ in range(4)]
    tasks[0][0], tasks[1][0] = 1.0, -1.0  # a tie
    weights = [1.0, -0.5, 0.7, 2.0]
    assert torch.allclose(agree(tasks, weights, sign), loop_agree(tasks, weights, sign), atol=1e-6)


def test_drop_keeps_the_mean() -> None:
    task = torch.randn(3, 4)
    draws = torch.stack([drop(task, 0.3) for _ in range(8000)])
    assert torch.all((draws == 0) | torch.isclose(draws, task / 0.3))
    assert abs((draws == 0).float().mean() - 0.7) < 0.01
    assert torch.allclose(draws.mean(0), task, atol=0.1)


def test_split_product_is_the_svd_of_the_product() -> None:
    A, B = torch.randn(4, 12), torch.randn(9, 4)
    for rank in (1, 2, 4):
        (a, b), (x, y) = split_product(A, B, rank), split(B @ A, rank)
        assert torch.allclose(b @ a, y @ x, atol=1e-4)
        assert a.shape == (rank, 12)
        assert b.shape == (9, rank)


def test_split_clamps_at_the_quantile() -> None:
    D = torch.randn(6, 8)
    (A, B), (a, b) = split(D, 3), split(D, 3, clamp=0.8)
    values = sorted([*A.flatten().tolist(), *B.flatten().tolist()])
    place = 0.8 * (len(values) - 1)
    low, high = values[math.floor(place)], values[math.ceil(place)]
    q = low + (place % 1) * (high - low)
    assert torch.allclose(a, A.clamp(-q, q), atol=1e-6)
    assert torch.allclose(b, B.clamp(-q, q), atol=1e-6)


# ---------------------------------------------------------------------- types
def test_cat_is_the_weighted_sum() -> None:
    adapted = combined(three(), "cat")
    wanted, found = weighted(adapted), deltas(adapted, "new")
    assert wanted.keys() == found.keys() == set(LAYERS)
    for path, delta in wanted.items():
        assert torch.allclose(found[path], delta, atol=1e-4), path
    assert adapted.peft_config["new"].r == 9


def test_cat_by_forward() -> None:
    """At one layer, the outputs' changes add up exactly as the deltas do, with negative weights, ranks and biases."""
    configs = [("a", 2, True), ("b", 3, False), ("c", 5, True)]
    adapted = model({n: {"r": r, "lora_bias": b, "target_modules": ["head"]} for n, r, b in configs})
    combined(adapted, "cat")
    ids = tokens()
    with adapted.disable_adapter():
        base = adapted(ids)
    change = {}
    for name in ("a", "b", "c", "new"):
        adapted.set_adapter(name)
        change[name] = adapted(ids) - base
    assert torch.allclose(change["new"], sum(w * change[n] for n, w in WEIGHTS.items()), atol=1e-4)
    assert adapted.peft_config["new"].lora_bias


@pytest.mark.parametrize("rank", [None, 1, 2, 5, 40])
def test_svd_is_the_best_approximation(rank: int | None) -> None:
    adapted = model({"a": {}, "b": {"r": 2}, "c": {"r": 1}})
    combined(adapted, "svd", svd_rank=rank)
    found = deltas(adapted, "new")
    for path, D in weighted(adapted).items():
        U, S, Vh = torch.linalg.svd(D)
        r = min(rank or 3, len(S))
        assert torch.allclose(found[path], U[:, :r] * S[:r] @ Vh[:r], atol=1e-4), path
        assert len(pairs(adapted, "new")[path][0]) == r


def test_svd_of_exact_rank_is_the_weighted_sum() -> None:
    adapted = combined(model({"a": {"r": 2}, "b": {"r": 1}}), "svd", "ab", svd_rank=3)
    found = deltas(adapted, "new")
    for path, delta in weighted(adapted, "ab").items():
        assert torch.allclose(found[path], delta, atol=1e-4), path


def test_linear_merges_the_factors() -> None:
    adapted = combined(three(), "linear")
    found = pairs(adapted, "new")
    old = {n: pairs(adapted, n) for n in WEIGHTS}
    for path, (A, B, scale) in found.items():
        a, b = torch.zeros_like(A), torch.zeros_like(B)
        for name, w in WEIGHTS.items():
            Ai, Bi, s = old[name][path]
            a += math.copysign(math.sqrt(abs(w * s)), w) * Ai
            b += math.sqrt(abs(w * s)) * Bi
        assert scale == 1
        assert torch.allclose(A, a, atol=1e-5)
        assert torch.allclose(B, b, atol=1e-5)


def test_one_adapter_by_linear_is_itself_times_its_weight() -> None:
    for weight in (2.0, -0.5):
        adapted = three()
        adapted.add_weighted_adapter(["b"], [weight], "new", "linear")
        old, new = deltas(adapted, "b"), deltas(adapted, "new")
        for path, delta in old.items():
            assert torch.allclose(new[path], weight * delta, atol=1e-5)


@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("kind", ["ties", "magnitude_prune"])
@pytest.mark.parametrize("form", ["factors", "delta"])
def test_pruning_types(kind: str, form: str, sign: str) -> None:
    """TIES and magnitude pruning by loops, on the factors and (rank high enough to be exact) on the deltas."""

    def loop(tasks: list[Tensor], weights: list[float]) -> Tensor:
        trimmed = [loop_trim(t, 0.6) for t in tasks]
        if kind == "ties":
            return loop_agree(trimmed, weights, sign)
        return sum(w * t for w, t in zip(weights, trimmed, strict=True))

    more = {"svd_rank": 20} if form == "delta" else {}
    adapted = combined(three(), f"{kind}_svd" if more else kind, majority_sign_method=sign, **more)
    found = deltas(adapted, "new")
    old = {n: pairs(adapted, n) for n in WEIGHTS}
    for path in LAYERS:
        As, Bs, scales = zip(*[old[n][path] for n in WEIGHTS], strict=True)
        ws = list(WEIGHTS.values())
        if form == "delta":
            wanted = loop([s * B @ A for A, B, s in zip(As, Bs, scales, strict=True)], ws)
        else:
            roots = [math.sqrt(abs(w * s)) for w, s in zip(ws, scales, strict=True)]
            signed = [math.copysign(d, w) for d, w in zip(roots, ws, strict=True)]
            wanted = loop(list(Bs), roots) @ loop(list(As), signed)
        assert torch.allclose(found[path], wanted, atol=2e-4), path


@pytest.mark.parametrize("kind", ["dare_linear", "dare_linear_svd"])
def test_dare_has_the_mean_of_the_linear_merge(kind: str) -> None:
    """Single draws differ; over many, A (or the delta) has the mean of the merge without dropping."""
    svd = kind.endswith("svd")
    adapted = model({"a": {"target_modules": ["up"]}, "b": {"target_modules": ["up"]}})

    def result(name: str, **more: Any) -> Tensor:
        adapted.add_weighted_adapter(["a", "b"], [1.0, -0.5], "new", name, **more)
        value = (deltas(adapted, "new") if svd else {p: A for p, (A, _, _) in pairs(adapted, "new").items()})["up"]
        adapted.delete_adapter("new")
        return value.clone()

    draws = torch.stack([result(kind, density=0.7, **({"svd_rank": 6} if svd else {})) for _ in range(500)])
    wanted = result("svd", svd_rank=6) if svd else result("linear")
    assert draws.std(0).max() > 0.1
    assert ((draws.mean(0) - wanted).abs() < 5 * draws.std(0) / 500**0.5 + 1e-4).all()


@pytest.mark.parametrize("kind", [n for n in TYPES if n.startswith(("dare", "ties", "magnitude"))])
def test_density_one_prunes_nothing(kind: str) -> None:
    form, merge = TYPES[kind]
    adapted = combined(three(), kind, density=1.0)
    if "ties" not in merge:
        plain = combined(three(), "svd" if form == "delta" else "linear")
        for path, delta in deltas(plain, "new").items():
            assert torch.allclose(deltas(adapted, "new")[path], delta, atol=1e-4)
    else:
        other = combined(three(), "ties" + "_svd" * (form == "delta"), density=1.0)
        for path, delta in deltas(other, "new").items():
            assert torch.allclose(deltas(adapted, "new")[path], delta, atol=1e-5)


# ---------------------------------------------------------------------- what the result is
@pytest.mark.parametrize("kind", TYPES)
def test_result_is_inactive_and_frozen_and_the_others_untouched(kind: str) -> None:
    adapted = three()
    ids = tokens()
    before, state = adapted(ids), {n: p.detach().clone() for n, p in adapted.named_parameters()}
    trains = {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert combined(adapted, kind).active_adapters == ["a"]
    assert {n for n, p in adapted.named_parameters() if p.requires_grad} == trains
    assert all(torch.equal(p, state[n]) for n, p in adapted.named_parameters() if n in state)
    assert torch.equal(adapted(ids), before)
    adapted.set_adapter("new")
    assert not torch.equal(adapted(ids), before)
    config = adapted.peft_config["new"]
    assert config.r == config.lora_alpha == (9 if kind == "cat" else 3)
    assert config.target_modules == set(LAYERS)
    assert not config.rank_pattern


@pytest.mark.parametrize("kind", ["cat", "svd", "linear", "ties", "ties_svd"])
def test_patterns_and_rslora(kind: str) -> None:
    """Ranks and scales layer by layer: the result is the formula of the deltas or factors, with scale 1 everywhere."""
    pattern = {"rank_pattern": {"up": 4}, "alpha_pattern": {"head": 5}}
    adapted = model({"a": {**pattern, "use_rslora": True}, "b": {"rank_pattern": {"up": 4}}})
    combined(adapted, kind, "ab")
    new = pairs(adapted, "new")
    assert {scale for _, _, scale in new.values()} == {1.0}
    ranks = {path: len(A) for path, (A, _, _) in new.items()}
    assert ranks["up"] == (8 if kind == "cat" else 4)
    assert ranks["head"] == {"cat": 6, "svd": 4, "ties_svd": 4}.get(kind, 3)
    if kind == "cat":
        for path, delta in weighted(adapted, "ab").items():
            assert torch.allclose(deltas(adapted, "new")[path], delta, atol=1e-4)


def test_targets_are_united() -> None:
    adapted = combined(
        model({"a": {"target_modules": ["up"]}, "b": {"target_modules": ["head", "embed"]}}), "cat", "ab"
    )
    config = adapted.peft_config["new"]
    assert config.target_modules == {"up", "head", "embed"}
    assert config.r == 3
    for path, delta in weighted(adapted, "ab").items():
        assert torch.allclose(deltas(adapted, "new")[path], delta, atol=1e-5)


def test_target_expressions_are_united() -> None:
    adapted = combined(model({"a": {"target_modules": "up"}, "b": {"target_modules": "head|embed"}}), "cat", "ab")
    assert adapted.peft_config["new"].target_modules == "(up)|(head|embed)"
    assert deltas(adapted, "new").keys() == {"up", "head", "embed"}


def test_filters_that_differ_become_names() -> None:
    adapted = combined(model({"a": {"exclude_modules": ["up"]}, "b": {"exclude_modules": ["head"]}}), "cat", "ab")
    assert deltas(adapted, "new").keys() == set(LAYERS)
    by_layer = [{"target_modules": ["q_proj"], "layers_to_transform": i} for i in (0, 1)]
    adapted = combined(model(dict(zip("ab", by_layer, strict=True)), llama()), "svd", "ab")
    assert len(deltas(adapted, "new")) == 2


def test_modules_trained_whole_by_one_adapter_are_copied() -> None:
    adapted = model({"a": {"target_modules": ["up"]}, "b": {"target_modules": ["up"], "modules_to_save": ["head"]}})
    copies = adapted.base_model.graft.saved["head"].modules_to_save
    torch.nn.init.normal_(copies["b"].weight)
    combined(adapted, "svd", "ab")
    assert adapted.peft_config["new"].modules_to_save == ["head"]
    assert torch.equal(copies["new"].weight, copies["b"].weight)
    assert copies["new"].weight is not copies["b"].weight


def test_saved_and_loaded(tmp_path: Path) -> None:
    """The config that is written says what the result is, layer by layer."""
    adapted = model(
        {"a": {"rank_pattern": {"up": 4}, "use_rslora": True}, "b": {"r": 2, "target_modules": ["up", "head"]}}
    )
    combined(adapted, "cat", "ab").set_adapter("new")
    adapted.save_pretrained(tmp_path, selected_adapters=["new"])
    again = trimtab.PeftModel.from_pretrained(toy(), tmp_path / "new")
    assert torch.equal(again(tokens()), adapted(tokens()))


def test_base_changing_start_is_not_repeated() -> None:
    """The config of an adapter that was converted still names its start: the copy must not run it."""
    adapted = model({"a": {}, "b": {}})
    adapted.peft_config["a"].init_lora_weights = "pissa"
    before = {n: p.clone() for n, p in adapted.get_base_model().named_parameters() if "base_layer" in n}
    assert combined(adapted, "cat", "ab").peft_config["new"].init_lora_weights is True
    assert all(torch.equal(p, before[n]) for n, p in adapted.get_base_model().named_parameters() if n in before)


def test_scale_set_by_hand_counts_and_names_may_repeat() -> None:
    adapted = three()
    adapted.base_model.graft.layers["up"].set_scale("a", 3.0)
    adapted.add_weighted_adapter(["a", "a"], [1.0, 0.5], "new", "cat")
    for path, delta in deltas(adapted, "a").items():
        assert torch.allclose(deltas(adapted, "new")[path], 1.5 * delta, atol=1e-4)


@pytest.mark.parametrize("kind", ["cat", "svd", "ties", "dare_linear_svd"])
def test_half_precision(kind: str) -> None:
    """Adapters kept in bfloat16 are combined in fp32, which is also what the result is kept in."""
    adapted = model({"a": {}, "b": {}}, toy(torch.bfloat16))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    combined(adapted, kind, "ab")
    assert {A.dtype for A, _, _ in pairs(adapted, "new").values()} == {torch.float32}
    if kind == "cat":
        for path, delta in weighted(adapted, "ab").items():
            assert torch.allclose(deltas(adapted, "new")[path], delta, atol=1e-4)


@pytest.mark.usefixtures("parked")
def test_combined_while_merged_and_while_parked() -> None:
    adapted = three()
    wanted = weighted(adapted)
    adapted.merge_adapter(["a"])
    combined(adapted, "cat")
    adapted.unmerge_adapter()
    for path, delta in wanted.items():
        assert torch.allclose(deltas(adapted, "new")[path], delta, atol=1e-4)
    for i in range(12):
        adapted.add_adapter(f"more{i}", trimtab.LoraConfig(target_modules=["up"]))
    adapted.add_weighted_adapter(["b", "new"], [1.0, -1.0], "last", "cat")
    assert torch.allclose(deltas(adapted, "last")["up"], deltas(adapted, "b")["up"] - wanted["up"], atol=1e-4)


# ---------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"adapters": ["a", "x"]}, "x does not exist"),
        ({"adapter_name": "b"}, "'b' already exists"),
        ({"weights": [1.0]}, "one weight, but there are 2 and 1"),
        ({"adapters": [], "weights": []}, "there are 0 and 0"),
        ({"combination_type": "mean"}, "Invalid combination_type: mean. Known: cat, svd"),
        ({"svd_rank": 0}, "svd_rank"),
        *[
            ({"combination_type": t, "density": d}, "needs a `density`")
            for t, d in itertools.product(PRUNING, (None, 0, 1.2))
        ],
        (
            {"combination_type": "ties", "density": 0.5, "majority_sign_method": "loud"},
            "'total' or 'frequency', not 'loud'",
        ),
    ],
)
def test_arguments_that_cannot_work(arguments: dict[str, Any], message: str) -> None:
    adapted = three()
    call = {"adapters": ["a", "b"], "weights": [1.0, 1.0], "adapter_name": "new"} | arguments
    with pytest.raises(ValueError, match=message):
        adapted.add_weighted_adapter(**call)
    assert set(adapted.peft_config) == {"a", "b", "c"}


@pytest.mark.parametrize("kind", [n for n, (form, _) in TYPES.items() if form == "factors"])
def test_unequal_ranks(kind: str) -> None:
    adapted = model({"a": {}, "b": {"rank_pattern": {"up": 2}}})
    with pytest.raises(ValueError, match=r"same r value .* up \[3, 2\]: use 'cat'"):
        combined(adapted, kind, "ab")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, "'b' is made of Dora: here only deltas add up, so use 'svd'"),
        ({"bias": "lora_only"}, "'b' trains the base's biases"),
        ({"init_lora_weights": "pissa", "target_modules": ["up"]}, "'b' changed the base's weights"),
        ({"trainable_token_indices": {"embed": [1]}, "target_modules": ["up"]}, "'b' is made of .*TrainableTokens"),
        ({"target_modules": "up"}, "same target modules type"),
        ({"target_modules": [], "target_parameters": ["head.weight"]}, "'b' adapts parameters by name"),
    ],
)
def test_adapters_that_cannot_be_combined(fields: dict[str, Any], message: str) -> None:
    adapted = model({"a": {"target_modules": ["up"]}, "b": fields})
    with pytest.raises(ValueError, match=message):
        combined(adapted, "cat", "ab")


def test_modules_trained_whole_by_several() -> None:
    both = {"target_modules": ["q_proj"], "task_type": "SEQ_CLS"}
    adapted = model({"a": both, "b": both}, classifier())
    with pytest.raises(ValueError, match=r"same module with modules_to_save, but found 1 .*\['score'\]"):
        combined(adapted, "cat", "ab")


def test_all_faults_at_once() -> None:
    adapted = model({"a": {"use_dora": True}, "b": {"bias": "lora_only"}})
    with pytest.raises(ValueError, match=r"(?s)Dora.*biases"):
        combined(adapted, "cat", "ab")


def test_table_of_types() -> None:
    """Every type of PEFT's, and each recipe can be made."""
    assert len(TYPES) == 11
    for name in TYPES:
        assert Recipe(name, density=0.5).form in ("stack", "factors", "delta")
    assert total([torch.ones(2)], [3.0]).tolist() == [3, 3]
