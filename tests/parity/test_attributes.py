"""Attributes of a layer by which scripts look at an adapter: those of PEFT's layers, with the same values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import peft
import pytest
import torch
from torch import nn

import trimtab
from tests.parity.models import build

LORA = [
    "r", "lora_alpha", "scaling", "lora_dropout", "use_dora", "use_rslora", "lora_bias", "fan_in_fan_out", "in_features",
    "out_features", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "merged_adapters", "active_adapters",
    "disable_adapters",
]  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "lora": ("LoraConfig", {"r": 4, "lora_dropout": 0.25, "use_rslora": True}, LORA),
    "lora, dry": ("LoraConfig", {"r": 4, "lora_bias": True}, LORA),
    "dora": ("LoraConfig", {"r": 4, "use_dora": True}, LORA[:10]),
    "loha": ("LoHaConfig", {"r": 4, "rank_dropout": 0.5}, ["r", "alpha", "scaling", "rank_dropout", "module_dropout", "hada_t1"]),
    "lokr": ("LoKrConfig", {"r": 4}, ["r", "alpha", "rank_dropout", "module_dropout", "lokr_t2"]),
    "oft": ("OFTConfig", {"r": 0, "oft_block_size": 4}, ["oft_block_size"]),
    "boft": ("BOFTConfig", {"boft_block_size": 2}, ["boft_block_size"]),
    "vera": ("VeraConfig", {"r": 4, "vera_dropout": 0.5}, ["r", "vera_dropout"]),
    "road": ("RoadConfig", {"group_size": 2}, ["variant", "group_size"]),
    "shira": ("ShiraConfig", {"r": 2}, ["r"]),
}  # fmt: skip


def plain(value: Any) -> Any:
    """A value without the classes that it is made of."""
    if isinstance(value, nn.Dropout):
        return value.p
    if isinstance(value, nn.Identity):
        return 0.0
    if isinstance(value, Mapping | nn.ModuleDict | nn.ParameterDict):
        return {name: plain(value[name]) for name in value}
    return str(value) if isinstance(value, str) else value


def layer(library: Any, name: str, fields: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    model = library.get_peft_model(build("llama"), getattr(library, name)(target_modules=["q_proj"], **fields))
    return next(m for path, m in model.named_modules() if path.endswith("q_proj"))


@pytest.mark.parametrize(("name", "fields", "attributes"), CASES.values(), ids=CASES)
def test_settings(name: str, fields: dict[str, Any], attributes: list[str]) -> None:
    mine, theirs = (layer(library, name, fields) for library in (trimtab, peft))
    shown = {a: plain(getattr(mine, a)) for a in attributes}
    assert shown == {a: plain(getattr(theirs, a)) for a in attributes}
    assert torch.equal(mine.get_base_weight(), theirs.get_base_weight())


def test_dropout_of_a_layer_can_be_changed() -> None:
    results = []
    for library in (trimtab, peft):
        at = layer(library, "LoraConfig", {"r": 4, "lora_dropout": 0.5, "init_lora_weights": False}).train()
        x = torch.ones(1, 3, at.in_features)
        assert not torch.equal(at(x), at(x))
        at.lora_dropout["default"].p = 0.0
        assert torch.equal(at(x), at(x))
        at.lora_dropout["default"] = nn.Dropout(0.5)
        results.append(torch.equal(at(x), at(x)))
    assert results == [False, False]
