"""LLaMA-Adapter against PEFT: starts, outputs, gradients, generation, files both ways."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

import trimtab
from tests.parity.pairs import BOTH, config_file, near, quiet, stir, weights_file
from tests.parity.test_prompts import sharp

BASES = ["llama", "mistral", "gpt2"]
X = {"input_ids": torch.tensor([[4, 9, 11, 7, 30], [8, 3, 21, 40, 6]]), "attention_mask": torch.ones(2, 5).long()}


def build(name: str) -> Any:
    if name != "mistral":
        return sharp(name)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64, "eos_token_id": None}
    return MistralForCausalLM(
        MistralConfig(num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, **sizes)
    ).eval()


def adapt(library: Any, name: str) -> Any:
    base = build(name)
    torch.manual_seed(11)
    config = library.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=2)
    return quiet(library.get_peft_model, base, config).eval()


def trained(model: Any) -> dict[str, Any]:
    """By the names that PEFT's have: it keeps one adapter in the tree, without its name."""
    return {n.removesuffix(".default"): p for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", BASES)
def test_everything(name: str, tmp_path: Path) -> None:
    ours, theirs = (adapt(library, name) for library in BOTH)
    mine, yours = trained(ours), trained(theirs)
    assert mine.keys() == yours.keys()
    assert all(torch.equal(mine[n].nan_to_num(), p.nan_to_num()) for n, p in yours.items())
    stir(theirs)
    with torch.no_grad():
        for n, p in yours.items():
            mine[n].copy_(p)
    for model in (ours, theirs):
        model(**X).logits.square().mean().backward()
    near(ours(**X).logits, theirs(**X).logits)
    for n, p in yours.items():
        near(mine[n].grad, p.grad)
    for beams in (1, 2):
        ask = {**X, "max_new_tokens": 4, "do_sample": False, "num_beams": beams}
        assert torch.equal(ours.generate(**ask), theirs.generate(**ask))
    for model, folder in ((ours, "0"), (theirs, "1")):
        model.save_pretrained(tmp_path / folder)
    assert config_file(tmp_path / "0") == config_file(tmp_path / "1")
    a, b = (weights_file(tmp_path / folder) for folder in "01")
    assert a.keys() == b.keys()
    for library, folder in ((trimtab, "1"), (peft, "0")):
        read = library.PeftModel.from_pretrained(copy.deepcopy(build(name)), tmp_path / folder).eval()
        near(read(**X).logits, theirs(**X).logits)


def test_fields() -> None:
    ours, theirs = (library.AdaptionPromptConfig().to_dict() for library in BOTH)
    assert {k: str(v) for k, v in ours.items()} == {k: str(v) for k, v in theirs.items()}
