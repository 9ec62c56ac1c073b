"""Others change a model after adapters came into it; before each step it is seen as it is then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from tests.models import gpt2, llama, logits, tokens, toy
from trimtab import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model

ROWS = 80


def lora(*targets: str, **fields: Any) -> LoraConfig:
    return LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False, **fields)


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "embed_tokens"], ["q_proj", "lm_head"]], ids=str)
@pytest.mark.parametrize("tie", [False, True])
def test_a_resized_vocabulary_is_saved_and_loads_again(targets: list[str], tie: bool, tmp_path: Path) -> None:
    model = get_peft_model(llama(tie_word_embeddings=tie), lora("q_proj"))
    model.resize_token_embeddings(ROWS)
    if targets != ["q_proj"]:
        model.add_adapter("new", lora(*targets))
        model.set_adapter("new")
    ids = tokens(vocabulary=ROWS)
    wanted = logits(model.eval(), ids)
    assert wanted.shape[-1] == ROWS
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    base = llama(tie_word_embeddings=tie)
    base.resize_token_embeddings(ROWS)  # to rows of its own: those of the file count
    folder = tmp_path / "new" if targets != ["q_proj"] else tmp_path
    assert torch.equal(logits(PeftModel.from_pretrained(base, folder).eval(), ids), wanted)


def test_resized_embeddings_are_taken_along_unasked(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, lora("q_proj"))
    base.resize_token_embeddings(ROWS)
    with pytest.warns(UserWarning, match="has been resized"):
        model.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    ids = tokens(vocabulary=ROWS)
    assert torch.equal(logits(again, ids), logits(model.eval(), ids))


@pytest.mark.parametrize("first", [{"target_modules": ["q_proj"]}, {"target_modules": ["q_proj", "lm_head"]}], ids=str)
@pytest.mark.parametrize("second", [["q_proj"], ["lm_head"], ["q_proj", "lm_head"]], ids=str)
def test_an_exchanged_head_stays_when_another_adapter_comes(first: dict[str, Any], second: list[str]) -> None:
    base = llama()
    model = get_peft_model(base, LoraConfig(r=2, **first))
    torch.manual_seed(3)
    base.lm_head = head = nn.Linear(16, 40, bias=False)
    model.add_adapter("second", lora(*second))
    model.set_adapter("second")
    assert logits(model.eval(), tokens()).shape[-1] == 40
    model.delete_adapter("default")
    model.delete_adapter("second")
    assert base.lm_head is head
    assert logits(base, tokens()).shape[-1] == 40


def test_a_head_trained_whole_that_was_exchanged() -> None:
    base = llama()
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    base.lm_head = head = nn.Linear(16, 40, bias=False)
    model.add_adapter("second", lora("q_proj"))
    assert base.lm_head is head
    model.delete_adapter("default")
    assert base.lm_head is head
    assert model.unload() is base
    assert base.lm_head is head


@pytest.mark.parametrize("keep", [True, False], ids=["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("adapted", [True, False])
def test_a_module_that_was_replaced_is_left_out_of_the_merge(keep: bool, adapted: bool) -> None:
    net = toy()
    model = get_peft_model(net, lora("up", "down"))
    torch.manual_seed(4)
    name = "up" if adapted else "head"
    other = nn.Linear(6, 10 if adapted else 7, bias=adapted)
    setattr(net, name, other)
    before = other.weight.detach().clone()
    wanted = logits(model.eval(), tokens())
    if keep:
        model.merge_adapter()
    else:
        assert model.merge_and_unload() is net
    assert getattr(net, name) is other
    assert torch.equal(other.weight, before)
    torch.testing.assert_close(logits(net, tokens()), wanted)
    if keep:
        model.unmerge_adapter()
        assert torch.equal(logits(model, tokens()), wanted)


def test_a_module_that_was_added_is_adapted_by_what_comes_later() -> None:
    base = llama()
    model = get_peft_model(base, lora("q_proj"))
    base.model.layers.append(llama(5, num_hidden_layers=1).model.layers[0])
    base.model.layers[2].self_attn.layer_idx = 2
    base.config.num_hidden_layers = 3
    model.add_adapter("second", lora("q_proj"))
    model.set_adapter("second")
    layers = [name for name in dict(model.named_parameters()) if "lora_A.second" in name]
    assert sum(".layers.2." in name for name in layers) == 1
    wanted = logits(model.eval(), tokens())
    torch.testing.assert_close(logits(model.merge_and_unload(), tokens()), wanted)


def test_a_module_that_was_taken_out_is_not_saved(tmp_path: Path) -> None:
    base = llama()
    model = get_peft_model(base, lora("q_proj"))
    del base.model.layers[1]
    base.config.num_hidden_layers = 1
    with pytest.warns(UserWarning, match="not in the model any more.*layers.1.self_attn.q_proj"):
        model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(num_hidden_layers=1), tmp_path)
    keys = [name for name in dict(again.named_parameters()) if "lora_A" in name]
    assert len(keys) == 1
    assert torch.equal(again.get_parameter(keys[0]), model.get_parameter(keys[0]))


@pytest.mark.parametrize("when", ["before", "after"])
def test_ties_that_others_made_or_cut(when: str) -> None:
    base = gpt2() if when == "before" else llama()
    model = get_peft_model(base, lora("q_proj" if when == "after" else "c_attn"))
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    if when == "before":  # tied when the adapter came, not any more
        head.weight = nn.Parameter(head.weight.detach().clone())
        base.config.tie_word_embeddings = False
    else:
        head.weight = embedding.weight
        base.config.tie_word_embeddings = True
    model.add_adapter("second", lora("lm_head"))
    model.set_adapter("second")
    wanted, old = logits(model.eval(), tokens()), embedding.weight.detach().clone()
    model.merge_adapter()
    torch.testing.assert_close(logits(model, tokens()), wanted)
    assert torch.equal(base.get_input_embeddings().weight, old)  # the head alone was adapted
    model.unmerge_adapter()
    assert torch.equal(logits(model, tokens()), wanted)
    tied = base.get_output_embeddings().weight is base.get_input_embeddings().weight
    assert tied == (when == "after")


def test_an_exchanged_head_of_the_same_size_is_saved_as_it_is(tmp_path: Path) -> None:
    base = llama()
    model = get_peft_model(base, lora("q_proj"))
    base.lm_head = nn.Linear(16, 64, bias=False)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    again = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(again.get_base_model().lm_head.weight, base.lm_head.weight)
