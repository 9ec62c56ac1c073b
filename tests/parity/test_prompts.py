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
    BertForTokenClassification,
    DynamicCache,
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


def twins(base_name: str, method: str):
    """One adapter in both libraries."""
    base, (name, fields) = sharp(base_name), METHODS[method]
    models = [
        lib.get_peft_model(
            copy.deepcopy(base), getattr(lib, name)(task_type=BASES[base_name][1], num_virtual_tokens=5, **fields)
        ).eval()
        for lib in (peft, trimtab)
    ]
    own = dict(models[0].prompt_encoder.named_parameters())
    with torch.no_grad():
        for key, parameter in models[1].prompt_encoder.named_parameters():
            parameter.copy_(own[key])
    return models


@pytest.mark.parametrize("method", ["prompt", "prefix", "multitask", "cpt", "cartridge"])
def test_what_a_pass_of_a_generation_is_given(method: str) -> None:
    ids, mask = torch.tensor([[7, 8, 9]]), torch.ones(1, 3, dtype=torch.long)
    extras = {"task_ids": torch.tensor([1])} if method == "multitask" else {}
    found = []
    for model in twins("llama", method):
        prepared = [model.prepare_inputs_for_generation(ids, past_key_values=DynamicCache(), **extras)]
        cache = model.base_model(**prepared[0], use_cache=True).past_key_values
        given = {"past_key_values": cache, "attention_mask": mask, "position_ids": torch.arange(3)[None]}
        prepared.append(model.prepare_inputs_for_generation(ids, next_sequence_length=1, **given, **extras))
        found.append([{k: v for k, v in p.items() if k not in ("position_ids", "past_key_values")} for p in prepared])
        found[-1] += [[p["past_key_values"].get_seq_length() for p in prepared]]
        begun = model.generate(max_new_tokens=3, do_sample=False, bos_token_id=1, **extras)
        found[-1] += [begun.tolist()]
    assert found[0][2:] == found[1][2:]
    for theirs, ours in zip(found[0][:2], found[1][:2], strict=True):
        assert theirs.keys() == ours.keys()
        for key in theirs:
            assert theirs[key] is ours[key] is None or torch.equal(theirs[key].to(ours[key]), ours[key]), key


@pytest.mark.parametrize("base_name", ["llama", "gpt2", "bert"])
def test_positions_behind_a_prefix(base_name: str) -> None:
    """A row's positions are its own: both count them on from the prefix, as the model does by itself."""
    ids, places = torch.tensor([[7, 8, 9], [3, 4, 5]]), torch.tensor([[0, 1, 2], [2, 3, 4]])
    theirs, ours = (m(input_ids=ids, position_ids=places).logits for m in twins(base_name, "prefix"))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("base_name", "method"), [("bert", "prompt"), ("gpt2", "prompt"), ("gpt2", "prefix")])
def test_positions_and_types_of_tokens_act(base_name: str, method: str) -> None:
    """PEFT leaves positions out, and for causal models the types; here they are the model's to read."""
    ids = torch.tensor([[7, 8, 9]])
    facts = {"token_type_ids": torch.ones_like(ids)} if base_name == "gpt2" else {"position_ids": ids}
    changes = [
        (m(input_ids=ids, **facts).logits - m(input_ids=ids).logits).abs().max().item()
        for m in twins(base_name, method)
    ]
    assert changes[0] == 0 < 1e-3 < changes[1]


def test_the_loss_of_a_token_classifier() -> None:
    """That of the row's own tokens, as the model itself forms it; PEFT's has labels of another length."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    base, ids = BertForTokenClassification(BertConfig(vocab_size=64, **sizes)), torch.tensor([[7, 8, 9]])
    labels, models = torch.tensor([[0, 1, 0]]), []
    for library in (peft, trimtab):
        config = library.PromptTuningConfig(task_type="TOKEN_CLS", num_virtual_tokens=5)
        models.append(library.get_peft_model(copy.deepcopy(base), config).eval())
    with pytest.raises(ValueError, match="to match target batch_size"):
        models[0](input_ids=ids, labels=labels)
    out = models[1](input_ids=ids, labels=labels)
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(out.logits[0, -3:], labels[0]))


def test_the_mask_of_a_decoder_s_next_pass_has_the_prefix() -> None:
    shapes = []
    for model in twins("t5", "prefix"):
        mask = torch.ones(1, 3, dtype=torch.long)
        out = model.prepare_inputs_for_generation(torch.tensor([[0, 8, 9]]), decoder_attention_mask=mask)
        shapes.append((out["past_key_values"].get_seq_length(), out["decoder_attention_mask"].shape[1]))
    assert shapes == [(5, 3), (5, 8)]


@pytest.mark.parametrize("method", ["prefix", "cartridge", "projected"])
@pytest.mark.parametrize(
    "given",
    [
        {
            "num_layers": 28,
            "token_dim": 3072,
            "num_attention_heads": 24,
        },  # of the model that the config was written for
        {"num_layers": 2, "token_dim": 32, "num_attention_heads": 4},
        {"token_dim": 32},
        {"num_layers": 5},
    ],
)
def test_a_prefix_fits_the_cache_whatever_sizes_the_config_has(method: str, given: dict[str, int]) -> None:
    """Configs that are written by hand hold the model's width and heads; its cache may have other ones."""
    name, fields = METHODS[method]
    found, logits = [], []
    for library in (peft, trimtab):
        config = getattr(library, name)(task_type="CAUSAL_LM", num_virtual_tokens=5, **fields, **given)
        model = library.get_peft_model(sharp("llama"), config).eval()
        made = model.peft_config["default"]
        shapes = {n: tuple(p.shape) for n, p in model.prompt_encoder.named_parameters()}
        found.append((made.token_dim, made.num_attention_heads, made.num_layers, shapes))
        with torch.no_grad():
            for parameter in model.prompt_encoder.parameters():
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
        logits.append(model(input_ids=torch.tensor([[7, 8, 9]])).logits)
    assert found[0] == found[1]
    torch.testing.assert_close(logits[1], logits[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("start", [None, True, False, "zero"])
def test_how_a_prefix_starts(start: bool | str | None, projected: bool) -> None:
    """At random, or as zeros: keys and values that change little until they are trained."""
    zeros = []
    for library in (peft, trimtab):
        fields = {"init_weights": start, "prefix_projection": projected}
        config = library.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, **fields)
        model = library.get_peft_model(sharp("llama"), config)
        zeros.append({n: not p.any() for n, p in model.prompt_encoder.named_parameters()})
    assert zeros[0] == zeros[1]
    assert any(zeros[1].values()) == (start == "zero")
