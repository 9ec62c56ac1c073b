"""Every method whose rows can share a batch comes out of training at once as it does alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from trimtab import Job, PeftModel, get_peft_model, train_many
from trimtab.errors import ConfigError
from trimtab.methods import METHODS, capabilities, config_class, load, method_class
from trimtab.train.batches import Batches
from trimtab.train.data import encode_rows
from trimtab.train.events import MethodSteps, Schedule
from trimtab.train.loop import train

ROWS = [{"prompt": f"{i}+{i}=", "completion": f"{2 * i}."} for i in range(10, 20)]  # of one length: nothing is padded
# What the tiny model needs beside a method's own example; of the tokens, "=" invokes.
FIELDS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 6, "tinit": 1, "tfinal": 1},
    "ADAPTION_PROMPT": {"adapter_layers": 2},
    "C3A": {"block_size": 16},
    "DYLORA": {"r": 4},
    "FOURIERFT": {"n_frequency": 50},
    "LORA (alora_invocation_tokens)": {"alora_invocation_tokens": [28]},
    "LOREFT": {"positions": "f1+l2"},
    "MISS": {"r": 8},
    "PSOFT": {"r": 8},
    "ROAD": {"group_size": 16},
    "SHIRA": {"r": 4},
    "VBLORA": {"vector_length": 16},
    "WAVEFT": {"n_frequency": 50},
}
NAMES = [f.method for f in capabilities() if "model" not in f.kinds]
NAMES = [n for n in NAMES if n not in ("BITFIT", "LORA (arrow_config)")]  # nothing to train here; has nothing by itself


def fields(name: str) -> dict[str, Any]:
    kind, _, field = name.partition(" ")
    file, cls, _ = METHODS[kind]
    place = load(file, "VARIANTS")[field.strip("()")].split(":") if field else (file, cls)
    return {**load(*place).example, **FIELDS.get(name, {})}


@pytest.mark.parametrize("name", NAMES)
def test_each_comes_out_as_alone(model_factory, tokenizer, name: str) -> None:
    rows = encode_rows(ROWS, tokenizer)
    config = config_class(name.partition(" ")[0])

    def jobs() -> list[Job]:
        made = lambda: config(task_type="CAUSAL_LM", **copy.deepcopy(fields(name)))
        more: dict[str, Any] = {"accumulate": 2, "max_steps": 4}
        return [
            Job(f"job{i}", made(), Batches(rows, 2, seed=i, **more), rate, seed=i, events=[MethodSteps()])
            for i, rate in enumerate([1e-3, 1e-2])
        ]

    if method_class(jobs()[0].config).mutates(jobs()[0].config):
        with pytest.raises(ConfigError, match="'job0' and 'job1' start by changing the base's weights"):
            train_many(model_factory().double(), jobs())
        return
    results = train_many(model_factory().double(), jobs())
    for one in jobs():
        base = model_factory().double()
        torch.manual_seed(one.seed)
        model: PeftModel = get_peft_model(base, one.config, adapter_name=one.name)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], one.learning_rate)
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.0
        found = train(model, one.batches, optimizer, [Schedule(), MethodSteps()], seed=one.seed)
        assert [x for _, x in results[one.name].losses] == pytest.approx([x for _, x in found.losses], rel=1e-9)
        own = {n: p for n, p in model.named_parameters() if one.name in n.split(".")}
        many = dict(results.model.named_parameters())
        assert own
        for key, value in own.items():
            torch.testing.assert_close(many[key], value, rtol=0, atol=1e-9, msg=lambda m, k=key: f"{k}: {m}")
