"""X-LoRA against PEFT: outputs, gradients, generation, the log of weights, files.

PEFT's adapters are called 0, 1 ... whatever the config calls them, and its forward works only where that is the same.
Its base must have `use_cache=False`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import trimtab
from tests.parity.models import batch, build
from tests.parity.pairs import BOTH, config_file, near, quiet, stir, weights_file

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "layers": {"layerwise_scalings": True, "softmax_temperature": 0.3},
    "deep": {"xlora_depth": 3, "xlora_size": 10, "scaling_pass_value": 0.4},
    "logits": {"enable_softmax": False, "global_scaling_weight": 1.7, "scaling_pass_value": 0.5},
    "top": {"top_k_lora": 2, "layerwise_scalings": True},
    "softmax-top": {"top_k_lora": 2, "enable_softmax": False, "enable_softmax_topk": True},
}
every = pytest.mark.parametrize("case", CASES)
EXPERTS = [["q_proj", "v_proj"], ["q_proj", "down_proj"], ["embed_tokens", "v_proj"]]


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Three LoRA adapters of different layers and ranks: {name: folder}."""
    root, found = tmp_path_factory.mktemp("experts"), {}
    for i, targets in enumerate(EXPERTS):
        config = peft.LoraConfig(r=2 + i, lora_alpha=5, target_modules=targets, task_type="CAUSAL_LM")
        model = quiet(peft.get_peft_model, build("llama"), config)
        stir(model, 0.2 + 0.1 * i)
        found[str(i)] = str(root / str(i))
        quiet(model.save_pretrained, found[str(i)], save_embedding_layers=False)
    return found


def base() -> Any:
    model: Any = build("llama")
    model.config.use_cache = False
    return model


def adapt(library: Any, case: str, experts: dict[str, str]) -> Any:
    config = quiet(library.XLoraConfig, task_type="CAUSAL_LM", hidden_size=16, adapters=experts, **CASES[case])
    return quiet(library.get_peft_model, base(), config)


def network(model: Any) -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if "internal_xlora_classifier" in n}


def pair(case: str, experts: dict[str, str]) -> tuple[Any, Any]:
    ours, theirs = (adapt(library, case, dict(experts)) for library in BOTH)
    mine, yours = network(ours), network(theirs)
    assert mine.keys() == yours.keys()
    stir(theirs, 0.5)
    with torch.no_grad():
        for name, parameter in yours.items():
            mine[name].copy_(parameter)
    return ours.eval(), theirs.eval()


@every
def test_outputs_gradients_and_weights(case: str, experts: dict[str, str]) -> None:
    results = []
    for model in pair(case, experts):
        model.enable_scalings_logging()
        out = model(**batch("llama"), labels=batch("llama")["input_ids"])
        out.loss.backward()
        results.append((out, {n: p.grad for n, p in network(model).items()}, model.get_latest_scalings()))
        assert len(model.get_scalings_log()) == 1
    (ours, mine, weights), (theirs, yours, wanted) = results
    near(ours.logits, theirs.logits)
    near(ours.loss, theirs.loss)
    assert weights.shape == wanted.shape
    for name, gradient in yours.items():
        near(mine[name], gradient)


@every
def test_generation(case: str, experts: dict[str, str]) -> None:
    ask = {**batch("llama"), "max_new_tokens": 4, "do_sample": False}
    for beams in (1, 2):
        ours, theirs = (model.generate(**ask, num_beams=beams) for model in pair(case, experts))
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("case", ["plain", "deep"])
def test_our_files_in_peft(case: str, experts: dict[str, str], tmp_path: Path) -> None:
    ours, _ = pair(case, experts)
    quiet(ours.save_pretrained, tmp_path)
    read = quiet(peft.PeftModel.from_pretrained, base(), str(tmp_path)).eval()
    near(read(**batch("llama")).logits, ours(**batch("llama")).logits)
    back = quiet(trimtab.PeftModel.from_pretrained, base(), str(tmp_path)).eval()
    near(back(**batch("llama")).logits, ours(**batch("llama")).logits)


@pytest.mark.parametrize("case", ["plain", "deep"])
def test_their_files_here(case: str, experts: dict[str, str], tmp_path: Path) -> None:
    """PEFT puts the first layer of the network into the file of the adapter called 0, and so cannot read it back."""
    ours, theirs = pair(case, experts)
    quiet(theirs.save_pretrained, str(tmp_path))
    assert not any("layers.0" in key for key in weights_file(tmp_path))
    read = quiet(trimtab.PeftModel.from_pretrained, base(), str(tmp_path)).eval()
    near(read(**batch("llama")).logits, theirs(**batch("llama")).logits)
    quiet(ours.save_pretrained, tmp_path / "ours")
    assert config_file(tmp_path / "ours") == config_file(tmp_path)


def test_fields(experts: dict[str, str]) -> None:
    ours, theirs = (quiet(library.XLoraConfig, hidden_size=16, adapters=experts).to_dict() for library in BOTH)
    assert {k: str(v) for k, v in ours.items()} == {k: str(v) for k, v in theirs.items()}
    assert {f.name for f in dataclasses.fields(trimtab.XLoraConfig)} == {
        f.name for f in dataclasses.fields(peft.XLoraConfig)
    }


def test_what_the_model_shows(experts: dict[str, str]) -> None:
    from peft.tuners.xlora import XLoraModel

    ours, theirs = pair("plain", experts)
    own = [n for n in vars(XLoraModel) if ("scaling" in n or "topk" in n) and not n.startswith("_")]
    assert len(own) > 5
    assert all(callable(getattr(ours, name)) for name in own)
    for model in (ours, theirs):
        model.enable_scalings_logging()
        for length in (6, 4, 6):
            model(input_ids=batch("llama")["input_ids"][:, :length])
        model.disable_scalings_logging()
        model(**batch("llama"))
    for (places, some), (others, same) in zip(
        ours.get_bucketed_scalings_log().values(), theirs.get_bucketed_scalings_log().values(), strict=True
    ):
        assert places == others
        for a, b in zip(some, same, strict=True):
            near(a, b)
    for model in (ours, theirs):
        model.clear_scalings_log()
        assert model.get_scalings_log() == []
        model.set_topk_lora(1)
        model.set_global_scaling_weight(0.5)
    near(ours(**batch("llama")).logits, theirs(**batch("llama")).logits)
    for model in (ours, theirs):
        model.set_topk_lora(None)
        model.set_scaling_pass_value(None)
    near(ours(**batch("llama")).logits, theirs(**batch("llama")).logits)


def test_the_pass_before_has_all_adapters(experts: dict[str, str]) -> None:
    """PEFT drops all but `top_k_lora` of them there, too, although their weights are equal: which, is chance."""
    whole, kept = {}, {}
    for model, name in zip(pair("deep", experts), ("ours", "theirs"), strict=True):
        model(**batch("llama"))
        whole[name] = model.get_latest_scalings()
        model.set_topk_lora(1)
        model(**batch("llama"))
        kept[name] = model.get_latest_scalings()
    assert torch.equal(whole["ours"], kept["ours"])
    assert not torch.allclose(whole["theirs"], kept["theirs"])
