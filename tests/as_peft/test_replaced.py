"""Steps of PEFT that other libraries replace (Unsloth, axolotl, ms-swift): who adds an adapter asks theirs."""

from types import MethodType

import pytest
import torch
from peft import LoraConfig, PeftModel, VeraConfig, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import layer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from trimtab.errors import ConfigError
from trimtab.layer.adapted import AdaptedLayer


class Clipped(nn.Module):
    """A layer that no method knows, around one that all know."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x.clamp(-1, 1))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = Clipped(), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.v(self.k(self.q(x)))


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.inner.extra = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return self.inner(x) @ self.inner.extra


@pytest.fixture
def inside(monkeypatch):
    """`_create_and_replace` as Unsloth and axolotl have it: of a Clipped, the layer inside is adapted."""
    asked, before = [], LoraModel._create_and_replace

    def step(self, peft_config, adapter_name, target, target_name, parent, current_key=None, **kwargs):
        asked.append((adapter_name, target_name, type(parent).__name__, current_key, self.peft_config[adapter_name].r))
        if isinstance(target, Clipped):
            target, target_name, parent = target.linear, "linear", target
        return before(self, peft_config, adapter_name, target, target_name, parent, current_key=current_key, **kwargs)

    monkeypatch.setattr(LoraModel, "_create_and_replace", step)
    return asked


def keys(model):
    return [n for n, _ in model.named_parameters() if "lora_A" in n]


def test_a_replaced_step_sends_to_another_module(inside, tmp_path):
    model = get_peft_model(Model(), LoraConfig(target_modules=["q", "k"], r=2))
    assert keys(model) == [f"base_model.model.{name}.lora_A.default.weight" for name in ("q.linear", "k")]
    assert inside == [("default", "q", "Model", "q", 2), ("default", "k", "Model", "k", 2)]
    model.add_adapter("other", LoraConfig(target_modules=["q", "v"], r=3))
    assert inside[2:] == [("other", "q", "Model", "q", 3), ("other", "v", "Model", "v", 3)]
    nn.init.ones_(model.base_model.model.q.linear.lora_B["default"].weight)
    x = torch.randn(3, 4)
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    with model.disable_adapter():
        plain = model(x)
    again = PeftModel.from_pretrained(model.unload(), tmp_path)
    assert not torch.allclose(again(x), plain)
    assert again.peft_config["default"].target_modules == {"q", "k"}


def test_a_replaced_step_is_asked_whoever_adds(inside):
    inject_adapter_in_model(LoraConfig(target_modules=["q"], r=2), Model())
    LoraModel(Model(), LoraConfig(target_modules=["k"], r=2), "own")
    assert [row[:2] for row in inside] == [("default", "q"), ("own", "k")]


def test_a_replaced_step_is_its_methods_own(inside):
    with pytest.raises(ConfigError, match="not supported"):
        get_peft_model(Model(), VeraConfig(target_modules=["q"], r=2))
    assert inside == []


def test_a_subclass_has_steps_of_its_own():
    class Own(LoraModel):
        def _create_and_replace(self, config, name, target, *rest, **kwargs):
            if target is not self.model.k:  # and k is left as it is
                super()._create_and_replace(config, name, target, *rest, **kwargs)

    tuner = Own(Model(), LoraConfig(target_modules=["k", "v"]), "default")
    assert tuner.targeted_module_names == ["v"]
    assert LoraModel(Model(), LoraConfig(target_modules=["k"]), "default").targeted_module_names == ["k"]


def test_a_step_that_fails_leaves_nothing(monkeypatch):
    def step(self, *args, **kwargs):
        raise RuntimeError("not today")

    model = get_peft_model(Model(), LoraConfig(target_modules=["k"]))
    before = {name: type(module) for name, module in model.named_modules()}
    monkeypatch.setattr(LoraModel, "_create_and_replace", step)
    with pytest.raises(RuntimeError, match="not today"):
        model.add_adapter("other", LoraConfig(target_modules=["v"]))
    assert set(model.peft_config) == {"default"}
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_a_replaced_choice_of_modules(monkeypatch):
    before = BaseTuner._check_target_module_exists
    choice = {"k": False, "v": True}
    monkeypatch.setattr(
        BaseTuner,
        "_check_target_module_exists",
        staticmethod(lambda config, key: choice.get(key, before(config, key))),
    )
    model = get_peft_model(Model(), LoraConfig(target_modules=["k", "q.linear"]))
    assert model.base_model.targeted_module_names == ["q.linear", "v"]


def test_replaced_choices_of_parameters(monkeypatch):
    before, asked = BaseTuner._inject_parameters, []

    def step(self, peft_config, model, adapter_name, low_cpu_mem_usage):
        self._check_target_module_compatiblity(peft_config, model, "inner")
        asked.append(adapter_name)
        before(self, peft_config, model, adapter_name, low_cpu_mem_usage)

    monkeypatch.setattr(BaseTuner, "_inject_parameters", step)
    model = get_peft_model(Holder(), LoraConfig(target_modules=[], target_parameters=["inner.extra"]))
    assert model.base_model.targeted_parameter_names == ["inner.extra"]

    def other(self, peft_config, model, adapter_name, low_cpu_mem_usage):
        inner = model.get_submodule("inner")
        self._create_and_replace(
            peft_config, adapter_name, inner, "inner", model, current_key="inner.extra", parameter_name="extra"
        )

    monkeypatch.setattr(BaseTuner, "_inject_parameters", other)
    model = get_peft_model(Holder(), LoraConfig(target_modules=[], target_parameters=["synthetic.name"]))
    assert model.base_model.targeted_parameter_names == ["inner.extra"]
    assert asked == ["default"]


@pytest.mark.parametrize("wide", [True, False])
def test_a_replaced_cast(monkeypatch, wide):
    before, asked = LoraModel._cast_adapter_dtype, []

    def step(self, adapter_name, autocast_adapter_dtype=True):
        asked.append((adapter_name, self.peft_config[adapter_name].r, autocast_adapter_dtype))
        return before(self, adapter_name, wide)

    monkeypatch.setattr(LoraModel, "_cast_adapter_dtype", step)
    model = get_peft_model(Model().bfloat16(), LoraConfig(target_modules=["k"], r=2))
    model.add_adapter("other", LoraConfig(target_modules=["k"], r=3), autocast_adapter_dtype=False)
    dtypes = {p.dtype for n, p in model.named_parameters() if "lora_" in n}
    assert dtypes == {torch.float32 if wide else torch.bfloat16}
    assert asked == [("default", 2, True), ("other", 3, False)]


# ------------------------------------------------------------------ of layers
X = torch.randn(3, 4)


def other_forward(before):
    return lambda self, x, *args, **kwargs: before(self, x, *args, **kwargs) + 1000


def test_a_replaced_forward_is_that_of_the_layers_it_stands_for(monkeypatch):
    linear = get_peft_model(Model(), LoraConfig(target_modules=["v"]))
    holder = get_peft_model(Holder(), LoraConfig(target_modules=[], target_parameters=["inner.extra"]))
    plain = linear(X), holder.base_model.model.inner(X)
    with monkeypatch.context() as patch:
        patch.setattr(ParamWrapper, "forward", other_forward(ParamWrapper.forward))
        patch.setattr(ParamWrapper, "_patched", True, raising=False)
        assert torch.equal(linear(X), plain[0])
        assert torch.equal(holder.base_model.model.inner(X), plain[1] + 1000)
        assert not hasattr(layer.Linear, "_patched")
    with monkeypatch.context() as patch:
        patch.setattr(layer.LoraLayer, "forward", other_forward(layer.LoraLayer.forward))
        assert torch.equal(linear(X), plain[0] + 1000)
        assert layer.Linear.forward is layer.LoraLayer.forward
    assert torch.equal(linear(X), plain[0])
    assert torch.equal(holder.base_model.model.inner(X), plain[1])
    assert not hasattr(ParamWrapper, "_patched")
    assert layer.Linear.forward is AdaptedLayer.forward


def test_a_replaced_way_to_a_parameter():
    model = get_peft_model(Holder(), LoraConfig(target_modules=[], target_parameters=["inner.extra"]))
    inner, before = model.base_model.model.inner, ParamWrapper.get_param
    assert before(inner) is inner.get_param() is inner.base_layer.extra
    try:
        ParamWrapper.get_param = lambda self: (before(self), "seen")
        assert inner.get_param() == (inner.base_layer.extra, "seen")
        assert not hasattr(get_peft_model(Model(), LoraConfig(target_modules=["k"])).base_model.model.k, "get_param")
    finally:
        ParamWrapper.get_param = before
    assert inner.get_param() is inner.base_layer.extra


def test_layers_whose_merge_is_replaced_one_by_one():
    """ms-swift merges some layers, takes their weights to its engine, and then merges others."""
    model = get_peft_model(Model(), LoraConfig(target_modules=["k", "v"], init_lora_weights=False))
    layers, wanted = [model.base_model.model.k, model.base_model.model.v], []
    plain = [x.base_layer.weight.clone() for x in layers]

    def step(self, safe_merge=False, adapter_names=None):
        self._move_adapter_to_device_of_base_layer("default")
        if self in wanted:
            self.before(safe_merge, adapter_names)

    for x in layers:
        x.before, x.merge = x.merge, MethodType(step, x)
    for now in layers:
        wanted[:] = [now]
        model.merge_adapter()
        assert now.merged
    assert not any(torch.equal(a, x.base_layer.weight) for a, x in zip(plain, layers, strict=True))
    model.unmerge_adapter()
    assert all(torch.equal(a, x.base_layer.weight) for a, x in zip(plain, layers, strict=True))
    layers[0].before()
    for x in layers:
        del x.merge
    merged = model.merge_and_unload()
    assert not any(torch.equal(a, w) for a, w in zip(plain, (merged.k.weight, merged.v.weight), strict=True))


def test_what_a_layer_shows_of_itself():
    """Read by Unsloth (how factors of experts lie) and axolotl (which copy is in use)."""

    class Experts(nn.Module):
        def __init__(self, *shape):
            super().__init__()
            self.up = nn.Parameter(torch.randn(*shape))

    for shape, swapped in (((4, 3), False), ((5, 4, 3), True)):
        model = nn.Sequential(Experts(*shape))
        inject_adapter_in_model(LoraConfig(target_modules=[], target_parameters=["0.up"]), model)
        assert model[0]._did_swap_in_out_features is swapped
    model = get_peft_model(Model(), LoraConfig(target_modules=["k"], modules_to_save=["v"]))
    saved = model.base_model.model.v
    assert not hasattr(model.base_model.model.k, "_did_swap_in_out_features")
    assert saved.modules_to_save[saved.active_adapter] is saved.chosen()
    model.add_adapter("other", LoraConfig(target_modules=["k"]))
    model.set_adapter("other")
    assert saved.active_adapter == []
