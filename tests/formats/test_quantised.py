"""Adapters on quantised layers: what they compute, train, merge and save, against plain layers of the same numbers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.formats.test_weights import PackedLinear, bits
from tests.models import llama, tokens
from tests.quantised import FORMATS, HIDDEN, IN, inputs, net, quantise, quantised_model, twin
from trimtab import (
    LoraConfig,
    PeftModel,
    dequantize,
    get_peft_model,
    get_peft_model_state_dict,
    merge_error,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from trimtab.errors import ReadOnlyWeight
from trimtab.formats import weights
from trimtab.layer.adapted import AdaptedLayer
from trimtab.layer.spelling import fold

each = pytest.mark.parametrize("name", FORMATS)
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "bias": {"lora_bias": True},
}
kinds = pytest.mark.parametrize("kind", KINDS)


def config(kind: str = "lora", **more: Any) -> LoraConfig:
    """A LoRA whose update is as large as the layer's weight, and whose alpha is not its rank."""
    return LoraConfig(r=4, lora_alpha=16, target_modules=["up"], **{**KINDS[kind], **more})


def stir(model: nn.Module) -> None:
    """Move what trains off its start."""
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw).to(parameter.dtype))


def adapted(name: str, kind: str = "lora", **more: Any) -> Any:
    """The quantised net with an adapter that is off its start."""
    model = get_peft_model(net(name, **more), config(kind))
    stir(model)
    return model


def both(name: str, kind: str, **more: Any) -> tuple[Any, Any]:
    """(on the quantised net, on its plain twin) with the same adapter."""
    model = adapted(name, kind, **more)
    plain = get_peft_model(twin(name, **more), config(kind))
    set_peft_model_state_dict(plain, get_peft_model_state_dict(model))
    return model, plain


def layer_of(model: Any) -> AdaptedLayer:
    """The adapted layer."""
    layer = model.get_submodule("base_model.model.up")
    assert isinstance(layer, AdaptedLayer)
    return layer


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The gradients of a loss."""
    model.zero_grad()
    model(x).square().mean().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@kinds
@each
def test_computes_what_a_plain_layer_does(name: str, kind: str) -> None:
    """Outputs, gradients of the adapter and of the input are those of a plain layer of the same numbers."""
    model, plain = both(name, kind)
    x, x2 = inputs().requires_grad_(), inputs().requires_grad_()
    torch.testing.assert_close(model(x), plain(x2), rtol=1e-5, atol=1e-5)
    mine, other = gradients(model, x), gradients(plain, x2)
    assert mine.keys() == other.keys()
    assert all("lora_" in n for n in mine)
    for key, gradient in other.items():
        torch.testing.assert_close(mine[key], gradient, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x.grad, x2.grad, rtol=1e-4, atol=1e-5)


@kinds
@each
def test_weight_spelling(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer run with the adapted weight agrees with the edits of its input and output."""
    model, x = adapted(name, kind), inputs()
    wanted = model(x)
    (method,) = layer_of(model).methods["default"]
    monkeypatch.setattr(method, "fused", False)
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@kinds
@each
def test_merge(name: str, kind: str, bias: bool) -> None:
    """A merge is the adapted weight rounded once; disabling and unmerging are exact, to the object and the bit."""
    model, plain = both(name, kind, bias=bias)
    layer, x = layer_of(model), inputs()
    base, before = layer.base_layer, model(x)
    old, old_bias, old_bits = base.weight, base.bias, bits(base, base.weight)
    with model.disable_adapter():
        untouched = model(x)
    model.merge_adapter(safe_merge=True)
    assert type(base.weight) is type(old)
    layer_of(plain).merge()
    exact: Any = layer_of(plain).base_layer
    got = weights.read(base, base.weight)
    assert (got - exact.weight).abs().max() <= FORMATS[name][1] * exact.weight.abs().max()
    if bias or kind == "bias":
        torch.testing.assert_close(base.bias, exact.bias)
    torch.testing.assert_close(model(x), model.base_model.model.head(torch.tanh(nn.functional.linear(
        x, got, base.bias))), rtol=1e-5, atol=1e-5)  # fmt: skip
    with model.disable_adapter():
        assert torch.equal(model(x), untouched)
    merged = model(x)
    assert not torch.equal(merged, untouched)
    model.unmerge_adapter()
    assert base.weight is old
    assert base.bias is old_bias
    assert all(torch.equal(a, b) for a, b in zip(old_bits, bits(base, old), strict=True))
    assert torch.equal(model(x), before)
    model.merge_adapter()
    assert torch.equal(model(x), merged)


@each
def test_torchao_dora_and_bnb_bias(name: str) -> None:
    """PEFT merges these wrongly (D2-4: half the output off; D2-5: the bias unscaled): the merged outputs are right."""
    for kind, most in (("dora", 0.2), ("bias", 0.2)):
        model, x = adapted(name, kind), inputs()
        before = model(x)
        model.merge_adapter(safe_merge=True)
        limit = 0.03 if "int8" in name else most
        assert (model(x) - before).norm() / before.norm() < limit


@each
def test_merge_error(name: str) -> None:
    """What rounding takes from a merge is reported, and is none after a merge into plain numbers."""
    model = adapted(name)
    assert merge_error(model) == {}
    model.merge_adapter()
    (error,) = merge_error(model).values()
    assert 1e-5 < error < (0.05 if "int8" in name else 0.5)
    model.unmerge_adapter()
    dequantize(model)
    model.merge_adapter()
    (error,) = merge_error(model).values()
    assert error < 1e-6


@kinds
@each
def test_merge_into_plain_numbers(name: str, kind: str) -> None:
    """A dequantised model computes the same; its merge loses nothing; what is left is a plain model."""
    model, x = adapted(name, kind), inputs()
    before = model(x)
    dequantize(model)
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    merged = model.merge_and_unload(safe_merge=True)
    assert type(merged.up) is nn.Linear
    torch.testing.assert_close(merged(x), before, rtol=1e-4, atol=1e-5)


def test_dequantize_refuses_a_merged_model() -> None:
    """Plain numbers must be those of the base."""
    model = adapted("bnb-nf4")
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        dequantize(model)


@each
def test_unload_and_merge_and_unload(name: str) -> None:
    """`unload` gives back the very layer; `merge_and_unload` leaves it with a weight of its own format."""
    base, x = net(name), inputs()
    layer, weight, y = base.up, base.up.weight, base(x)
    model = get_peft_model(base, config())
    stir(model)
    back = model.unload()
    assert back.up is layer
    assert back.up.weight is weight
    assert torch.equal(back(x), y)
    model = get_peft_model(back, config())
    stir(model)
    model.merge_adapter()
    merged = model(x)
    done = model.merge_and_unload()
    assert done.up is layer
    assert type(done.up.weight) is type(weight)
    assert torch.equal(done(x), merged)


@each
def test_several_adapters(name: str) -> None:
    """Stacked, switched and mixed in a batch, and merged together: rounded once, from the original."""
    model, x = adapted(name).eval(), inputs(4)
    model.add_adapter("second", config("dora"))
    with torch.no_grad():
        for n, p in model.named_parameters():
            if ".second" in n and "lora_B" in n:
                p.normal_(std=0.1)
    first = model(x)
    model.set_adapter("second")
    second = model(x)
    rows = model(x, adapter_names=["default", "second", "__base__", "default"])
    torch.testing.assert_close(rows[0], first[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rows[1], second[1], rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(rows[2], model(x)[2], rtol=1e-4, atol=1e-5)
    layer = layer_of(model)
    wanted = fold([m for a in ("default", "second") for m in layer.methods[a]])
    ((W, _),) = wanted.values()
    model.merge_adapter(["default"])
    model.merge_adapter(["second"])
    got = weights.read(layer.base_layer, layer.base_layer.weight)
    assert (got - W).abs().max() <= FORMATS[name][1] * W.abs().max()


@each
def test_number_formats(name: str) -> None:
    """Adapters are fp32 on any quantised base; the output has the input's number format."""
    base = net(name, dtype=torch.bfloat16)
    x = inputs(dtype=torch.bfloat16)
    y = base(x)
    model = get_peft_model(base, config())
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}
    stir(model)
    assert model(x).dtype == y.dtype == torch.bfloat16
    assert not torch.equal(model(x), y)
    model.merge_adapter()
    assert model(x).dtype == torch.bfloat16
    if "storage" in name:  # bitsandbytes' own `to` would convert the packed bytes
        return
    model.to(torch.float32)
    model.unmerge_adapter()
    wanted = adapted(name)(inputs())
    assert (model(inputs()) - wanted).norm() < 0.03 * wanted.norm()


@each
def test_copies(name: str) -> None:
    """A deep copy, merged or not, shares nothing and computes the same."""
    model, x = adapted(name), inputs()
    before = model(x)
    model.merge_adapter()
    merged = model(x)
    duplicate = copy.deepcopy(model)
    assert torch.equal(duplicate(x), merged)
    duplicate.unmerge_adapter()
    assert torch.equal(duplicate(x), before)
    assert torch.equal(model(x), merged)
    model.unmerge_adapter()
    with torch.no_grad():
        for parameter in duplicate.parameters():
            parameter.data = torch.zeros_like(parameter.data) if parameter.requires_grad else parameter.data
    assert torch.equal(model(x), before)


@kinds
@each
def test_saves_and_loads(name: str, kind: str, tmp_path: Path) -> None:
    """Only the adapter is saved; it loads onto the quantised base, and onto a plain one."""
    model, x = adapted(name, kind), inputs()
    model.save_pretrained(tmp_path)
    tensors = get_peft_model_state_dict(model)
    assert all("lora_" in key for key in tensors)
    again = PeftModel.from_pretrained(net(name), tmp_path)
    assert torch.equal(again(x), model.eval()(x))
    assert not any(p.requires_grad for p in again.parameters())
    plain = PeftModel.from_pretrained(twin(name), tmp_path)
    torch.testing.assert_close(plain.train()(x), model.train()(x), rtol=1e-5, atol=1e-5)


def test_counts() -> None:
    """A 4-bit parameter counts as the values it stands for, whatever it is stored in."""
    wanted = get_peft_model(twin("bnb-nf4"), config()).get_nb_trainable_parameters()
    for name in FORMATS:
        assert get_peft_model(net(name), config()).get_nb_trainable_parameters() == wanted, name


@each
def test_trained_whole(name: str) -> None:
    """A quantised layer in `modules_to_save` is trained as a plain copy."""
    model, x = get_peft_model(net(name), LoraConfig(target_modules=["head"], modules_to_save=["up"])), inputs()
    with model.disable_adapter():
        before = model(x)
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    found = gradients(model, x)
    assert any("up.modules_to_save" in n for n in found)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@each
def test_starts_that_change_the_base(name: str, init: str) -> None:
    """The base keeps the rest of its weight, rounded; taking the adapter away brings back the very parameter."""
    base, x = net(name), inputs()
    weight, y = base.up.weight, base(x)
    model = get_peft_model(base, config(init_lora_weights=init))
    assert base.up.base_layer.weight is not weight
    assert (model(x) - y).norm() < (0.02 if "int8" in name else 0.2) * y.norm()
    with model.disable_adapter():
        assert torch.equal(model(x), y)
    assert model.unload(pristine=True).up.weight is weight


def test_layer_of_an_unknown_library() -> None:
    """A packed layer that is no nn.Linear: adapted, trained and saved like any; its merge names the ways out."""
    for kind in KINDS:
        base = twin("bnb-nf4")
        plain = copy.deepcopy(base)
        base.up = PackedLinear(base.up)
        model, x = get_peft_model(base, config(kind)), inputs()
        stir(model)
        wanted = get_peft_model(plain, config(kind))
        with torch.no_grad():
            layer_of(wanted).base_layer.weight.copy_(weights.read(base.up.base_layer, None))
        set_peft_model_state_dict(wanted, get_peft_model_state_dict(model))
        torch.testing.assert_close(model(x), wanted(x), rtol=1e-4, atol=1e-4)
        assert gradients(model, x).keys() == gradients(wanted, x).keys()
        before = model(x)
        with pytest.raises(ReadOnlyWeight, match=r"PackedLinear is read, not written.*dequantize"):
            model.merge_adapter()
        assert torch.equal(model(x), before)
        merged = dequantize(model).merge_and_unload()
        torch.testing.assert_close(merged(x), before, rtol=1e-4, atol=1e-4)


def half_llama(name: str, **changes: Any) -> Any:
    """A tiny Llama in bf16, its layers quantised."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
    return quantised_model(llama(**{**sizes, **changes}).to(torch.bfloat16), name)


@each
def test_prepare_for_training(name: str) -> None:
    """Norms are fp32, embeddings and head are not copied up, all is frozen, checkpointing is on and gradients flow."""
    model = prepare_model_for_kbit_training(half_llama(name))
    assert not any(p.requires_grad for p in model.parameters())
    norms = [m for m in model.modules() if "Norm" in type(m).__name__]
    assert {m.weight.dtype for m in norms} == {torch.float32}
    assert model.lm_head.weight.dtype == model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert model.is_gradient_checkpointing
    adapter = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    ids = tokens(vocabulary=64)
    adapter.train()
    adapter(input_ids=ids, labels=ids).loss.backward()
    found = {n for n, p in adapter.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert found == {n for n, p in adapter.named_parameters() if p.requires_grad}
    assert all("lora_" in n for n in found)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("name", ["bnb-nf4-double", "bnb-int8", "torchao-int8", "torchao-int4"])
def test_trains(name: str, kind: str) -> None:
    """QLoRA in small: the loss falls, only adapters have gradients, the base keeps its bits; a merge keeps the gain."""
    torch.manual_seed(0)
    base = quantised_model(llama(hidden_size=64, intermediate_size=64), name)
    base.lm_head.weight.data.mul_(8)  # large enough to tell tokens apart
    ids = tokens(rows=3, length=8, vocabulary=64)
    stored = {n: bits(m, m.weight) for n, m in base.named_modules() if weights.quantised(m)}
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", **KINDS[kind]))
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-2)
    losses = []
    for _ in range(20):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        assert {n for n, p in model.named_parameters() if p.grad is not None} == {
            n for n, p in model.named_parameters() if "lora_" in n}  # fmt: skip
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    for path, before in stored.items():
        layer = base.get_submodule(path).base_layer
        assert all(torch.equal(a, b) for a, b in zip(before, bits(layer, layer.weight), strict=True))
    model.eval().merge_adapter()
    assert model(input_ids=ids, labels=ids).loss.item() < 0.7 * losses[0]


def test_sizes_are_known() -> None:
    """The 4-bit layer's shape is its numbers', not its bytes'."""
    layer = AdaptedLayer(quantise(nn.Linear(IN, HIDDEN), "bnb-nf4"), "up", get_peft_model(
        net("bnb-nf4"), config()).base_model.graft.board)  # fmt: skip
    assert (layer.in_features, layer.out_features) == (IN, HIDDEN)
