"""States of a model with adapters: biases, deleting, merging of what is tied, what is saved, what is given back."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertForMaskedLM

from tests.contract.cases import move
from tests.models import assert_untouched, bert, gpt2, llama, logits, snapshot, tokens, toy
from trimtab import (
    LoraConfig,
    PeftModel,
    TrainableTokensConfig,
    get_base_model_state_dict,
    get_peft_model,
    inject_adapter_in_model,
)
from trimtab.errors import AdapterNameError, PeftWarning

IDS = tokens()


def close(a: Any, b: Any, atol: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=atol)


# ---------------------------------------------------------------------- trained biases
def biased(kind: str = "all", **fields: Any) -> Any:
    model = get_peft_model(toy(), LoraConfig(r=2, target_modules=["up", "head"], bias=kind, **fields)).eval()
    move(model, "default")
    with torch.no_grad():
        for bias in model.graft.adapters["default"].biases.trained():
            bias.add_(1)
    return model


@pytest.mark.parametrize("kind", ["all", "lora_only"])
@pytest.mark.parametrize("convert", [nn.Module.double, lambda m: m.to(torch.bfloat16), lambda m: m.to("meta")])
def test_biases_follow_where_the_model_goes(kind: str, convert: Callable[[Any], Any]) -> None:
    for inside in (False, True):
        model = biased(kind)
        plain = toy()
        if inside:
            with model.disable_adapter():
                convert(model)
        else:
            convert(model)
        convert(plain)
        ids = IDS.to(next(plain.parameters()).device)
        with model.disable_adapter():
            off = model(ids)
        assert off.dtype == plain(ids).dtype
        assert model(ids).dtype == off.dtype
        if ids.device.type != "meta":
            assert torch.equal(off, plain(ids))


def test_biases_of_an_inactive_adapter_follow_too() -> None:
    model = biased()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["up"]))
    expected = model(IDS)
    model.set_adapter("other")
    model.double()
    assert torch.equal(model.eval()(IDS), toy().double()(IDS))
    model.set_adapter("default")
    close(model.eval()(IDS), expected.double())


@pytest.mark.parametrize("kind", ["all", "lora_only"])
@pytest.mark.parametrize("own", [False, True])
def test_biases_and_merging(kind: str, own: bool) -> None:
    model = biased(kind, lora_bias=own)
    expected, plain = model(IDS), toy()(IDS)
    for _ in range(2):
        model.merge_adapter()
        close(model(IDS), expected)
        with model.disable_adapter():
            assert torch.equal(model(IDS), plain)
        close(model(IDS), expected)
        model.unmerge_adapter()
        assert torch.equal(model(IDS), expected)
    close(copy.deepcopy(model).merge_and_unload()(IDS), expected)


# ---------------------------------------------------------------------- deleting
def test_the_first_adapter_may_go_before_the_second(tmp_path: Path) -> None:
    get_peft_model(toy(), LoraConfig(r=2, target_modules=["up"])).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(toy(), tmp_path)
    model.load_adapter(tmp_path, "b")
    with pytest.warns(PeftWarning, match="Setting active adapter to b"):
        model.delete_adapter("default")
    assert (model.active_adapters, list(model.peft_config)) == (["b"], ["b"])
    assert "default" not in model.base_model.model.up.adapters


@pytest.mark.parametrize("which", ["layers", "whole", "tokens", "both"])
def test_after_the_last_adapter_nothing_is_left(which: str) -> None:
    config: Any = {
        "layers": LoraConfig(r=2, target_modules=["up"]),
        "whole": LoraConfig(r=2, target_modules=["up"], modules_to_save=["norm"]),
        "tokens": TrainableTokensConfig(target_modules=["embed"], token_indices=[1]),
        "both": LoraConfig(r=2, target_modules=["up"], bias="all", trainable_token_indices={"embed": [1]}),
    }[which]
    base = toy()
    before = snapshot(base)
    model = get_peft_model(base, config)
    model.delete_adapter("default")
    assert dict(model.peft_config) == {}
    assert model.active_adapters == []
    assert torch.equal(model(IDS), toy()(IDS))
    for attribute in ("_trimtab", "peft_config"):
        base.__dict__.pop(attribute, None)
    assert_untouched(base.requires_grad_(True), before)


def test_a_layer_that_is_switched_inside_a_block_is_on_after_it() -> None:
    """Inside `disable_adapter()` it stays the plain layer; what it was switched to holds from then on."""
    x = torch.ones(1, toy().up.in_features)

    def two() -> tuple[Any, Any]:
        torch.manual_seed(0)
        model = get_peft_model(toy(), LoraConfig(r=2, target_modules=["up"], init_lora_weights=False))
        model.add_adapter("b", LoraConfig(r=2, target_modules=["up"], init_lora_weights=False))
        return model.eval(), model.base_model.model.up

    _, wanted = two()
    plain, first = wanted.base_layer(x), wanted(x)
    wanted.set_adapter("b")
    second = wanted(x)
    for change, before, after in (
        (lambda layer: layer.delete_adapter("default"), None, second),
        (lambda layer: layer.set_adapter("b"), None, second),
        (lambda layer: layer.delete_adapter("b"), "b", first),
        (lambda layer: layer.enable_adapters(True), "b", second),
    ):
        model, layer = two()
        if before is not None:
            layer.set_adapter(before)
        with model.disable_adapter():
            change(layer)
            assert torch.equal(layer(x), plain)
        assert not layer.disable_adapters
        assert torch.equal(layer(x), after)


def test_after_the_last_one_another_can_come() -> None:
    model = get_peft_model(toy(), LoraConfig(r=2, target_modules=["up"]))
    model.delete_adapter("default")
    model.add_adapter("new", LoraConfig(r=2, target_modules=["up", "head"], init_lora_weights=False))
    model.set_adapter("new")
    assert not torch.equal(model.eval()(IDS), toy()(IDS))


@pytest.mark.parametrize("repeated", [["a", "a"], ("a", "a", "a")])
def test_a_name_that_is_given_twice_is_deleted_once(repeated: Any) -> None:
    model = get_peft_model(toy(), LoraConfig(r=2, target_modules=["up"]), "a")
    model.add_adapter("b", LoraConfig(r=2, target_modules=["up"]))
    with pytest.warns(PeftWarning):
        model.delete_adapter(repeated)
    assert list(model.peft_config) == ["b"]


def test_one_unknown_name_deletes_none() -> None:
    model = get_peft_model(toy(), LoraConfig(r=2, target_modules=["up"]), "a")
    with pytest.raises(AdapterNameError, match="nowhere"):
        model.delete_adapter(["a", "nowhere"])
    assert list(model.peft_config) == ["a"]


# ---------------------------------------------------------------------- switched layer by layer, and copied
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
@pytest.mark.parametrize("switch", ["off", "other", "one"])
def test_a_copy_is_switched_as_its_layers_are(duplicate: Any, switch: str) -> None:
    net = inject_adapter_in_model(LoraConfig(r=2, target_modules=["up", "head"], init_lora_weights=False), toy(), "a")
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["up"], init_lora_weights=False), net, "b")
    layers: list[Any] = [net.up, net.head] if switch != "one" else [net.head]
    for layer in layers:
        if switch == "other":
            layer.set_adapter("a")
        else:
            layer.enable_adapters(False)
    net.eval()
    expected = net(IDS)
    twin = duplicate(net)
    assert torch.equal(twin(IDS), expected)
    assert [twin.up.disable_adapters, twin.head.disable_adapters] == [
        net.up.disable_adapters,
        net.head.disable_adapters,
    ]
    for layer in (twin.up, twin.head):
        layer.enable_adapters(True)
        layer.set_adapter("b")
    assert torch.equal(net(IDS), expected), "the copy is by itself"


# ---------------------------------------------------------------------- tied layers
@pytest.mark.parametrize("targets", [["query", "decoder"], ["decoder"], ["word_embeddings", "decoder"]])
def test_tied_biases_and_weights_merge_and_come_back(targets: list[str]) -> None:
    ids = tokens(2, 5, 40)
    base = bert(0, BertForMaskedLM, num_hidden_layers=1)
    plain = logits(base, ids)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=targets)).eval()
    move(model, "default")
    expected = logits(model, ids)
    with pytest.warns(PeftWarning, match="share one weight"):
        model.merge_adapter()
    close(logits(model, ids), expected, 1e-4)
    model.unmerge_adapter()
    assert torch.equal(logits(model, ids), expected)
    base = model.unload()
    decoder, predictions = base.cls.predictions.decoder, base.cls.predictions
    assert decoder.weight is base.bert.embeddings.word_embeddings.weight
    assert decoder.bias is predictions.bias
    assert torch.equal(logits(base, ids), plain)


# ---------------------------------------------------------------------- what is saved while merged
@pytest.mark.parametrize("make", [llama, lambda: llama(tie_word_embeddings=True), gpt2], ids=["llama", "tied", "gpt2"])
def test_embeddings_saved_while_merged_are_the_bases_own(make: Any, tmp_path: Path) -> None:
    ids = tokens(2, 5, 64)
    base = make()
    name = "wte" if hasattr(base, "transformer") else "embed_tokens"
    model = get_peft_model(base, LoraConfig(r=2, target_modules=[name])).eval()
    move(model, "default")
    expected = logits(model, ids)
    pristine = make().state_dict()
    model.merge_adapter()
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    held = get_base_model_state_dict(model)
    assert held.keys() == pristine.keys()
    assert all(torch.equal(held[k], v) for k, v in pristine.items())
    close(logits(PeftModel.from_pretrained(make(), tmp_path), ids), expected)


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize("merged", [False, True])
def test_the_base_is_told_as_it_was_before_a_start_changed_it(start: str, merged: bool) -> None:
    model = get_peft_model(toy(), LoraConfig(r=2, target_modules=["up"], bias="all", init_lora_weights=start))
    if merged:
        model.merge_adapter()
    held, plain = get_base_model_state_dict(model), toy().state_dict()
    assert held.keys() == plain.keys()
    assert all(torch.equal(held[k], v) for k, v in plain.items())


# ---------------------------------------------------------------------- blocks
def test_leaving_disable_adapter_restores_only_what_it_changed() -> None:
    model = get_peft_model(toy(), LoraConfig(r=2, target_modules=["up"], init_lora_weights=False), "a").eval()
    model.add_adapter("b", LoraConfig(r=2, target_modules=["up"], init_lora_weights=False))
    model.set_adapter("b")
    expected = model.eval()(IDS)
    model.set_adapter("a")
    with model.disable_adapter():
        model.set_adapter("b")
        assert torch.equal(model(IDS), toy()(IDS))
    assert model.active_adapters == ["b"]
    assert torch.equal(model(IDS), expected)
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {"b"}


def test_adapters_come_and_go_inside_the_block() -> None:
    model = get_peft_model(toy(), LoraConfig(r=2, target_modules=["up"]), "a").eval()
    with model.disable_adapter():
        model.add_adapter("b", LoraConfig(r=2, target_modules=["head"], init_lora_weights=False))
        model.set_adapter("b")
        model.delete_adapter("a")
        assert torch.equal(model.eval()(IDS), toy()(IDS))
    assert (model.active_adapters, list(model.peft_config)) == (["b"], ["b"])
    assert not torch.equal(model(IDS), toy()(IDS))


def test_switched_off_for_good_inside_the_block_stays_so() -> None:
    model = get_peft_model(toy(), LoraConfig(r=2, target_modules=["up"], init_lora_weights=False)).eval()
    with model.disable_adapter():
        model.base_model.disable_adapter_layers()
    assert torch.equal(model(IDS), toy()(IDS))
    with model.disable_adapter():
        model.base_model.enable_adapter_layers()
    assert not torch.equal(model(IDS), toy()(IDS))


# ---------------------------------------------------------------------- names
@pytest.mark.parametrize("name", ["training", "forward", "layer", "_modules", "_parameters", "T_destination", "keys"])
def test_a_name_that_modules_have_an_attribute_of(name: str) -> None:
    base = toy()
    before = snapshot(base)
    with pytest.raises(AdapterNameError, match=name):
        get_peft_model(base, LoraConfig(target_modules=["up"]), name)
    with pytest.raises(AdapterNameError, match=name):
        inject_adapter_in_model(LoraConfig(target_modules=["up"], modules_to_save=["norm"]), base, name)
    assert_untouched(base, before)


# ---------------------------------------------------------------------- shared tensors and number formats
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("autocast", [True, False])
def test_what_is_trained_is_a_parameter_whatever_the_formats(dtype: torch.dtype, autocast: bool) -> None:
    for config in (
        LoraConfig(r=2, target_modules=["up"], modules_to_save=["norm"], trainable_token_indices={"embed": [1, 2]}),
        TrainableTokensConfig(target_modules=["embed"], token_indices=[1, 2]),
    ):
        model = get_peft_model(toy(dtype), config, autocast_adapter_dtype=autocast)
        free = {n for n, p in model.named_parameters() if p.requires_grad}
        expected = {n for n, p in get_peft_model(toy(), config).named_parameters() if p.requires_grad}
        assert free == expected
        assert not [
            n for n, _ in model.named_buffers() if "default" in n and "original" not in n and "indices" not in n
        ]
        model(IDS).square().sum().backward()
        assert all(p.grad is not None for n, p in model.named_parameters() if n in free)


# ---------------------------------------------------------------------- injecting, as transformers and diffusers do
def test_what_is_injected_last_computes() -> None:
    def config() -> Any:
        return LoraConfig(r=2, target_modules=["up"], init_lora_weights=False)

    net = toy()
    inject_adapter_in_model(config(), net, "a")
    inject_adapter_in_model(config(), net, "b")
    with torch.no_grad():
        for leaf in (net.up.lora_A, net.up.lora_B):
            leaf["a"].weight.zero_()
    assert net.up.active_adapters == ["b"]
    assert not torch.equal(net.eval()(IDS), toy()(IDS))
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["head"], init_lora_weights=False), net, "c")
    assert net.head.active_adapters == ["c"]
    assert {n.split(".")[-2] for n, p in net.named_parameters() if p.requires_grad} == {"a", "b", "c"}, "as in PEFT"


def test_injecting_leaves_layers_off_that_were_switched_off() -> None:
    net = toy()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["up"], init_lora_weights=False), net, "a")
    net.up.enable_adapters(False)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["up"], init_lora_weights=False), net, "b")
    assert (net.up.active_adapters, net.up.disable_adapters) == (["b"], True)
    assert torch.equal(net.eval()(IDS), toy()(IDS))
    net.up.enable_adapters(True)
    assert not torch.equal(net(IDS), toy()(IDS))


def test_a_state_dict_filled_in_afterwards_computes() -> None:
    from trimtab import get_peft_model_state_dict, set_peft_model_state_dict

    def injected(name: str, net: Any) -> Any:
        return inject_adapter_in_model(LoraConfig(r=2, target_modules=["up"]), net, name)

    source = injected("x", toy())
    with torch.no_grad():
        source.up.lora_B["x"].weight.fill_(1)
    net = injected("second", injected("first", toy()))
    set_peft_model_state_dict(net, get_peft_model_state_dict(source, adapter_name="x"), "second")
    assert torch.equal(net.eval()(IDS), source.eval()(IDS))


# ---------------------------------------------------------------------- starts that change the base
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_the_start_is_saved_and_the_residual_is_left(start: str, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["up", "head"], init_lora_weights=start)
    model = get_peft_model(toy(), config)
    expected = model.eval()(IDS)
    close(expected, toy()(IDS))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path)
    residual = model.unload()
    assert not torch.equal(residual(IDS), toy()(IDS))
    again = PeftModel.from_pretrained(residual, tmp_path)
    close(again(IDS), expected)
    pristine = get_peft_model(toy(), config).base_model.unload(pristine=True)
    assert all(
        torch.equal(a, b) for a, b in zip(pristine.state_dict().values(), toy().state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_others_see_the_base_as_it_was(start: str) -> None:
    model = get_peft_model(toy(), LoraConfig(r=2, target_modules=["up"], init_lora_weights=start)).eval()
    plain = toy()(IDS)
    with model.disable_adapter():
        assert torch.equal(model(IDS), plain)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(IDS), plain)
    model.unmerge_adapter()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["up"]))
    model.set_adapter("other")
    assert torch.equal(model.eval()(IDS), plain)
    model.set_adapter("default")
    with pytest.warns(PeftWarning, match="was active"):
        model.delete_adapter("default")
    assert torch.equal(model.unload()(IDS), plain), "its start went with it"


# ---------------------------------------------------------------------- the final merge
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_final_merge_writes_into_the_parameters_that_are_there(dtype: torch.dtype) -> None:
    base = toy(dtype)
    held = {n: (p, p.data_ptr()) for n, p in base.named_parameters()}
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["up", "down", "embed", "conv"])).eval()
    move(model, "default")
    expected = model(IDS)
    merged = model.merge_and_unload()
    for name, parameter in merged.named_parameters():
        assert parameter is held[name][0]
        assert parameter.data_ptr() == held[name][1]
    close(merged(IDS), expected, 1e-5 if dtype == torch.float32 else 0.1)
    assert not torch.equal(held["up.weight"][0], toy(dtype).up.weight)


def test_the_final_merge_after_a_merge_that_could_be_undone() -> None:
    base = toy()
    held = base.up.weight
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["up"])).eval()
    move(model, "default")
    expected = model(IDS)
    model.merge_adapter()
    merged = model.merge_and_unload()
    assert merged.up.weight is held
    close(merged(IDS), expected)
