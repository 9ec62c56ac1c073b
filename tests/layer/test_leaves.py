"""Containers of adapters' tensors as modules: they are in training mode when their layer is."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import torch
from torch import nn

from tests.models import toy
from trimtab import LoraConfig, PeftModel, get_peft_model

CONFIG = LoraConfig(r=2, target_modules=["up", "head"])


def adapted() -> PeftModel:
    return get_peft_model(toy(), CONFIG)


def modes(model: nn.Module) -> set[bool]:
    return {module.training for module in model.modules()}


def test_every_module_of_a_model_has_its_mode() -> None:
    model = adapted()
    model.add_adapter("second", CONFIG)
    for mode in (False, True, False):
        assert model.train(mode) is model
        assert modes(model) == {mode}
    model.add_adapter("third", CONFIG)
    assert modes(model) == {False}
    for twin in (copy.deepcopy(model), pickled(model)):
        twin.train()
        assert (modes(twin), modes(model)) == ({True}, {False})


def pickled(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    twin: nn.Module = torch.load(buffer, weights_only=False)
    return twin


def test_what_others_put_among_them_is_told_the_mode() -> None:
    model = adapted()
    layer = model.base_model.model.up
    layer.lora_A.add_module("foreign", nn.Sequential(nn.Dropout(0.5)))
    layer.other = nn.Dropout(0.5)
    for mode in (False, True):
        model.train(mode)
        assert modes(model) == {mode}


def test_a_leaf_that_is_copied_by_itself_takes_nothing_of_the_model_along() -> None:
    leaf = copy.deepcopy(adapted().base_model.model.up.lora_A["default"])
    assert type(leaf.train(False)).__name__ == "LinearLeaf"
    assert not leaf.training
    buffer = io.BytesIO()
    torch.save(leaf, buffer)
    assert buffer.tell() < 10_000


def test_a_loaded_adapter_leaves_no_part_of_the_model_in_training_mode(tmp_path: Path) -> None:
    model = adapted().eval()
    model.save_pretrained(tmp_path)
    model.base_model.model.up.base_layer.train()
    model.load_adapter(tmp_path, "loaded")
    assert modes(model) == {False}
    model.load_adapter(tmp_path, "trained", is_trainable=True)
    assert modes(model) == {False}
