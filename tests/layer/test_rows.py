"""Mixed batches by row: many adapters at once, several of them in one row, each with its scale."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.contract.cases import move
from tests.models import llama, tokens
from trimtab import AdaLoraConfig, IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from trimtab.errors import AdapterNameError, ArgumentError, RouteError
from trimtab.layer.plan import wanted

LINEAR = ["q_proj", "v_proj", "down_proj"]
RANKS = {"one": 2, "two": 4, "three": 3}


def several(**more: Any) -> PeftModel:
    """Three LoRAs of different ranks and scales, one of which is at fewer layers."""
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=LINEAR, **more), "one")
    model.add_adapter("two", LoraConfig(r=4, lora_alpha=3, target_modules=LINEAR, **more))
    model.add_adapter("three", LoraConfig(r=3, lora_alpha=9, target_modules=["q_proj"], **more))
    for name in RANKS:
        move(model, name)
    return model.eval()


def alone(model: PeftModel, row: Any, ids: Tensor) -> Tensor:
    """The output of one row with its adapters made the active ones, their scales set by hand."""
    pairs = [(row, 1.0)] if isinstance(row, str) else [(r, 1.0) if isinstance(r, str) else r for r in row]
    pairs = [(name, scale) for name, scale in pairs if name != "__base__"]
    if not pairs:
        with model.disable_adapter():
            return model(ids).logits
    model.set_adapter([name for name, _ in pairs])
    layers = model.graft.layers.values()
    for layer in layers:
        for name, scale in pairs:
            if name in layer.adapters:
                layer.set_scale(name, scale)
    out = model(ids).logits
    for layer in layers:
        for name, _ in pairs:
            if name in layer.adapters:
                layer.set_scale(name, 1.0)
    return out


ROWS: dict[str, list[Any]] = {
    "each its own": ["one", "two", "three"],
    "with the base": ["two", "__base__", "one"],
    "some twice": ["two", "one", "two"],
    "two in a row": [["one", "two"], "three", "__base__"],
    "scaled": [[("one", 0.7), ("two", -0.3)], [("three", 2.0)], [("two", 0.0), "one"]],
    "all the base": ["__base__"] * 3,
}


@pytest.mark.parametrize("grad", [False, True], ids=["no gradient", "gradient"])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_a_row_is_as_alone(rows: list[Any], grad: bool) -> None:
    model, ids = several(), tokens(3, 5, 64)
    with torch.set_grad_enabled(grad):
        mixed = model(ids, adapter_names=rows).logits
        for i, row in enumerate(rows):
            torch.testing.assert_close(mixed[[i]], alone(model, row, ids[[i]]), rtol=1e-5, atol=1e-5)


def test_gradients_of_a_mixed_batch_are_those_of_its_rows_alone() -> None:
    model, ids = several(), tokens(3, 5, 64)
    rows = [[("one", 0.5), "two"], "two", "three"]
    model.set_requires_grad(list(RANKS))

    def gradients() -> dict[str, Tensor]:
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and "lora_" in n}
        model.zero_grad()
        return found

    model(ids, adapter_names=rows).logits.square().sum().backward()
    mixed = gradients()
    for i, row in enumerate(rows):
        model.set_adapter(list(RANKS))  # all trainable
        alone(model, row, ids[[i]]).square().sum().backward()
    apart = gradients()
    assert mixed.keys() == apart.keys()
    for name, gradient in apart.items():
        torch.testing.assert_close(mixed[name], gradient, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_what_was_stacked_is_stacked_anew_when_weights_change() -> None:
    model, ids = several(), tokens(2, 5, 64)
    layer = next(iter(model.graft.layers.values()))
    with model.base_model.routed(["one", "two"]):
        before = model(ids).logits
        assert torch.equal(model(ids).logits, before)
        layer.lora_B["one"].weight.mul_(3)
        after = model(ids).logits
    assert not torch.allclose(after[0], before[0])
    assert torch.equal(after[1], before[1])
    torch.testing.assert_close(after[:1], alone(model, "one", ids[:1]), rtol=1e-5, atol=1e-5)


def test_generation_with_rows_is_as_alone() -> None:
    model, ids = several(), tokens(3, 4, 64)
    rows = ["two", [("one", 0.5), "three"], "__base__"]
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    for beams in (1, 2):
        mixed = model.generate(input_ids=ids, adapter_names=rows, num_beams=beams, **settings)
        for i, row in enumerate(rows):
            own = model.generate(input_ids=ids[[i]], adapter_names=[row], num_beams=beams, **settings)
            assert torch.equal(mixed[[i], : own.shape[1]], own)


@torch.no_grad()
def test_half_precision_rows() -> None:
    ids = tokens(3, 5, 64)
    model = get_peft_model(llama().bfloat16(), LoraConfig(r=2, target_modules=LINEAR), "one")
    model.add_adapter("two", LoraConfig(r=4, target_modules=LINEAR))
    for name in ("one", "two"):
        move(model, name)
    model.eval()
    mixed = model(ids, adapter_names=["two", "__base__", "one"]).logits
    assert mixed.dtype == torch.bfloat16
    for i, row in enumerate(["two", "__base__", "one"]):
        torch.testing.assert_close(mixed[[i]], alone(model, row, ids[[i]]), rtol=0.05, atol=0.05)


def test_what_a_row_cannot_want() -> None:
    model, ids = several(), tokens(1, 5, 64)
    for row, said in (
        ([("one", 1.0), "one"], "twice"),
        ([3], "a name, or a list of names"),
        ([("one", 0.5, 2)], "a name, or a list of names"),
        ([("nobody", 1.0)], "nobody"),
    ):
        with pytest.raises((AdapterNameError, ValueError), match=said):
            model(ids, adapter_names=[row])
    model.add_adapter("scales", IA3Config(target_modules=["v_proj"], feedforward_modules=[]))
    model.eval()
    with pytest.raises(RouteError, match="has no scale"):
        model(ids, adapter_names=[[("scales", 0.5)]])


# ---------------------------------------------------------------------- DoRA
class Biased(nn.Module):
    """Two linear layers with biases, on rows of vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def directions(dtype: torch.dtype = torch.float64) -> PeftModel:
    """Three DoRAs of different ranks, magnitudes and layers."""
    torch.manual_seed(0)
    base = Biased().to(dtype)
    model = get_peft_model(base, LoraConfig(r=2, use_dora=True, target_modules=["up", "down"]), "one")
    model.add_adapter("two", LoraConfig(r=4, lora_alpha=3, use_dora=True, target_modules=["up", "down"]))
    model.add_adapter("three", LoraConfig(r=3, lora_alpha=9, use_dora=True, target_modules=["up"]))
    for name in RANKS:
        move(model, name)
    return model.eval()


def by_hand(model: PeftModel, row: list[tuple[str, float]], x: Tensor) -> Tensor:
    """The formula in plain loops: y -> b + m / ||W + s·B·A|| · (y - b + s·B·A·x), innermost first."""
    for name, then in (("up", torch.tanh), ("down", lambda t: t)):
        layer: Any = model.graft.layers[name]
        W, b = layer.base_layer.weight, layer.base_layer.bias
        y = x @ W.T
        for adapter, scale in row:
            if adapter in layer.lora_A:
                A, B, m = (getattr(layer, n)[adapter].weight for n in ("lora_A", "lora_B", "lora_magnitude_vector"))
                D = scale * layer.scaling[adapter] * B @ A
                y = (m / (W + D).norm(dim=1).detach()) * (y + x @ D.T)
        x = then(y + b)
    return x


DIRECTIONS: list[list[Any]] = [
    ["one", "two", "three", "one"],
    ["two", "__base__", "three", "__base__"],
    [[("one", 0.7), ("two", -0.3)], "three", [("two", 2.0), "one", "three"], "__base__"],
]


@pytest.mark.parametrize("rows", DIRECTIONS, ids=["each its own", "with the base", "several, scaled"])
def test_dora_rows_and_their_gradients_are_those_of_the_formula(rows: list[Any]) -> None:
    model = directions()
    x = torch.randn(4, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    model.set_requires_grad(list(RANKS))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with model.base_model.routed(rows):
        mixed = model(x)
        with torch.no_grad():
            again = [model(x) for _ in range(2)]  # stacked, then from what was stacked
    expected = torch.cat([by_hand(model, list(wanted(row)), x[[i]]) for i, row in enumerate(rows)])
    for found in (mixed, *again):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    found, own = (
        torch.autograd.grad(y.sin().sum(), [x, *trained.values()], allow_unused=True) for y in (mixed, expected)
    )
    for name, a, b in zip(["x", *trained], found, own, strict=True):
        assert (a is None or not a.any()) if b is None else True, name
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=name)


def test_dora_rows_are_computed_together() -> None:
    """One base product, and no product of one adapter by itself: the time does not grow with their number."""
    model = directions()
    for i in range(5):
        model.add_adapter(f"more{i}", LoraConfig(r=2, use_dora=True, target_modules=["up", "down"]))
        move(model, f"more{i}")
    x = torch.randn(8, 3, 6, dtype=torch.float64)
    counts = []
    for rows in (["one", "two"] * 4, ["one", "two", "three", *(f"more{i}" for i in range(5))]):
        with torch.no_grad(), model.eval().base_model.routed(rows):
            model(x)
            with torch.profiler.profile() as profile:
                model(x)
        counts.append(sum(e.count for e in profile.key_averages() if e.key in ("aten::mm", "aten::addmm", "aten::bmm")))
    assert counts[0] == counts[1]


@torch.no_grad()
def test_dora_rows_in_a_language_model() -> None:
    ids = tokens(3, 5, 64)
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        model = get_peft_model(llama().to(dtype), LoraConfig(r=2, use_dora=True, target_modules=LINEAR), "one")
        model.add_adapter("two", LoraConfig(r=4, use_dora=True, target_modules=LINEAR))
        for name in ("one", "two"):
            move(model, name)
        model.eval()
        mixed = model(ids, adapter_names=["two", "__base__", "one"]).logits
        assert mixed.dtype == dtype
        for i, row in enumerate(["two", "__base__", "one"]):
            torch.testing.assert_close(mixed[[i]], alone(model, row, ids[[i]]), rtol=limit, atol=limit)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_a_block_routes_as_adapter_names_do(rows: list[Any]) -> None:
    model, ids = several(), tokens(3, 5, 64)
    wanted = model(ids, adapter_names=rows).logits
    text = model.generate(input_ids=ids, adapter_names=rows, max_new_tokens=3, do_sample=False)
    with model.route(rows):
        assert torch.equal(model(ids).logits, wanted)
        assert torch.equal(model.generate(input_ids=ids, max_new_tokens=3, do_sample=False), text)
        assert torch.equal(model.get_base_model()(ids).logits, wanted)
        own = model(ids, adapter_names=["one"] * 3).logits  # a call's own go first
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, model(ids, adapter_names=["__base__"] * 3).logits)
    assert torch.equal(own, model(ids, adapter_names=["one"] * 3).logits)


def test_a_block_routes_the_rows_of_a_packed_sequence() -> None:
    model, ids = several(), tokens(1, 8, 64)
    places = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]])
    with model.route(["two", [("one", 0.5), "three"]], lengths=[5, 3]):
        packed = model(ids, position_ids=places, use_cache=False).logits
    torch.testing.assert_close(packed[:, :5], alone(model, "two", ids[:, :5]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed[:, 5:], alone(model, [("one", 0.5), "three"], ids[:, 5:]), rtol=1e-5, atol=1e-5)


def test_a_block_trains_each_adapter_on_its_rows() -> None:
    """Gradients in training mode are those of the rows alone; a penalty is that of the adapters named."""
    model, ids = several(), tokens(3, 5, 64)
    model.add_adapter("ada", AdaLoraConfig(init_r=3, target_r=2, total_step=10, target_modules=["q_proj"]))
    move(model, "ada")
    rows = ["one", "ada", "two"]
    model.set_requires_grad(rows)
    model.train()
    with model.route(rows):
        model(ids, labels=ids).loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for row, name in enumerate(rows):
        model.set_adapter(name)
        out = model(ids[[row]])
        loss = F.cross_entropy(out.logits[0, :-1], ids[row, 1:]) / 3
        (loss + sum(model.tuner.penalties([name]).values(), 0.0)).backward()
    wanted = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6)


def test_a_block_refuses_what_a_row_cannot_have() -> None:
    model, ids = several(), tokens(3, 5, 64)
    with pytest.raises(AdapterNameError, match="nobody"), model.route(["nobody"] * 3):
        pass
    with pytest.raises(ArgumentError, match="list of strings"), model.route("one"):
        pass
    with model.route(["one", "two"]), pytest.raises(ValueError, match="Length of `adapter_names`"):
        model(ids)
    model.add_adapter("prompt", PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="for itself"), model.route(["prompt", "one", "two"]):
        pass


@pytest.mark.parametrize("rows", [["one", "two", "two"], ["two", "one", "two"], ["two", "__base__", "three"]])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_mixed_batch_that_is_trained_takes_one_step_a_layer(rows: list[str], p: float) -> None:
    """The fused step of a batch of one adapter, for all of them; where rows that are dropped from are side by side."""
    model = several(lora_dropout=p).train()
    model.set_requires_grad(list(RANKS))
    seen = {}

    def note(module: nn.Module, args: Any, out: Tensor) -> None:
        seen[module.name] = out.grad_fn.name()

    for layer in model.graft.layers.values():
        layer.register_forward_hook(note)
    with model.route(rows):
        model(tokens(3, 5, 64))
    assert seen.keys() == {layer.name for layer in model.graft.layers.values()}
    apart = p and rows != ["one", "two", "two"]
    assert {"_LowRank" in name for name in seen.values()} == {not apart}, seen


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_every_pass_of_a_mixed_batch_has_the_same_bits(p: float) -> None:
    """The first as well: a run that goes on from a checkpoint is the run that was not cut."""
    model = several(lora_dropout=p).train()
    model.set_requires_grad(list(RANKS))
    found = []
    for _ in range(3):
        torch.manual_seed(0)
        with model.route(["one", "two", "two"]):
            out = model(tokens(3, 5, 64)).logits
        out.square().sum().backward()
        found.append([out.detach(), *(q.grad.clone() for q in model.parameters() if q.grad is not None)])
        model.zero_grad()
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True))
