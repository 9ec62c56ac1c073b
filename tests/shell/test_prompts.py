"""Prompts by themselves: padding, training, switching, several kinds of adapter on one model, errors."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from tests.models import classifier
from trimtab import (
    CartridgeConfig,
    CPTConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)

KINDS = [CartridgeConfig, PromptTuningConfig, PrefixTuningConfig, PromptEncoderConfig]


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=64, pad_token_id=0, eos_token_id=None)  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


def adapted(kind, **fields):
    return get_peft_model(llama(), kind(task_type="CAUSAL_LM", num_virtual_tokens=4, **fields)).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_a_padded_row_generates_what_it_does_alone(kind):
    model = adapted(kind)
    row = torch.tensor([[7, 8, 9]])
    batch = torch.cat([torch.tensor([[0, 0, 7, 8, 9]]), torch.tensor([[3, 4, 5, 6, 7]])])
    mask = (batch != 0).long()
    alone = model.generate(input_ids=row, attention_mask=torch.ones_like(row), max_new_tokens=5, do_sample=False)
    both = model.generate(input_ids=batch, attention_mask=mask, max_new_tokens=5, do_sample=False)
    assert torch.equal(both[0, 5:], alone[0, 3:])


@pytest.mark.parametrize("kind", KINDS)
def test_first_generated_token_is_the_forward_s(kind):
    model = adapted(kind)
    ids = torch.tensor([[7, 8, 9, 10]])
    want = model(input_ids=ids).logits[:, -1].argmax(-1)
    assert model.generate(input_ids=ids, max_new_tokens=1, do_sample=False)[0, -1] == want
    assert model.generate(input_ids=ids, max_length=6, do_sample=False).shape == (1, 6)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_generates_what_forward_passes_say_whatever_it_starts_from(kind):
    model, ids = adapted(kind), torch.tensor([[7, 8, 9, 10], [20, 3, 31, 5]])
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    wanted = ids
    for _ in range(6):
        wanted = torch.cat([wanted, model(input_ids=wanted).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=6, do_sample=False), wanted)
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, use_cache=False), wanted)
    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=embedded, max_new_tokens=6, do_sample=False), wanted[:, 4:])


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_prompt_trains_and_the_loss_falls(kind):
    model = adapted(kind)
    ids = torch.randint(3, 60, (4, 6))
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(10):
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert all(n.startswith("prompt_encoder.default.") for n, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", KINDS)
def test_disable_and_switch(kind):
    base, ids = llama(), torch.randint(3, 60, (2, 5))
    want = base(input_ids=ids).logits
    model = get_peft_model(base, kind(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    first = model(input_ids=ids).logits
    with model.disable_adapter():
        assert torch.equal(model(input_ids=ids).logits, want)
    model.add_adapter("other", kind(task_type="CAUSAL_LM", num_virtual_tokens=6))
    assert torch.equal(model(input_ids=ids).logits, first)
    model.set_adapter("other")
    assert not torch.equal(model(input_ids=ids).logits[:, -1], first[:, -1])
    assert {n.split(".")[1] for n, p in model.named_parameters() if p.requires_grad} == {"other"}
    model.delete_adapter("other")
    assert torch.equal(model(input_ids=ids).logits, first)


def test_a_prompt_and_a_lora_together(tmp_path):
    model = adapted(PromptTuningConfig)
    model.add_adapter("lora", LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False))
    ids = torch.randint(3, 60, (2, 5))
    alone = model(input_ids=ids).logits
    model.set_adapter(["default", "lora"])
    both = model(input_ids=ids).logits
    assert not torch.allclose(both, alone)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    loaded.load_adapter(tmp_path / "lora", "lora")
    loaded.set_adapter(["default", "lora"])
    assert torch.allclose(loaded(input_ids=ids).logits, both, atol=1e-6)


def test_starts():
    base = llama()
    drawn = get_peft_model(copy.deepcopy(base), PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, prompt_tuning_init="SAMPLE_VOCAB"))  # fmt: skip
    rows = drawn.prompt_encoder["default"].embedding.weight
    table = base.get_input_embeddings().weight
    assert all((table == row).all(1).any() for row in rows)


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        (PromptTuningConfig, {"num_virtual_tokens": None}, "num_virtual_tokens"),
        (PromptTuningConfig, {"prompt_tuning_init": "TEXT"}, "tokenizer_name_or_path"),
        (PromptTuningConfig, {"tokenizer_kwargs": {"a": 1}}, "tokenizer_kwargs"),
    ],
)
def test_errors_name_the_field(kind, fields, words):
    with pytest.raises(ValueError, match=words):
        get_peft_model(llama(), kind(**{"task_type": "CAUSAL_LM", "num_virtual_tokens": 4, **fields}))


def test_what_cannot_go_on_from_a_cache_with_a_prompt_in_it_is_refused():
    model, ids = adapted(PromptTuningConfig), torch.tensor([[7, 8, 9, 10]])
    wanted = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    empty = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False, past_key_values=DynamicCache())
    assert torch.equal(empty, wanted)
    filled = model.get_base_model()(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="first in the cache"):
        model.generate(input_ids=ids, max_new_tokens=3, past_key_values=filled)
    for given in ({"prompt_lookup_num_tokens": 2}, {"assistant_model": llama()}):
        with pytest.raises(ValueError, match=next(iter(given))):
            model.generate(input_ids=ids, max_new_tokens=3, **given)


@pytest.mark.parametrize("kind", [CartridgeConfig, PrefixTuningConfig])
def test_a_prefix_says_that_checkpointed_layers_get_no_cache(kind):
    model, ids = adapted(kind).train(), torch.tensor([[7, 8, 9, 10]])
    model.get_base_model().gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="does not work with gradient checkpointing"):
        model(input_ids=ids, labels=ids)
    with pytest.raises(ValueError, match="does not work with gradient checkpointing"):
        get_peft_model(model.unload(), kind(task_type="CAUSAL_LM", num_virtual_tokens=4))


@pytest.mark.parametrize("kind", [PromptTuningConfig, PromptEncoderConfig])
def test_embeddings_in_front_go_through_checkpointed_layers(kind):
    model, ids = adapted(kind).train(), torch.tensor([[7, 8, 9, 10]])
    losses = []
    for checkpointed in (False, True):
        if checkpointed:
            model.get_base_model().gradient_checkpointing_enable()
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        losses.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    for plain, again in zip(*losses, strict=True):
        torch.testing.assert_close(again, plain)


def test_a_prompt_has_no_place_in_a_mixed_batch():
    with pytest.raises(ValueError, match="adapter_names"):
        adapted(PromptTuningConfig)(input_ids=torch.randint(3, 60, (1, 3)), adapter_names=["default"])


@pytest.mark.parametrize(
    ("kind", "fields"), [(PrefixTuningConfig, {"prefix_projection": True}), (PromptEncoderConfig, {})]
)
def test_what_came_out_of_a_network_is_loaded_for_use_not_for_training(kind, fields, tmp_path):
    model = adapted(kind, **fields)
    ids = torch.randint(3, 60, (2, 5))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.allclose(loaded(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-6)
    with pytest.raises(RuntimeError, match="is_trainable"):
        PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig, PromptEncoderConfig, LoraConfig])
def test_the_state_of_a_classifier_has_the_keys_of_its_file(kind, tmp_path) -> None:
    fields = {} if kind is LoraConfig else {"num_virtual_tokens": 2}
    model = get_peft_model(classifier(), kind(task_type="SEQ_CLS", **fields))
    state = get_peft_model_state_dict(model)
    model.save_pretrained(tmp_path)
    file = load_file(tmp_path / "adapter_model.safetensors")
    assert state.keys() == file.keys()
    assert "base_model.model.score.weight" in state or "base_model.score.weight" in state
    if kind is PromptEncoderConfig:  # its file holds the finished prompt
        return
    outcome = set_peft_model_state_dict(get_peft_model(classifier(1), kind(task_type="SEQ_CLS", **fields)), file)
    assert (list(outcome.missing_keys), list(outcome.unexpected_keys)) == ([], [])


def test_the_loss_of_context_tuning_comes_first():
    fields = {
        "num_virtual_tokens": 3,
        "cpt_token_ids": [1, 2, 3],
        "cpt_mask": [1, 1, 1],
        "cpt_tokens_type_mask": [1, 2, 4],
    }
    model = get_peft_model(llama(), CPTConfig(task_type="CAUSAL_LM", **fields)).eval()
    given = {"input_ids": torch.tensor([[7, 8, 9]]), "input_type_mask": torch.tensor([[4, 4, 4]])}
    named = model(**given, labels=given["input_ids"])
    assert list(named)[:2] == ["loss", "logits"]
    assert model(**given, labels=given["input_ids"], return_dict=False)[0] == named[0] == named.loss


@pytest.mark.parametrize("kind", KINDS)
def test_a_forward_takes_an_empty_cache_and_none_with_tokens(kind):
    """Behind tokens a prompt would be read in the wrong place, silently."""
    model, ids = adapted(kind), torch.tensor([[7, 8, 9, 10]])
    wanted = model(input_ids=ids).logits[:, -4:]
    first = model(input_ids=ids, past_key_values=DynamicCache(), use_cache=True)
    assert torch.equal(first.logits[:, -4:], wanted)
    assert first.past_key_values.get_seq_length() == 4 + model.active_peft_config.num_virtual_tokens
    with pytest.raises(ValueError, match="first in the cache"):
        model(input_ids=ids[:, -1:], past_key_values=first.past_key_values)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("told", [True, False], ids=["told", "untold"])
@torch.no_grad()
def test_a_loop_by_hand_generates_what_generate_does(kind, told):
    """What is prepared for each pass has the prompt until the cache has it; the mask and positions count it always."""
    model, ids = adapted(kind), torch.tensor([[0, 7, 8, 9], [20, 3, 31, 5]])
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    mask = (ids != 0).long()
    want = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    cache = DynamicCache(config=model.config)
    for step in range(5):
        places = (mask.cumsum(1) - 1).clamp(min=0)
        fresh = {"next_sequence_length": ids.shape[1] if step == 0 else 1} if told else {}
        prepared = model.prepare_inputs_for_generation(
            ids, past_key_values=cache, attention_mask=mask, position_ids=places, use_cache=True, **fresh
        )
        out = model.base_model(**prepared)
        cache = out.past_key_values
        ids = torch.cat([ids, out.logits[:, -1:].argmax(-1)], 1)
        mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
    assert torch.equal(ids, want)
    with model.disable_adapter():
        assert model.prepare_inputs_for_generation(ids)["input_ids"].shape == ids.shape


@pytest.mark.parametrize("kind", KINDS)
def test_a_generation_without_inputs_begins_with_the_models_first_token(kind):
    model = adapted(kind)
    begun = model.generate(input_ids=torch.tensor([[2]]), max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(bos_token_id=2, max_new_tokens=4, do_sample=False), begun)
    model.generation_config.bos_token_id = 2
    assert torch.equal(model.generate(max_new_tokens=4, do_sample=False), begun)
    model.generation_config.bos_token_id = None
    with pytest.raises(ValueError, match="`bos_token_id` has to be defined"):
        model.generate(max_new_tokens=4)


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
@pytest.mark.parametrize("name", ["llama", "bert", "roberta"])
def test_positions_are_the_inputs_own_and_move_behind_the_prompt(name, kind):
    """Given as the model would count them by itself, they change nothing."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    if name == "llama":
        base, start = llama(), 0
    elif name == "bert":
        base, start = BertForSequenceClassification(BertConfig(vocab_size=64, **sizes)), 0
    else:
        base, start = RobertaForSequenceClassification(RobertaConfig(vocab_size=64, **sizes)), 2
    model = get_peft_model(base, kind(task_type=None, num_virtual_tokens=4)).eval()
    ids = torch.tensor([[7, 8, 9], [5, 6, 7]])
    places = torch.arange(start, start + 3).expand(2, -1)
    torch.testing.assert_close(model(input_ids=ids, position_ids=places).logits, model(input_ids=ids).logits)
