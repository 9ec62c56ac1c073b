"""What every method promises at every kind of layer in every number format. Rows: tests/contract/cases.py."""

from __future__ import annotations

import copy
import io
import pickle
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.contract.cases import (
    BY_NAME,
    CASES,
    DTYPES,
    FORMULAS,
    MERGEABLE,
    Case,
    adapted,
    also,
    close,
    differs,
    ids,
    layer_of,
    missing,
    move,
    pairs,
    tensors,
)
from tests.models import SITES, assert_untouched, snapshot, toy
from trimtab import PeftModel, get_peft_model
from trimtab.errors import ReadOnlyWeight
from trimtab.layer.spelling import weighed
from trimtab.methods import chooses
from trimtab.methods.lora import VARIANTS

everywhere = pytest.mark.parametrize(("case", "site"), pairs())
weights_everywhere = pytest.mark.parametrize(("case", "site"), pairs(MERGEABLE))
WEIGHTS = [case for case in FORMULAS if case in MERGEABLE]
formulas_everywhere = pytest.mark.parametrize(("case", "site"), pairs(WEIGHTS))
# `make test` takes the columns that differ in kind; what repeats one goes to `make test-all`.
OFTEN = {"fp32", "bf16"}
SECONDS = {"lora", "dora", "ia3", "loha", "oft", "tokens"}  # one of each family as the second of two
formats = pytest.mark.parametrize(
    "dtype", [pytest.param(d, id=n, marks=() if n in OFTEN else pytest.mark.slow) for n, d in DTYPES.items()]
)


def partner(case: Case, site: str, wanted: Case) -> Case:
    """The case wanted for a second adapter, or where it does not go with that layer, the first one again."""
    return wanted if site in wanted.names else case


@cache
def base_output(dtype: torch.dtype = torch.float32) -> Tensor:
    return toy(dtype)(ids()).detach()


def test_every_method_has_a_row() -> None:
    assert not missing(), f"add a row for each to {Case.__module__}"
    for field in VARIANTS.keys() - {"arrow_config"}:  # which acts through other adapters alone
        assert any(chooses(field, case.options) for case in CASES), f"no row sets `{field}`"


# ---------------------------------------------------------------------- start
@everywhere
@formats
def test_identity_at_start(case: Case, site: str, dtype: torch.dtype) -> None:
    expected = base_output(dtype)
    out = adapted(case, site, dtype=dtype, moved=False)(ids())
    if case.identity:
        close(out, expected, dtype)
    else:
        assert differs(out, expected)


@everywhere
def test_moving_it_changes_the_output(case: Case, site: str) -> None:
    """Without this, every equality below could hold for a method that does nothing."""
    model = adapted(case, site)
    assert differs(model(ids()), base_output())


# ---------------------------------------------------------------------- merging
@weights_everywhere
@formats
def test_forward_equals_merged(case: Case, site: str, dtype: torch.dtype) -> None:
    model = adapted(case, site, dtype=dtype)
    expected = model(ids())
    assert expected.dtype == dtype
    model.merge_adapter()
    close(model(ids()), expected, dtype)


@weights_everywhere
@formats
def test_unmerge_and_disable_are_bit_exact(case: Case, site: str, dtype: torch.dtype) -> None:
    base, bits = base_output(dtype), toy(dtype).state_dict()
    model = adapted(case, site, dtype=dtype)
    layer, before = layer_of(model, site), model(ids())
    parameters = dict(layer.base_layer._parameters)
    with model.disable_adapter():
        assert torch.equal(model(ids()), base)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(ids()), base), "disabled while merged"
    model.unmerge_adapter()
    assert dict(layer.base_layer._parameters) == parameters, "the very objects come back"
    if not case.mutates:
        for name, parameter in layer.base_layer._parameters.items():
            assert parameter is None or torch.equal(parameter, bits[f"{site}.{name}"])
    assert torch.equal(model(ids()), before)


@weights_everywhere
def test_safe_merge_refuses_what_is_not_finite_and_changes_nothing(case: Case, site: str) -> None:
    model = adapted(case, site)
    expected = model(ids())
    model.merge_adapter(safe_merge=True)
    model.unmerge_adapter()
    assert torch.equal(model(ids()), expected)
    here = f"base_model.model.{site}."  # or, where it has none of its own, a tensor that all layers share
    name, tensor = min(tensors(model).items(), key=lambda item: not item[0].startswith(here))
    kept = tensor.detach().clone()
    tensor.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert not layer_of(model, site).merged, name
    tensor.data.copy_(kept)
    assert torch.equal(model(ids()), expected)


@weights_everywhere
def test_delta_weight_is_what_merging_adds(case: Case, site: str) -> None:
    model = adapted(case, site)
    layer = layer_of(model, site)
    before = layer.base_layer.weight.detach().clone()
    delta = layer.get_delta_weight("default")
    model.merge_adapter()
    close(layer.base_layer.weight, before + delta, torch.float32)


@formulas_everywhere
@pytest.mark.parametrize(
    "second", [pytest.param(c, id=c.name, marks=() if c.name in SECONDS else pytest.mark.slow) for c in WEIGHTS]
)
def test_two_stacked_equal_merged_in_that_order(case: Case, site: str, second: Case) -> None:
    dtype = torch.float64
    model = adapted(case, site, dtype=dtype)
    also(model, "second", partner(case, site, second), site)
    for order in (["default", "second"], ["second", "default"]):
        model.set_adapter(order)
        model.eval()
        stacked = model(ids())
        model.merge_adapter(order)
        close(model(ids()), stacked, dtype)
        model.unmerge_adapter()
        model.merge_adapter(order[:1])  # the first merged, the second on top of it
        close(model(ids()), stacked, dtype)
        model.unmerge_adapter()
        assert torch.equal(model(ids()), stacked)


@pytest.mark.parametrize(("case", "site"), pairs([c for c in CASES if c not in MERGEABLE]))
def test_what_is_no_weight_refuses_to_merge_and_changes_nothing(case: Case, site: str) -> None:
    model = adapted(case, site)
    expected = model(ids())
    for attempt in (
        model.merge_adapter,
        model.merge_and_unload,
        lambda: layer_of(model, site).get_delta_weight("default"),
    ):
        with pytest.raises(ReadOnlyWeight, match=case.method.__name__):
            attempt()
        assert torch.equal(model(ids()), expected)
    with model.disable_adapter():
        assert torch.equal(model(ids()), base_output())


# ---------------------------------------------------------------------- the two spellings
@pytest.mark.parametrize(("case", "site"), pairs([c for c in MERGEABLE if c.method.fused], fused=True))
@formats
def test_fused_spelling_equals_weight_spelling(case: Case, site: str, dtype: torch.dtype) -> None:
    model = adapted(case, site, dtype=dtype)
    layer, seen = layer_of(model, site), []
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    model(ids())
    (x,) = seen
    stack = layer.stack(["default"])
    results = []
    for spelling in (lambda v: layer(v), lambda v: weighed(stack, (v,), {})):
        model.zero_grad()
        v = x.clone().requires_grad_(x.is_floating_point())
        y = spelling(v)
        weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))  # not y²: rotations do not change it
        (y.float() * weight).sum().backward()
        results.append((y, v.grad, {n: t.grad for n, t in tensors(model).items() if t.grad is not None}))
    (y1, x1, g1), (y2, x2, g2) = results
    close(y1, y2, dtype)
    if x1 is not None:
        close(x1, x2, dtype)
    assert g1
    for name, gradient in g1.items():
        close(gradient, g2[name], torch.float32 if dtype == torch.float64 else dtype)


# ---------------------------------------------------------------------- mixed batches
def slope(parameter: Tensor) -> Tensor:
    """A copy of the gradient: zeros for what has no part in an evaluation."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()


@everywhere
def test_mixed_rows_equal_each_alone(case: Case, site: str) -> None:
    model = adapted(case, site)
    also(model, "second", partner(case, site, BY_NAME["lora" if case.mutates else "dora"]), site)
    x, names = ids(), ["second", "default", "__base__", "default"]
    base = base_output()
    mixed = model(x, adapter_names=names)
    weight = torch.randn(mixed.shape, generator=torch.Generator().manual_seed(3))
    model.set_requires_grad(["default", "second"], True)
    (model(x, adapter_names=names) * weight).sum().backward()
    together = {n: slope(p) for a in ("default", "second") for n, p in tensors(model, a).items()}
    for name in ("default", "second"):
        rows = [i for i, n in enumerate(names) if n == name]
        model.set_adapter(name)
        model.zero_grad()
        alone = model(x[rows])
        close(mixed[rows], alone, torch.float32)
        (alone * weight[rows]).sum().backward()
        for key, parameter in tensors(model, name).items():
            close(together[key], slope(parameter), torch.float32)
    close(mixed[[2]], base[[2]], torch.float32)


# ---------------------------------------------------------------------- files
@everywhere
@formats
def test_save_and_load_give_the_same(case: Case, site: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = adapted(case, site, dtype=dtype)
    model.save_pretrained(tmp_path)
    torch.manual_seed(99)  # nothing that is loaded may depend on chance
    loaded = PeftModel.from_pretrained(toy(dtype), tmp_path)
    with torch.no_grad():  # with gradients a product may be formed the other way round, which rounds otherwise
        expected = model(ids())
        assert torch.equal(loaded(ids()), expected)
    assert tensors(loaded).keys() == tensors(model).keys()
    assert not any(p.requires_grad for p in loaded.parameters())
    beside = adapted(BY_NAME["lora"], "up", dtype=dtype)
    if not (case.mutates and site == "up"):
        beside.load_adapter(tmp_path, "again")
        beside.set_adapter("again")
        with torch.no_grad():
            assert torch.equal(beside(ids()), expected)


# ---------------------------------------------------------------------- training
@everywhere
@formats
def test_gradients_reach_the_adapter_only(case: Case, site: str, dtype: torch.dtype) -> None:
    model = adapted(case, site, dtype=dtype).train()
    model(ids()).float().square().sum().backward()
    trained = tensors(model)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name in trained), name
        assert (parameter.grad is not None) == (name in trained), name
    for name, parameter in trained.items():
        assert parameter.grad.abs().max() > 0, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize(("case", "site"), pairs([c for c in CASES if c.options.get("lora_dropout")]))
def test_dropout_acts_in_training_only(case: Case, site: str) -> None:
    model = adapted(case, site)
    plain = model(ids())
    assert torch.equal(model(ids()), plain)
    none = adapted(case, site, lora_dropout=0.0)
    assert torch.equal(none(ids()), plain)
    model.train()
    torch.manual_seed(1)
    first = model(ids())
    torch.manual_seed(1)
    assert torch.equal(model(ids()), first), "the same seed, the same mask"
    if site in ("embed", "scaled"):  # indices are not dropped
        assert torch.equal(first, plain)
    else:
        assert differs(first, plain)
        assert differs(model(ids()), first)
        with model.disable_adapter():
            assert torch.equal(model(ids()), base_output())


@everywhere
def test_a_few_steps_lower_the_loss(case: Case, site: str) -> None:
    model = adapted(case, site, moved=False)
    goal = torch.randn(model(ids()).shape, generator=torch.Generator().manual_seed(5))
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(8):
        loss = (model(ids()) - goal).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 1e-3


# ---------------------------------------------------------------------- coming and going
@everywhere
def test_unload_gives_back_the_very_model(case: Case, site: str) -> None:
    base = toy()
    expected, before = base(ids()), snapshot(base)
    model = get_peft_model(base, case.config(site))
    move(model, "default")
    also(model, "second", BY_NAME["lora"], "up", "head")
    if not case.mutates:
        model.set_adapter(["default", "second"])
    model.train()
    model(ids()).sum().backward()
    model.eval()
    if case.method.mergeable:
        model.merge_adapter()
    after = model.unload(pristine=True)
    assert after is base
    assert_untouched(base, before)
    assert not any(p.requires_grad for p in base.parameters())
    assert torch.equal(base(ids()), expected)


@weights_everywhere
@formats
def test_merge_and_unload_leaves_the_plain_model_with_other_weights(case: Case, site: str, dtype: torch.dtype) -> None:
    base = toy(dtype)
    before = snapshot(base)
    model = get_peft_model(base, case.config(site)).eval()
    move(model, "default")
    expected = model(ids())
    after = model.merge_and_unload()
    assert after is base
    assert snapshot(base)["modules"] == before["modules"]
    assert snapshot(base)["attributes"] == before["attributes"]
    assert {n for n, _ in base.named_parameters()} - {f"{site}.bias"} == {*before["parameters"]} - {f"{site}.bias"}
    close(base(ids()), expected, dtype)


@everywhere
def test_delete_leaves_the_others(case: Case, site: str) -> None:
    model = adapted(BY_NAME["lora"], "up", "head")
    expected = model(ids())
    names = [n for n, _ in model.named_parameters()]
    if not (case.mutates and site == "up"):
        also(model, "second", case, site)
        model.set_adapter("second")
        assert differs(model(ids()), expected)
        model.delete_adapter("second")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(model(ids()), expected)
    assert {n.replace("base_layer.", "") for n, _ in model.named_parameters()} == {
        n.replace("base_layer.", "") for n in names
    }


# ---------------------------------------------------------------------- copies
def pickled(model: PeftModel) -> PeftModel:
    return pickle.loads(pickle.dumps(model))


def torch_saved(model: PeftModel) -> PeftModel:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@everywhere
def test_trains_under_autocast(case: Case, site: str) -> None:
    """On a base in fp32, the backward pass outside of the block, as training loops have it."""
    model = adapted(case, site).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids()).float().square().mean()
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    assert found
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32, name
        assert torch.isfinite(gradient).all(), name


@everywhere
def test_what_a_layer_gives_may_be_written_into(case: Case, site: str) -> None:
    """As models do: `out.add_(...)` on a layer's output, on the way to a gradient."""
    found = []
    for write in (lambda module, args, y: y.mul_(2), lambda module, args, y: y * 2):
        model = adapted(case, site).train()
        layer_of(model, site).register_forward_hook(write)
        torch.manual_seed(0)
        out = model(ids())
        out.square().sum().backward()
        found.append([out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@everywhere
@pytest.mark.parametrize(
    "duplicate",
    [
        pytest.param(copy.deepcopy, id="deepcopy"),
        pytest.param(pickled, id="pickle", marks=pytest.mark.slow),
        pytest.param(torch_saved, id="torch.save", marks=pytest.mark.slow),
    ],
)
def test_copies_are_whole_and_apart(case: Case, site: str, duplicate: Any) -> None:
    model = adapted(case, site)
    expected = model(ids())
    twin = duplicate(model)
    assert type(twin) is type(model)
    assert torch.equal(twin(ids()), expected)
    move(twin, "default")
    assert differs(twin(ids()), expected)
    assert torch.equal(model(ids()), expected)
    with twin.disable_adapter():
        assert torch.equal(twin(ids()), base_output())
        assert torch.equal(model(ids()), expected), "the copy has a route of its own"
    also(twin, "second", BY_NAME["lora"], "head")
    assert list(model.peft_config) == ["default"]
    if case.method.mergeable:
        twin.merge_adapter()
    base = twin.unload(pristine=True)
    assert torch.equal(base(ids()), base_output())
    assert {n for n, _ in base.named_modules()} == {n for n, _ in toy().named_modules()}
    assert torch.equal(model(ids()), expected)


# ---------------------------------------------------------------------- compiled
FOLLOWED = ["lora", "dora", "loha", "oft", "ia3", "bitfit"]  # one of each way to compute; the others: test-all
COMPILED = [*FORMULAS, BY_NAME["lora-pissa"]]
SWITCHED = [pytest.param(c, id=c.name, marks=[] if c.name in FOLLOWED else pytest.mark.slow) for c in COMPILED]


@pytest.mark.parametrize("case", COMPILED, ids=lambda c: c.name)
def test_compiles_in_one_graph(case: Case) -> None:
    torch._dynamo.reset()
    model = adapted(case).eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        close(compiled(ids()), model(ids()), torch.float32)


@pytest.mark.parametrize("case", SWITCHED)
def test_compiled_models_follow_what_is_switched_and_merged(case: Case) -> None:
    torch._dynamo.reset()
    model = adapted(case)
    also(model, "second", BY_NAME["lora"], "up", "head")
    base = base_output()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        for name in ("default", "second", "default"):
            model.set_adapter(name)
            model.eval()
            close(compiled(ids()), model(ids()), torch.float32)
        with model.disable_adapter():
            assert torch.equal(compiled(ids()), base)
        close(compiled(ids()), model(ids()), torch.float32)
        if not case.method.mergeable:
            return
        model.merge_adapter()
        close(compiled(ids()), model(ids()), torch.float32)
        with model.disable_adapter():
            assert torch.equal(compiled(ids()), base), "disabled while merged"


def test_compiles_for_training_with_inductor() -> None:
    torch._dynamo.reset()
    model = adapted(BY_NAME["lora"]).train()
    compiled = torch.compile(model, fullgraph=True)
    results = []
    for run in (model, compiled):
        model.zero_grad()
        out = run(ids())
        out.square().sum().backward()
        results.append((out, {n: p.grad.clone() for n, p in tensors(model).items()}))
    close(results[1][0], results[0][0], torch.float32)
    for name, gradient in results[0][1].items():
        close(results[1][1][name], gradient, torch.float32)


@pytest.mark.parametrize("case", [c for c in CASES if any(SITES[n] == "linear" for n in c.names)], ids=lambda c: c.name)
def test_a_forward_reads_the_frozen_weight_only_where_the_class_says_so(case: Case) -> None:
    """Which tells whether a quantised base is dequantised in every step for the sake of the adapter."""
    name = next(n for n in case.names if SITES[n] == "linear")
    model = adapted(case, name).train()
    model(ids())
    asked = []
    methods = [m for layer in model.modules() for m in getattr(layer, "methods", {}).get("default", ())]
    for site in {id(m.site): m.site for m in methods if m.site.kind == "linear"}.values():
        matrix = site.matrix
        site.matrix = lambda site=site, matrix=matrix: (asked.append(site.name), matrix())[1]
    model(ids())
    fused = all("linear" in m.fused for m in methods if m.site.kind == "linear")
    assert bool(asked) == (any(m.reads for m in methods) or not fused)
