"""Prompts of every kind against the installed peft: outputs, gradients, generation, files both ways."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import trimtab

SMALL = {"vocab_size": 64, "eos_token_id": None}
LLAMA = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, pad_token_id=0, **SMALL)  # fmt: skip
BASES = {
    "llama": (lambda: LlamaForCausalLM(LLAMA), "CAUSAL_LM"),
    "gpt2": (lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, pad_token_id=0, **SMALL)), "CAUSAL_LM"),
    "t5": (
        lambda: T5ForConditionalGeneration(
            T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0, **SMALL)
        ),
        "SEQ_2_SEQ_LM",
    ),
    "bert": (
        lambda: BertForSequenceClassification(
            BertConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
        ),
        "SEQ_CLS",
    ),
}
EXAMPLES = {"cpt_token_ids": [5, 9, 3, 8, 7], "cpt_tokens_type_mask": [1, 2, 3, 4, 4]}
METHODS = {
    "prompt": ("PromptTuningConfig", {}),
    "prefix": ("PrefixTuningConfig", {}),
    "encoded": ("PromptEncoderConfig", {"encoder_hidden_size": 16}),
    "encoded-lstm": ("PromptEncoderConfig", {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 16}),
    "cartridge": ("CartridgeConfig", {"num_frozen_tokens": 2}),
    "cartridge-free": ("CartridgeConfig", {"num_frozen_tokens": 0}),
    "multitask": ("MultitaskPromptTuningConfig", {"num_tasks": 3, "num_ranks": 2}),
    "cpt": ("CPTConfig", EXAMPLES),
    "cpt-decay": ("CPTConfig", {**EXAMPLES, "opt_weighted_loss_type": "decay", "opt_loss_decay_factor": 0.8}),
    "projected": ("PrefixTuningConfig", {"prefix_projection": True, "encoder_hidden_size": 16}),
}
TYPES = {"input_type_mask": torch.tensor([[1, 2, 4, 4], [2, 3, 4, 8]])}
# Arguments of the forward that only the method reads.
EXTRAS = {"multitask": {"task_ids": torch.tensor([2, 0])}, "cpt": TYPES, "cpt-decay": TYPES}
# What PEFT puts before a decoder is not in its own generation, nor in the paper: test_differences.py.
PAIRS = [
    (base, method)
    for base, (_, task) in BASES.items()
    for method in METHODS
    if (base, method) != ("t5", "multitask") and ("cpt" not in method or task == "CAUSAL_LM")
]
GENERATING = ["prompt", "prefix", "encoded", "multitask", "cpt", "cartridge"]
GENERATION = [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"repetition_penalty": 1.3}]


def sharp(name):
    """A tiny model whose logits are far apart, so that greedy choices do not hang on rounding."""
    torch.manual_seed(0)
    base = BASES[name][0]().eval()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(3)
    return base


def inputs(task, method=""):
    torch.manual_seed(1)
    ids = torch.randint(3, 60, (2, 4))
    extras = {k: v.clone() for k, v in EXTRAS.get(method, {}).items()}  # PEFT writes into some
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | extras
    if task == "SEQ_CLS":
        return batch | {"labels": torch.tensor([0, 1])}
    return (
        batch | {"labels": ids} | ({"decoder_attention_mask": torch.ones_like(ids)} if task == "SEQ_2_SEQ_LM" else {})
    )


@pytest.mark.parametrize(("base_name", "method"), PAIRS)
def test_theirs_loads_here_and_ours_there(base_name, method, tmp_path):
    base, task = sharp(base_name), BASES[base_name][1]
    cls, fields = METHODS[method]
    theirs = peft.get_peft_model(
        copy.deepcopy(base), getattr(peft, cls)(task_type=task, num_virtual_tokens=5, **fields)
    )
    theirs.eval().save_pretrained(tmp_path / "theirs")
    ours = trimtab.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    read = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("theirs", "ours")]
    assert read[0] == read[1]
    a, b, c = (m(**inputs(task, method)) for m in (theirs, ours, back))
    assert torch.allclose(a.logits, b.logits, atol=1e-5) and torch.allclose(a.logits, c.logits, atol=1e-5)
    assert torch.allclose(a.loss, b.loss, atol=1e-5)


@pytest.mark.parametrize(
    ("base_name", "method"),
    [(base, m) for base in BASES for m in GENERATING if base != "bert" and (base, m) != ("t5", "cpt")],
)
def test_generation(base_name, method, tmp_path):
    base, task = sharp(base_name), BASES[base_name][1]
    cls, fields = METHODS[method]
    theirs = peft.get_peft_model(
        copy.deepcopy(base), getattr(peft, cls)(task_type=task, num_virtual_tokens=5, **fields)
    )
    theirs.eval().save_pretrained(tmp_path)
    ours = trimtab.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    batch = {k: v for k, v in inputs(task, method).items() if k in ("input_ids", "attention_mask", "task_ids")}
    for arguments in GENERATION:
        arguments = {"max_new_tokens": 6, "do_sample": False} | arguments
        want = theirs.generate(**batch, **arguments)
        assert torch.equal(ours.generate(**batch, **arguments), want)
    want = theirs.generate(**batch, max_new_tokens=6, do_sample=False)
    assert torch.equal(ours.generate(batch.pop("input_ids"), **batch, max_new_tokens=6, do_sample=False), want)


@pytest.mark.parametrize(("base_name", "method"), [pair for pair in PAIRS if pair[0] != "gpt2"])
def test_gradients_and_names(base_name, method):
    base, task = sharp(base_name), BASES[base_name][1]
    cls, fields = METHODS[method]
    models = []
    for library in (peft, trimtab):
        model = library.get_peft_model(
            copy.deepcopy(base), getattr(library, cls)(task_type=task, num_virtual_tokens=5, **fields)
        )
        models.append(model.eval())
    trained = [
        {n.replace("base_model.model.", "base_model."): p for n, p in m.named_parameters() if p.requires_grad}
        for m in models
    ]
    assert trained[0].keys() == trained[1].keys()
    with torch.no_grad():
        own = dict(models[0].prompt_encoder.named_parameters())
        for name, parameter in models[1].prompt_encoder.named_parameters():
            parameter.copy_(own[name])
    for model in models:
        model(**inputs(task, method)).loss.backward()
    for name, parameter in trained[0].items():
        assert torch.allclose(parameter.grad, trained[1][name].grad, atol=1e-5), name


def test_examples_stay_near_where_they_were():
    base, models = sharp("llama"), []
    for library in (peft, trimtab):
        model = library.get_peft_model(copy.deepcopy(base), library.CPTConfig(task_type="CAUSAL_LM", **EXAMPLES)).eval()
        delta = model.prompt_encoder["default"].delta_embedding.weight
        optimiser = torch.optim.SGD([delta], lr=0.01)
        for _ in range(4):
            model(**inputs("CAUSAL_LM", "cpt")).loss.backward()
            optimiser.step()
            optimiser.zero_grad()
        models.append((model(**inputs("CAUSAL_LM", "cpt")), delta))
    (theirs, d), (ours, e) = models
    assert d.norm(dim=1)[:3].gt(0.012).all()  # at the surface: 0.1 * sqrt(32 / 2048)
    assert torch.allclose(theirs.logits, ours.logits, atol=1e-5) and torch.allclose(d, e, atol=1e-6)


@pytest.mark.parametrize("method", ["prompt", "prefix", "encoded", "multitask", "cpt"])
def test_names_in_memory(method: str) -> None:
    """The base's parameters have PEFT's names: a prompt stands beside the model, with no tuner between."""
    name, fields = METHODS[method]
    found = []
    for library in (peft, trimtab):
        config = getattr(library, name)(task_type="CAUSAL_LM", **{"num_virtual_tokens": 4, **fields})
        model = library.get_peft_model(BASES["llama"][0](), config)
        found.append({n: p.requires_grad for n, p in model.named_parameters() if n.startswith("base_model.")})
    assert found[0] == found[1]
    assert "base_model.model.norm.weight" in found[0]


def test_a_prompts_model_that_gets_a_lora_gets_a_tuner() -> None:
    torch.manual_seed(0)
    prompt = trimtab.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    base = BASES["llama"][0]()
    model = trimtab.get_peft_model(base, prompt).eval()
    ids = torch.arange(3, 9)[None]
    prompted = model(input_ids=ids).logits
    model.add_adapter("lora", trimtab.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    assert any(n.startswith("base_model.model.model.layers.0.self_attn.q_proj.lora_A.lora") for n in model.state_dict())
    torch.testing.assert_close(model(input_ids=ids).logits, prompted)
    with model.disable_adapter():
        plain = model(input_ids=ids).logits
    model.set_adapter("lora")
    assert model(input_ids=ids).logits.shape == plain.shape
    assert not torch.allclose(model(input_ids=ids).logits, plain)
    twin = copy.deepcopy(model)
    twin.delete_adapter("lora")
    twin.set_adapter("default")
    torch.testing.assert_close(twin(input_ids=ids).logits, prompted)
    assert trimtab.get_peft_model(BASES["llama"][0](), prompt).unload().__class__ is base.__class__
    assert model.unload() is base
    torch.testing.assert_close(base(input_ids=ids).logits, plain)
