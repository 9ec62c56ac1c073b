"""Layers that a user's class makes (`LoraConfig._register_custom_module`), against the installed peft's."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trimtab
from tests.parity.pairs import (
    BOTH,
    all_near,
    config_file,
    copy_state,
    near,
    quiet,
    spoken,
    stir,
    trainable,
    weights_file,
)
from tests.parity.test_parts import both
from trimtab.errors import ConfigError, NotMergeable

LAYER = "peft.tuners.lora.layer"


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.lin, self.head = nn.LSTM(6, 7, num_layers=2), nn.Linear(7, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lin(self.lstm(x)[0]))


def lstm_class(LoraLayer: Any) -> Any:
    """The layer of PEFT's guide: tensors of its own under names that LoraLayer does not know."""

    class MyLoraLSTMLayer(nn.Module, LoraLayer):  # type: ignore[misc]
        def __init__(self, base_layer: nn.Module, adapter_name: str, r: int = 0, lora_alpha: int = 1, **kwargs: Any):
            super().__init__()
            LoraLayer.__init__(self, base_layer)
            self._active_adapter = adapter_name
            self.given = {key: getattr(value, "r", value) for key, value in kwargs.items()}
            self.lora_ih, self.lora_hh = nn.ParameterDict(), nn.ParameterDict()
            self.update_layer(adapter_name, r, lora_alpha)

        def update_layer(self, adapter_name: str, r: int, lora_alpha: int, **kwargs: Any) -> None:
            self.updated = {key: getattr(value, "r", value) for key, value in kwargs.items()}
            self.r[adapter_name], self.scaling[adapter_name] = r, lora_alpha / r
            self.lora_ih[adapter_name] = nn.Parameter(torch.randn(r, 6) * 0.1)
            self.lora_hh[adapter_name] = nn.Parameter(torch.zeros(6, r))

        def forward(self, x: Tensor, hx: Any = None) -> Any:
            for name in [] if self.disable_adapters else self.active_adapters:
                if name in self.lora_ih:
                    x = x + self.scaling[name] * (x @ self.lora_ih[name].T @ self.lora_hh[name].T)
            return self.base_layer(x, hx)

    return MyLoraLSTMLayer


def linear_class(Linear: Any) -> Any:
    """A subclass of lora.Linear with a forward around its own."""

    class Doubled(Linear):  # type: ignore[misc]
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return 2 * super().forward(x, *args, **kwargs)

    return Doubled


def standard_class(LoraLayer: Any) -> Any:
    """A layer with LoraLayer's own tensors."""

    class Standard(nn.Module, LoraLayer):  # type: ignore[misc]
        def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, r: int, lora_alpha: int, **kw: Any):
            super().__init__()
            LoraLayer.__init__(self, base_layer)
            self._active_adapter = adapter_name
            self.update_layer(adapter_name, r, lora_alpha, config=config)

        def forward(self, x: Tensor) -> Tensor:
            y = self.base_layer(x)
            for name in [] if self.disable_adapters else self.active_adapters:
                if name in self.lora_A:
                    y = y + self.lora_B[name](self.lora_A[name](self.lora_dropout[name](x))) * self.scaling[name]
            return y

    return Standard


MAKE = {
    "lstm": (nn.LSTM, "LoraLayer", lstm_class),
    "linear": (nn.Linear, "Linear", linear_class),
    "standard": (nn.Linear, "LoraLayer", standard_class),
}


def config(which: int, kind: str, register: bool = True, **fields: Any) -> Any:
    fields = {"target_modules": ["lstm", "lin"] if kind == "lstm" else ["lin"], "r": 4, **fields}
    made = BOTH[which].LoraConfig(**fields)
    if register:
        made._register_custom_module(mapping(which, kind))
    return made


def mapping(which: int, kind: str) -> dict[Any, Any]:
    base, name, make = MAKE[kind]
    return {base: make(both(LAYER, name)[which])}


def adapted(which: int, kind: str, **fields: Any) -> Any:
    torch.manual_seed(0)
    return quiet(BOTH[which].get_peft_model, Model(), config(which, kind, **fields)).eval()


def pair(kind: str, **fields: Any) -> tuple[Any, Any]:
    ours, theirs = (adapted(which, kind, **fields) for which in (0, 1))
    stir(theirs)
    copy_state(theirs, ours)
    return ours, theirs


X = torch.randn(3, 2, 6, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kind", MAKE)
def test_names_outputs_and_files(kind: str, tmp_path: Path) -> None:
    ours, theirs = pair(kind)
    assert trainable(ours) == trainable(theirs)
    assert ours.targeted_module_names == theirs.targeted_module_names
    near(ours(X), theirs(X))
    outputs = []
    for model, library in zip((ours, theirs), BOTH, strict=True):
        model.save_pretrained(tmp_path / library.__name__)
        with model.disable_adapter():
            outputs.append(model(X))
    near(*outputs)
    mine, yours = tmp_path / "trimtab", tmp_path / "peft"
    assert config_file(mine) == config_file(yours)
    all_near(weights_file(mine), weights_file(yours))
    for folder in (mine, yours):
        torch.manual_seed(0)
        again = trimtab.LoraConfig.from_pretrained(folder)
        again._register_custom_module(mapping(0, kind))
        near(quiet(trimtab.PeftModel.from_pretrained, Model(), folder, config=again)(X), ours(X))


def test_what_the_class_is_given() -> None:
    said, layers = [], []
    for which, library in enumerate(BOTH):
        torch.manual_seed(0)
        model, own = Model(), config(which, "lstm", rank_pattern={"lstm": 3})
        said.append([text for text in spoken(library.get_peft_model, model, own) if "Unsupported" in text])
        layers.append(model.lstm)
    ours, theirs = layers
    assert said[0] == said[1] != []
    assert ours.given == theirs.given
    names = (
        "r",
        "scaling",
        "lora_alpha",
        "merged",
        "merged_adapters",
        "active_adapters",
        "disable_adapters",
        "use_dora",
    )
    for name in (*names, "in_features", "out_features", "adapter_layer_names", "use_rslora", "lora_bias", "kwargs"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in theirs.named_modules()]
    for layer, cls in zip(layers, both(LAYER, "LoraLayer"), strict=True):
        assert isinstance(layer, cls)
        assert issubclass(type(layer), cls)
        assert not isinstance(layer, both(LAYER, "Linear")[0])
        assert type(layer.get_base_layer()) is nn.LSTM


@pytest.mark.parametrize("kind", ["linear", "standard"])
def test_own_tensors_start_and_scale_alike(kind: str) -> None:
    fields = {"use_rslora": True, "lora_alpha": 6, "lora_dropout": 0.1}
    layers = []
    for which, library in enumerate(BOTH):
        model, own = Model(), config(which, kind, **fields)
        torch.manual_seed(0)
        quiet(library.get_peft_model, model, own)
        layers.append(model.lin)
    ours, theirs = layers
    assert torch.equal(ours.lora_A["default"].weight, theirs.lora_A["default"].weight)
    assert not ours.lora_B["default"].weight.any()
    assert str(ours.lora_dropout) == str(theirs.lora_dropout)
    for call, args in (
        ("set_scale", ("default", 2.0)),
        ("scale_layer", (3.0,)),
        ("unscale_layer", ()),
        ("unscale_layer", (2,)),
    ):
        for layer in layers:
            getattr(layer, call)(*args)
        assert ours.scaling == theirs.scaling
    for layer in layers:
        layer.delete_adapter("default")
    assert ours.r == theirs.r == {}
    assert list(ours.lora_A) == list(theirs.lora_A) == []


@pytest.mark.parametrize("kind", MAKE)
def test_second_adapter_switch_delete_unload(kind: str) -> None:
    ours, theirs = pair(kind)
    for which, model in enumerate((ours, theirs)):
        quiet(model.add_adapter, "second", config(which, kind, register=which == 0, r=2))
        model.set_adapter("second")
    stir(theirs)
    copy_state(theirs, ours)
    assert {n for n in trainable(ours) if "default" in n} == set()
    near(ours(X), theirs(X))
    if kind == "lstm":
        assert ours.base_model.model.lstm.updated == theirs.base_model.model.lstm.updated
    for model in (ours, theirs):
        model.set_adapter("default")
    near(ours(X), theirs(X))
    for model in (ours, theirs):
        quiet(model.delete_adapter, "default")
    assert ours.active_adapters == ["second"]
    assert not [n for n, _ in ours.named_parameters() if "default" in n]
    bare = ours.unload()
    assert type(bare.lstm) is nn.LSTM
    assert type(bare.lin) is nn.Linear
    assert not trainable(bare)


def test_training_steps() -> None:
    ours, theirs = pair("lstm")
    for model in (ours, theirs):
        model.train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(X).square().mean().backward()
            optimizer.step()
    all_near(*({n: p.detach() for n, p in m.named_parameters()} for m in (ours, theirs)))


def test_merge_where_the_class_can() -> None:
    ours, theirs = pair("linear")
    before = ours(X)
    weight = ours.base_model.model.lin.base_layer.weight
    for model in (ours, theirs):
        model.merge_adapter()
    near(ours(X), theirs(X))
    near(ours.base_model.model.lin.weight, theirs.base_model.model.lin.weight)
    assert ours.base_model.model.lin.merged
    ours.unmerge_adapter()
    assert ours.base_model.model.lin.base_layer.weight is weight
    near(ours(X), before)
    theirs.unmerge_adapter()
    near(*(model.merge_and_unload().lin.weight for model in (ours, theirs)))


def test_status() -> None:
    ours, theirs = pair("lstm")
    mine, yours = ours.get_layer_status(), theirs.get_layer_status()
    assert [(r.name, r.module_type, r.enabled, r.active_adapters) for r in mine] == [
        (r.name, r.module_type, r.enabled, r.active_adapters) for r in yours
    ]
    assert mine[0].available_adapters == ["default"]  # whatever the class has called its tensors
    assert vars(ours.get_model_status()) == vars(theirs.get_model_status())


def test_what_cannot_work_says_so() -> None:
    ours, _ = pair("lstm")
    out = ours(X)
    with pytest.raises(NotMergeable, match="MyLoraLSTMLayer"):
        ours.merge_adapter()
    assert not ours.base_model.model.lin.merged_adapters  # all layers or none
    with pytest.raises(ValueError, match="MyLoraLSTMLayer"):
        ours(X, adapter_names=["default"] * 3)
    with pytest.raises(ValueError, match="class of its own"):
        ours.add_weighted_adapter(["default"], [1.0], "sum")
    near(ours(X), out)
    wrong = trimtab.LoraConfig(target_modules=["lstm"])
    wrong._register_custom_module({nn.LSTM: nn.LSTM})
    with pytest.raises(ConfigError, match="LoraLayer"):
        trimtab.get_peft_model(model := Model(), wrong)
    assert type(model.lstm) is nn.LSTM


def test_a_failed_start_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    ours, _ = pair("lstm")
    ours.save_pretrained(tmp_path)
    model, own = Model(), config(0, "lstm", r=5)
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError):
        quiet(trimtab.PeftModel.from_pretrained, model, tmp_path, config=own)
    assert type(model.lstm) is nn.LSTM
    all_near(model.state_dict(), state)
    assert all(p.requires_grad for p in model.parameters())


def test_half_precision_as_peft() -> None:
    found = []
    for which, library in enumerate(BOTH):
        torch.manual_seed(0)
        model = quiet(library.get_peft_model, Model().bfloat16(), config(which, "standard"))
        found.append({n: p.dtype for n, p in model.named_parameters()})
    assert found[0] == found[1]


def test_copies_and_subclasses_of_the_registered_type() -> None:
    class Own(nn.LSTM):
        pass

    ours, _ = pair("lstm")
    twin = copy.deepcopy(ours)
    near(twin(X), ours(X))
    with twin.disable_adapter():
        assert twin.base_model.model.lstm.disable_adapters
        assert not ours.base_model.model.lstm.disable_adapters
    for which, library in enumerate(BOTH):
        model = Model()
        model.lstm = Own(6, 7)
        quiet(library.get_peft_model, model, config(which, "lstm"))
        assert type(model.lstm).__name__ == "MyLoraLSTMLayer"
