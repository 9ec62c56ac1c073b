"""A user's own layer class, by the names of PEFT's guide to custom models."""

import copy
import pickle

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import Linear, LoraLayer, bnb
from peft.tuners.lora import layer as layers
from torch import nn

from trimtab.errors import ConfigError
from trimtab.layer.adapted import AdaptedLayer


class MyLoraLSTMLayer(nn.Module, LoraLayer):
    def __init__(self, base_layer, adapter_name, r=0, lora_alpha=1, **kwargs):
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.lora_new_param = nn.ParameterDict()
        self.update_layer(adapter_name, r)

    def update_layer(self, adapter_name, r, **kwargs):
        self.lora_new_param[adapter_name] = nn.Parameter(torch.full((4,), 1.5))

    def forward(self, x):
        for name in [] if self.disable_adapters else self.active_adapters:
            x = x * self.lora_new_param[name]
        return self.base_layer(x)


class First(LoraLayer, nn.Module):
    """The parents the other way round."""

    def __init__(self, base_layer, adapter_name, config, r, lora_alpha, **kwargs):
        nn.Module.__init__(self)
        LoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha, config=config)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x)) * self.scaling["default"]


class Doubled(Linear):
    def forward(self, x, *args, **kwargs):
        return 2 * super().forward(x, *args, **kwargs)


class Eight(bnb.Linear8bitLt):
    pass


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.lin, self.head = nn.LSTM(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.lin(self.lstm(x)[0]))


def config(mapping, *targets, **fields):
    made = LoraConfig(target_modules=list(targets), **fields)
    made._register_custom_module(mapping)
    return made


LSTM = {nn.LSTM: MyLoraLSTMLayer}
X = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))


def test_the_guide(tmp_path):
    base = Model()
    plain = base(X)
    with pytest.warns(UserWarning, match="Unsupported layer type"):
        model = get_peft_model(base, config(LSTM, "lstm", "lin"))
    assert isinstance(base.lstm, LoraLayer)
    assert not isinstance(base.lstm, AdaptedLayer)
    assert isinstance(base.lin, AdaptedLayer)
    with model.disable_adapter():
        assert torch.equal(model(X), plain)
    assert not torch.allclose(model(X), plain)
    model.save_pretrained(tmp_path)
    own = LoraConfig.from_pretrained(tmp_path)
    assert "custom_modules" not in (tmp_path / "adapter_config.json").read_text()
    own._register_custom_module(LSTM)
    again = PeftModel.from_pretrained(copy.deepcopy(model).unload(), tmp_path, config=own)
    assert torch.equal(again(X), model(X))
    assert not any(p.requires_grad for p in again.parameters())
    with pytest.raises(ConfigError, match="not supported"):
        PeftModel.from_pretrained(Model(), tmp_path)


def test_classes_in_every_order_of_parents():
    for made in (First, Doubled, Eight):
        model = get_peft_model(Model(), config({nn.Linear: made}, "lin"))
        layer = model.base_model.model.lin
        assert type(layer) is made
        assert isinstance(layer, LoraLayer)
        assert isinstance(layer, Linear) == (made is Doubled)
        assert isinstance(layer, bnb.Linear8bitLt) == (made is Eight)
        assert not isinstance(layer, layers.Embedding)
        assert issubclass(made, LoraLayer)
        model(X).sum().backward()
        assert layer.lora_B["default"].weight.grad.any()


def test_the_rest_is_ours_still():
    model = get_peft_model(Model(), LoraConfig(target_modules=["lin"]))
    assert isinstance(model.base_model.model.lin, AdaptedLayer)
    assert isinstance(Linear(nn.Linear(2, 2), "default", config=LoraConfig()), AdaptedLayer)
    model.add_adapter("own", config({nn.Linear: Doubled}, "lin"))  # where a layer of ours is, it stays
    assert isinstance(model.base_model.model.lin, AdaptedLayer)


def test_threads_copies_and_pickles():
    model = get_peft_model(Model(), config(LSTM, "lstm"))
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(X), model(X))
    with again.disable_adapter():
        assert again.base_model.model.lstm.disable_adapters
        assert not model.base_model.model.lstm.disable_adapters


def test_other_methods_and_neighbours_are_refused():
    model = get_peft_model(Model(), config({nn.Linear: Doubled}, "lin"))
    with pytest.raises(ConfigError, match="class of its own"):
        model.add_adapter("scales", IA3Config(target_modules=["lin"], feedforward_modules=[]))
    with pytest.raises(ConfigError, match=r"class of its own|adapted already"):
        model.add_adapter("whole", LoraConfig(target_modules=["head"], modules_to_save=["lin"]))
    assert list(model.peft_config) == ["default"]
    holder = nn.Sequential(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(ConfigError, match="in or around"):
        get_peft_model(holder, config({nn.Sequential: First}, "0", "0.0"))
    assert type(holder[0]) is nn.Sequential


def test_many_adapters_and_injection():
    base = inject_adapter_in_model(config(LSTM, "lstm"), Model())
    assert type(base.lstm) is MyLoraLSTMLayer
    model = get_peft_model(Model(), config({nn.Linear: Doubled}, "lin"))
    for i in range(12):  # more than stay in the module tree
        model.add_adapter(f"a{i}", LoraConfig(target_modules=["lin"]))
    assert len(model.base_model.model.lin.lora_A) == 13
    for i in range(12):
        model.delete_adapter(f"a{i}")
    assert list(model.base_model.model.lin.lora_A) == ["default"]
    model.delete_adapter("default")
    assert type(model.base_model.model.lin) is nn.Linear


def test_disabled_while_merged():
    model = get_peft_model(Model(), config({nn.Linear: Doubled}, "lin"))
    lin = model.base_model.model.lin
    nn.init.ones_(lin.lora_B["default"].weight)
    with model.disable_adapter():
        off = lin(X)
    on = lin(X)
    model.merge_adapter()
    torch.testing.assert_close(lin(X), on)
    with model.disable_adapter():
        assert torch.equal(lin(X), off)
    assert lin.merged_adapters == ["default"]
    model.unmerge_adapter()
    torch.testing.assert_close(lin(X), on)
