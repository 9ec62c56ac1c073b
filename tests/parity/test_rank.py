"""Conversion, intruder dimensions and resized files against the installed peft."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.intruders import reduce_intruder_dimension as theirs_reduce

import trimtab
from tests.parity.models import build
from tests.parity.pairs import adapt, config_file, load, near, pair, quiet, run, stir, weights_file

METHODS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "loha": ("llama", "LoHaConfig", {"r": 2, "target_modules": ["q_proj", "up_proj"]}),
    "loha and a head": ("llama_seq", "LoHaConfig", {"r": 2, "target_modules": ["q_proj"], "task_type": "SEQ_CLS"}),
    "vera": ("llama", "VeraConfig", {"r": 3, "target_modules": ["q_proj", "down_proj"]}),
    "lora": ("llama", "LoraConfig", {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "up_proj"]}),
    "lora on conv1d": ("gpt2", "LoraConfig", {"r": 3, "target_modules": ["c_attn", "c_fc"]}),
}


def both(case: str, folder: Path) -> tuple[Any, Any, str]:
    """(ours, theirs) with one adapter, by a folder that theirs wrote; and the model's name."""
    name, config, fields = METHODS[case]
    torch.manual_seed(11)
    theirs = quiet(peft.get_peft_model, build(name), quiet(getattr(peft, config), **fields))
    stir(theirs)
    theirs.save_pretrained(folder)
    return load(trimtab, name, folder), theirs.eval(), name


def products(config: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """{layer: s·B·A}."""
    found = {}
    for key, A in tensors.items():
        if key.endswith(".lora_A.weight"):
            path = key.removesuffix(".lora_A.weight")
            r = len(A)
            module = path.removeprefix("base_model.model.")
            assert config.rank_pattern.get(module, config.r) == r
            assert config.alpha_pattern.get(module, config.lora_alpha) == r
            found[path] = tensors[f"{path}.lora_B.weight"] @ A
    return found


@pytest.mark.parametrize("theirs", [peft.convert_to_lora, peft.save_as_lora, theirs_reduce])
def test_arguments_are_theirs(theirs: Any) -> None:
    ours, wanted = (inspect.signature(f).parameters for f in (getattr(trimtab, theirs.__name__), theirs))
    assert [(p.name, p.default) for p in ours.values()] == [(p.name, p.default) for p in wanted.values()]


# ---------------------------------------------------------------------- conversion
@pytest.mark.parametrize("rank", [1, 3, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("case", METHODS)
def test_conversion_is_theirs(case: str, rank: Any, tmp_path: Path) -> None:
    ours, theirs, _ = both(case, tmp_path)
    (own, mine), (config, wanted) = trimtab.convert_to_lora(ours, rank), peft.convert_to_lora(theirs, rank)
    assert mine.keys() == wanted.keys()
    found, expected = products(own, mine), products(config, wanted)
    assert found.keys() == expected.keys()
    for path, D in expected.items():
        near(found[path], D)
    for key in mine.keys() - {f"{p}.lora_{x}.weight" for p in found for x in "AB"}:
        near(mine[key], wanted[key])


@pytest.mark.parametrize("rank", [3, 0.9])
@pytest.mark.parametrize("case", METHODS)
def test_converted_files_are_read_by_both(case: str, rank: Any, tmp_path: Path) -> None:
    ours, theirs, name = both(case, tmp_path / "old")
    trimtab.save_as_lora(tmp_path / "ours", ours, rank)
    peft.save_as_lora(tmp_path / "theirs", theirs, rank)
    outputs = [run(load(library, name, tmp_path / f), name) for library in (trimtab, peft) for f in ("ours", "theirs")]
    for output in outputs[1:]:
        near(output, outputs[0], 1e-4)
    assert weights_file(tmp_path / "ours").keys() == weights_file(tmp_path / "theirs").keys()


def test_what_they_lose_in_conversion_we_keep(tmp_path: Path) -> None:
    """DoRA's magnitudes; the task and the base's name."""
    fields = {"r": 3, "use_dora": True, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"}
    ours, theirs = pair("llama", fields)
    trimtab.save_as_lora(tmp_path / "ours", ours.eval(), 1.0)
    peft.save_as_lora(tmp_path / "theirs", theirs.eval(), 16)
    near(run(load(peft, "llama", tmp_path / "ours"), "llama"), run(theirs, "llama"), 1e-4)
    assert (run(load(peft, "llama", tmp_path / "theirs"), "llama") - run(theirs, "llama")).abs().max() > 0.1
    assert (config_file(tmp_path / "ours")["task_type"], config_file(tmp_path / "theirs")["task_type"]) == (
        "CAUSAL_LM",
        None,
    )


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        ("OFTConfig", {"oft_block_size": 4, "target_modules": ["q_proj"]}),
        ("IA3Config", {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
        ("AdaLoraConfig", {"init_r": 3, "target_r": 2, "total_step": 9, "target_modules": ["q_proj"]}),
        ("LoraConfig", {"r": 2, "target_modules": ["embed_tokens"]}),
    ],
)
def test_what_they_cannot_convert_they_read_from_us(config: str, fields: dict[str, Any], tmp_path: Path) -> None:
    theirs = quiet(peft.get_peft_model, build("llama"), quiet(getattr(peft, config), **fields))
    stir(theirs)
    quiet(theirs.save_pretrained, tmp_path / "old")
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        peft.convert_to_lora(theirs, 2)
    trimtab.save_as_lora(tmp_path / "new", load(trimtab, "llama", tmp_path / "old"), 1.0)
    near(run(load(peft, "llama", tmp_path / "new"), "llama"), run(theirs.eval(), "llama"), 1e-4)


# ---------------------------------------------------------------------- intruder dimensions
def deltas(model: Any, name: str) -> dict[str, Any]:
    found = {}
    for path, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            found[path] = module.get_delta_weight(name).detach()
    return found


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.75, 1.0])
@pytest.mark.parametrize("target", [["q_proj", "down_proj"], ["up_proj"]])
def test_intruders_are_reduced_as_theirs(target: list[str], keep: float) -> None:
    ours, theirs = pair("llama", {"r": 3, "lora_alpha": 6, "target_modules": target})
    for model in (ours, theirs):
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data *= 6
    settings = {"top_k": 6, "threshold_epsilon": 0.6, "mitigation_lambda": keep, "logging_sink": None}
    report = trimtab.reduce_intruder_dimension(ours, **settings)
    theirs_reduce(theirs, **settings)
    assert sum(x.intruders for x in report) > 0
    assert ours.active_adapters == theirs.active_adapters == ["intruder_reduced"]
    mine, wanted = deltas(ours, "intruder_reduced"), deltas(theirs, "intruder_reduced")
    assert mine.keys() == wanted.keys()
    for path, D in wanted.items():
        near(mine[path], D, 2e-5)


# ---------------------------------------------------------------------- resized files
RESIZED: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("llama", {"r": 6, "lora_alpha": 9, "target_modules": "all-linear"}),
    "rslora and patterns": (
        "llama",
        {
            "r": 6, "lora_alpha": 9, "use_rslora": True, "rank_pattern": {"up_proj": 5},
            "alpha_pattern": {"q_proj": 3}, "target_modules": ["q_proj", "up_proj", "embed_tokens"],
        },
    ),
    "dora": ("llama", {"r": 6, "use_dora": True, "target_modules": ["q_proj", "up_proj"]}),
    "bias and head": ("llama_seq", {"r": 6, "lora_bias": True, "target_modules": ["q_proj"], "task_type": "SEQ_CLS"}),
    "conv1d": ("gpt2", {"r": 6, "target_modules": ["c_attn", "c_fc"]}),
    "convolutions": ("conv", {"r": 6, "target_modules": ["one", "two", "point"]}),
    "groups": ("conv_groups", {"r": 6, "target_modules": ["one", "two"]}),
    "attention": ("attention", {"r": 6, "target_modules": ["self_attn"]}),
    "experts": ("mixtral", {"r": 6, "target_modules": ["q_proj"],
                            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
                            "rank_pattern": {"experts.gate_up_proj": 8}}),
    "flipped experts": ("gpt_oss", {"r": 4, "target_modules": [],
                                    "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
}  # fmt: skip


@pytest.mark.parametrize("chosen", [{"rank": 2}, {"rank": 12}, {"energy": 0.9}, {"global_energy": 0.7}], ids=str)
@pytest.mark.parametrize("case", RESIZED)
def test_a_file_of_theirs_resized_means_the_same_to_both(case: str, chosen: dict[str, Any], tmp_path: Path) -> None:
    name, fields = RESIZED[case]
    theirs = adapt(peft, name, fields)
    stir(theirs)
    quiet(theirs.save_pretrained, tmp_path / "old")
    report = trimtab.resize_adapter(tmp_path / "old", **chosen, output=tmp_path / "new")
    assert {x.rank for x in report.layers} != {fields["r"]}
    a, b = (run(load(library, name, tmp_path / "new"), name) for library in (trimtab, peft))
    near(a, b, 1e-4)
    if chosen == {"rank": 12}:
        near(b, run(theirs.eval(), name), 1e-4)
