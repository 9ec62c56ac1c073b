"""Adapters on quantised layers: PEFT's outputs, gradients, counts, files, and merges where PEFT's are right."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup
from transformers import TorchAoConfig

import trimtab
from tests.parity.pairs import near, parameters, quiet, stir, trainable
from tests.quantised import FORMATS, inputs, net, quantise
from trimtab.formats import weights
from trimtab.layer.spelling import fold

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "bias": {"lora_bias": True},
}
# What PEFT 0.21.2 can do at all: lora_bias raises on torchao's tensors.
PAIRS = [(n, k) for n in FORMATS for k in KINDS if not (n.startswith("torchao") and k == "bias")]
each = pytest.mark.parametrize(("name", "kind"), PAIRS)
AO = {
    "torchao-int8": Int8WeightOnlyConfig(),
    "torchao-int4": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
}
REPACKS = "support_avx512bf16_for_cpu"


def base(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The quantised net with the marks by which PEFT knows a quantised model.

    It computes alike on every processor: see `test_evaluation_before_training` for what PEFT does on the newest.
    """
    model: Any = net(name, dtype=dtype)
    if hasattr(model.up, REPACKS):
        setattr(model.up, REPACKS, False)
    if name in AO:
        model.hf_quantizer = SimpleNamespace(quantization_config=TorchAoConfig(AO[name]))
        model.config = SimpleNamespace(to_dict=dict)
    else:
        model.is_loaded_in_8bit, model.is_loaded_in_4bit = name == "bnb-int8", name != "bnb-int8"
    return model


def fields(kind: str) -> dict[str, Any]:
    """The config of both."""
    return {"r": 4, "lora_alpha": 16, "target_modules": ["up"], **KINDS[kind]}


def pair(name: str, kind: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """(ours, theirs), holding the same numbers under the same names."""
    theirs = quiet(peft.get_peft_model, base(name, dtype), peft.LoraConfig(**fields(kind)))
    stir(theirs)
    ours = quiet(trimtab.get_peft_model, base(name, dtype), trimtab.LoraConfig(**fields(kind)))
    wanted = parameters(theirs)
    assert wanted.keys() == parameters(ours).keys()
    with torch.no_grad():
        for key, parameter in parameters(ours).items():
            if parameter.requires_grad:
                parameter.copy_(wanted[key])
    return ours, theirs


def up(model: Any) -> Any:
    """The quantised layer."""
    return model.get_submodule("base_model.model.up").base_layer


def numbers(model: Any) -> torch.Tensor:
    """Its plain numbers."""
    return weights.read(up(model), up(model).weight)


@each
def test_names_and_counts(name: str, kind: str) -> None:
    """Adapters are fp32 with PEFT's names and shapes, and count alike."""
    ours, theirs = pair(name, kind)
    mine, other = parameters(ours), parameters(theirs)
    assert {n: (p.shape, p.dtype) for n, p in mine.items()} == {n: (p.shape, p.dtype) for n, p in other.items()}
    assert trainable(ours) == trainable(theirs)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()


@each
def test_outputs_and_gradients(name: str, kind: str) -> None:
    """Outputs and gradients are PEFT's, in training and in evaluation."""
    ours, theirs = pair(name, kind)
    near(ours.eval()(inputs()), theirs.eval()(inputs()))
    _, theirs = pair(name, kind)  # anew: PEFT's DoRA on a bitsandbytes int8 layer fails at its second forward
    results = []
    for model in (ours.train(), theirs.train()):
        x = inputs().requires_grad_()
        model(x).square().mean().backward()
        results.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None} | {"x": x.grad})
    assert results[0].keys() == results[1].keys()
    for key, gradient in results[1].items():
        near(results[0][key], gradient)


def test_evaluation_before_training() -> None:
    """With AVX512-BF16, evaluating a 4-bit model takes the gradients below its last layer from PEFT, never from us.

    The layers have no bias: with one, PEFT's backward pass fails.
    """
    found = []
    for library, evaluate in ((trimtab, False), (trimtab, True), (peft, False), (peft, True)):
        torch.manual_seed(0)
        net: Any = nn.Sequential(*(quantise(nn.Linear(64, 64, bias=False), "bnb-nf4") for _ in range(2)))
        net.is_loaded_in_4bit, net.is_loaded_in_8bit = True, False
        model = quiet(library.get_peft_model, net, library.LoraConfig(r=4, target_modules=["0", "1"]))
        for parameter in (p for p in model.parameters() if p.requires_grad):
            nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(len(parameter)))
        if evaluate:
            with torch.no_grad():
                model.eval()(inputs())
        model.train()(inputs()).square().sum().backward()
        found.append(parameters(model)["base_model.model.0.lora_A.default.weight"].grad)
    assert torch.equal(found[0], found[1])
    near(found[0], found[2])
    lost = ((found[3] - found[2]).norm() / found[2].norm()).item()
    assert lost > 0.3 if has_avx512bf16() else lost == 0


@each
def test_half_precision(name: str, kind: str) -> None:
    """On a bf16 base the output has PEFT's number format and, to its precision, its numbers."""
    ours, theirs = pair(name, kind, torch.bfloat16)
    x = inputs(dtype=torch.bfloat16)
    near(ours(x), theirs(x), tolerance=2e-2)


@each
def test_merge(name: str, kind: str) -> None:
    """The merged weight is as near to the exact one as PEFT's or nearer; and the merged bias is right."""
    ours, theirs = pair(name, kind)
    x = inputs()
    before = ours(x)
    layer = ours.get_submodule("base_model.model.up")
    ((W, b),) = fold(layer.methods["default"]).values()
    ours.merge_adapter()
    quiet(theirs.merge_adapter)
    mine, other = (numbers(m) - W for m in (ours, theirs))
    wrong = kind == "dora" and name in AO  # D2-4
    if not wrong and name != "bnb-int8":  # whose rounding starts at fp16, like ours
        near(numbers(ours), numbers(theirs), 0.05)
    assert mine.norm() <= 1.02 * other.norm()
    if b is not None:
        near(up(ours).bias, b)
    if kind == "bias":  # D2-5: PEFT forgets the scale
        assert (up(theirs).bias - b).abs().max() > 0.1
    if wrong:
        assert other.norm() > 3 * mine.norm()
    assert (ours(x) - before).norm() < (0.02 if "int8" in name else 0.25) * before.norm()


@each
def test_unmerge(name: str, kind: str) -> None:
    """Ours gives back the base bit by bit; PEFT's rounds twice, which shows that the test can see it."""
    ours, theirs = pair(name, kind)
    W = numbers(ours)
    lost = []
    for model in (ours, theirs):
        quiet(model.merge_adapter)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.unmerge_adapter()
        lost.append((numbers(model) - W).abs().max().item())
    assert lost[0] == 0
    if name.startswith("bnb-nf4"):
        assert lost[1] > 0


@each
def test_files(name: str, kind: str, tmp_path: Path) -> None:
    """An adapter trained on a quantised base goes both ways through a file."""
    ours, theirs = pair(name, kind)
    x = inputs()
    ours.save_pretrained(tmp_path / "ours")
    quiet(theirs.save_pretrained, str(tmp_path / "theirs"))
    there = quiet(peft.PeftModel.from_pretrained, base(name), str(tmp_path / "ours"))
    here = quiet(trimtab.PeftModel.from_pretrained, base(name), str(tmp_path / "theirs"))
    near(there.eval()(x), theirs.eval()(x))
    near(here.eval()(x), ours.eval()(x))


def test_safe_merge_of_a_bias() -> None:
    """D2-5: where PEFT's safe merge of lora_bias on a bitsandbytes layer crashes, ours checks and merges."""
    for name in ("bnb-int8", "bnb-nf4"):
        ours, theirs = pair(name, "bias")
        with pytest.raises(RuntimeError, match="ambiguous"):
            quiet(theirs.merge_adapter, safe_merge=True)
        before = ours(inputs())
        ours.merge_adapter(safe_merge=True)
        assert (ours(inputs()) - before).norm() < 0.25 * before.norm()
        ours.unmerge_adapter()
        with torch.no_grad():
            nn.init.constant_(ours.get_submodule("base_model.model.up").lora_B["default"].bias, float("nan"))
        with pytest.raises(ValueError, match="NaNs detected"):
            ours.merge_adapter(safe_merge=True)
