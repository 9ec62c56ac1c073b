"""What programs read off peft's classes: layers built by themselves, names, sizes, tensors without storage."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoHaConfig, LoraConfig, TrainableTokensConfig, get_peft_model, inject_adapter_in_model
from peft.tuners import lora
from peft.tuners.loha.layer import LoHaLayer
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.e, self.c, self.l = nn.Embedding(7, 5), nn.Conv2d(3, 4, 3), nn.Linear(5, 6)
        self.a, self.n = nn.MultiheadAttention(4, 2), nn.LayerNorm(6)


BASES = {
    "Linear": (lambda: nn.Linear(6, 10), lambda: torch.randn(3, 6)),
    "Embedding": (lambda: nn.Embedding(7, 5), lambda: torch.arange(6)[None]),
    "Conv2d": (lambda: nn.Conv2d(3, 4, 3), lambda: torch.randn(2, 3, 8, 8)),
    "Conv1d": (lambda: nn.Conv1d(3, 4, 3), lambda: torch.randn(2, 3, 8)),
}


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("how", ["config", "fields", "both"])
def test_a_layer_is_built_by_itself_trains_and_merges(name, how):
    torch.manual_seed(0)
    base, x = BASES[name][0](), BASES[name][1]()
    cls, plain = getattr(lora, name), base(x)
    if how == "config":
        layer = cls(base, "default", LoraConfig(r=3, lora_alpha=6, init_lora_weights=False))
    elif how == "fields":
        layer = cls(base, adapter_name="default", r=3, lora_alpha=6, init_lora_weights=False)
    else:
        layer = cls(base, "default", config=LoraConfig(init_lora_weights=False), r=3, lora_alpha=6)
    assert isinstance(layer, cls)
    assert isinstance(layer, LoraLayer)
    assert layer.base_layer is base
    assert (layer.r["default"], layer.scaling["default"], layer.active_adapters) == (3, 2.0, ["default"])
    assert all(p.requires_grad for p in layer.parameters())
    y = layer(x)
    assert not torch.equal(y, plain)
    y.sum().backward()
    assert all(p.grad is not None for n, p in layer.named_parameters() if "lora_" in n)
    delta, before = layer.get_delta_weight("default"), base.weight.detach().clone()
    layer.merge()
    torch.testing.assert_close(base.weight, before + delta, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer(x), y, rtol=1e-4, atol=1e-5)
    layer.unmerge()
    assert torch.equal(base.weight, before)


def test_a_parameter_is_wrapped_by_itself():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 4, 5))

        def forward(self, x):
            return torch.einsum("bi,eio->beo", x, self.w)

    base, x = Experts(), torch.randn(2, 4)
    plain = base(x)
    layer = ParamWrapper(base, "default", "w", LoraConfig(r=2, init_lora_weights=False))
    assert isinstance(layer, ParamWrapper)
    assert not isinstance(lora.Linear(nn.Linear(2, 2), "default", r=1), ParamWrapper)
    y = layer(x)
    assert not torch.allclose(y, plain)
    layer.merge()
    torch.testing.assert_close(base.w, base.w)
    torch.testing.assert_close(layer(x), y, rtol=1e-4, atol=1e-5)


def test_sizes_of_layers_of_every_kind():
    model = get_peft_model(Net(), LoraConfig(target_modules=["e", "c", "l", "a"])).base_model.model
    sizes = {k: (getattr(model, k).in_features, getattr(model, k).out_features) for k in "ecla"}
    assert sizes == {"e": (7, 5), "c": (3, 4), "l": (5, 6), "a": (4, 12)}


def test_prefixes_and_names_of_leaves():
    from peft import AdaLoraModel, IA3Model, LNTuningModel, LoHaModel, LoraModel, OFTModel, VeraModel

    prefixes = {c.__name__: c.prefix for c in (AdaLoraModel, IA3Model, LNTuningModel, LoHaModel, LoraModel, OFTModel)}
    assert prefixes == {
        "AdaLoraModel": "lora_", "IA3Model": "ia3_", "LNTuningModel": "ln_tuning_", "LoHaModel": "hada_",
        "LoraModel": "lora_", "OFTModel": "oft_",
    }  # fmt: skip
    assert VeraModel.prefix == "vera_lambda_"
    model = get_peft_model(Net(), LoHaConfig(r=2, target_modules=["l"]))
    assert model.base_model.prefix == "hada_"
    names = model.base_model.model.l.adapter_layer_names
    assert set(names) <= set(LoHaLayer.adapter_layer_names)
    assert {n.split(".")[1] for n, _ in model.base_model.model.named_parameters() if "hada_" in n} == set(names)
    assert "lora_A" in LoraLayer.adapter_layer_names
    settings = ("r", "lora_alpha", "scaling", "lora_dropout", "use_dora", "use_rslora", "lora_bias")
    assert LoraLayer.other_param_names == settings


@pytest.mark.parametrize("how", ["inject", "get_peft_model", "add_adapter"])
def test_low_cpu_mem_usage_leaves_tensors_without_storage_until_they_are_loaded(how):
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    config = LoraConfig(r=2, target_modules=["e", "l", "c"], init_lora_weights=False)
    source = inject_adapter_in_model(config, Net(), "x")
    state = get_peft_model_state_dict(source, adapter_name="x")
    if how == "inject":
        model, name = inject_adapter_in_model(config, Net(), low_cpu_mem_usage=True), "default"
    elif how == "get_peft_model":
        model, name = get_peft_model(Net(), config, low_cpu_mem_usage=True), "default"
        state = {f"base_model.model.{k}": v for k, v in state.items()}
    else:
        model, name = get_peft_model(Net(), LoraConfig(target_modules=["l"])), "second"
        model.add_adapter("second", config, low_cpu_mem_usage=True)
        state = {f"base_model.model.{k}": v for k, v in state.items()}
    added = [p for n, p in model.named_parameters() if f".{name}" in n]
    assert added
    assert {p.device.type for p in added} == {"meta"}
    assert {p.device.type for n, p in model.named_parameters() if f".{name}" not in n} == {"cpu"}
    set_peft_model_state_dict(model, state, name, low_cpu_mem_usage=True)
    held = get_peft_model_state_dict(model, adapter_name=name)
    assert held.keys() == state.keys()
    assert all(torch.equal(held[k], v) for k, v in state.items())
    trained = {n for n, p in model.named_parameters() if p.requires_grad and f".{name}" in n}
    assert bool(trained) == (how != "add_adapter")


@pytest.mark.parametrize("beside", [False, True])
def test_the_wrapper_of_trained_tokens_shows_what_programs_read(beside):
    config = (
        LoraConfig(target_modules=["l"], trainable_token_indices={"e": [1, 2]})
        if beside
        else TrainableTokensConfig(target_modules=["e"], token_indices=[1, 2])
    )
    base = Net()
    weight = base.e.weight.detach().clone()
    layer = get_peft_model(base, config).base_model.model.e
    shown = layer.token_adapter if beside else layer
    assert dict(shown.token_indices) == {"default": [1, 2]}
    assert shown.trainable_tokens_delta["default"].shape == (2, 5)
    assert shown.trainable_tokens_delta["default"].requires_grad
    with torch.no_grad():
        shown.trainable_tokens_delta["default"].add_(1)
    assert torch.equal(shown.trainable_tokens_original["default"], weight[[1, 2]])
    copy.deepcopy(layer)
