"""Names of peft's inside: they answer `isinstance`, and do what they say."""

from __future__ import annotations

import pytest
import torch
from peft import (
    AdaptionPromptConfig,
    CPTConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoder,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from peft import tuners as peft_tuners
from peft.tuners.adaption_prompt.layer import AdaptedAttention
from peft.tuners.loha.config import LycorisConfig
from peft.tuners.lycoris_utils import LycorisLayer, LycorisTuner
from peft.tuners.mixed.model import COMPATIBLE_TUNER_TYPES, PREFIXES, Layers
from peft.tuners.prompt_tuning.model import BasePromptEncoder
from peft.tuners.tuners_utils import BufferDict, clone_module, onload_layer
from peft.utils import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING, register_peft_method
from peft.utils.integrations import get_layer_device_map, skip_init_on_device
from peft.utils.save_and_load import get_embedding_layer_name, has_valid_embedding_base_layer
from torch import nn

from tests.models import llama, logits, tokens, toy

PROMPTS = {
    "PromptEmbedding": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "PromptEncoder": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
    "PrefixEncoder": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "CPTEmbedding": CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[1, 2, 3], cpt_mask=[1, 1, 1],
                              cpt_tokens_type_mask=[1, 2, 3]),
}  # fmt: skip


@pytest.mark.parametrize("name", PROMPTS)
def test_the_module_of_a_prompt_is_its_encoder(name):
    encoder = get_peft_model(llama(), PROMPTS[name]).prompt_encoder["default"]
    assert isinstance(encoder, getattr(peft_tuners, name))
    assert isinstance(encoder, BasePromptEncoder)
    assert isinstance(encoder, PromptEncoder) == (name == "PromptEncoder")


@pytest.mark.parametrize("cls", [LoHaConfig, LoKrConfig, LoraConfig])
def test_what_stands_above_loha_and_lokr(cls):
    config = cls(r=2, target_modules=["up"])
    model = get_peft_model(toy(), config)
    is_one = cls is not LoraConfig
    layer = model.base_model.model.up
    assert isinstance(config, LycorisConfig) == is_one
    assert isinstance(layer, LycorisLayer) == is_one
    assert isinstance(model.base_model, LycorisTuner) == is_one
    assert isinstance(layer, Layers)


def test_tables_of_methods():
    assert {t.value for t in COMPATIBLE_TUNER_TYPES} == {"LORA", "LOHA", "LOKR", "ADALORA", "OFT", "SHIRA"}
    assert set(PREFIXES) >= {"lora_", "hada_", "lokr_", "oft_", "shira_"}
    inputs = TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING["llama"]
    assert inputs == ["down_proj"]
    assert get_peft_model(llama(), IA3Config()).peft_config["default"].feedforward_modules == set(inputs)


def test_frozen_tensors_of_adapters_and_attention_with_prompts():
    vera = get_peft_model(toy(), VeraConfig(r=2, target_modules=["up"]))
    assert any(isinstance(m, BufferDict) for m in vera.modules())
    config = AdaptionPromptConfig(adapter_len=2, adapter_layers=1, task_type="CAUSAL_LM")
    found = [m for m in get_peft_model(llama(), config).modules() if isinstance(m, AdaptedAttention)]
    assert len(found) == 1


def test_a_tuner_from_outside_is_told_what_to_write_instead():
    with pytest.raises(NotImplementedError, match="register_method"):
        register_peft_method(name="mine", config_cls=LoraConfig, model_cls=nn.Module)


def test_tensors_are_made_in_memory_where_modules_have_none():
    with torch.device("meta"):
        assert torch.zeros(2).is_meta
        assert not skip_init_on_device(torch.zeros)(2).is_meta


def test_copies_of_modules():
    net = toy()
    shared, own = clone_module(net, share_weights=True), clone_module(net)
    assert shared is not net
    assert all(a is b for a, b in zip(shared.parameters(), net.parameters(), strict=True))
    assert not any(a is b for a, b in zip(own.parameters(), net.parameters(), strict=True))
    assert torch.equal(logits(own, tokens()), logits(net, tokens()))


def test_questions_about_embeddings_and_devices():
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["embed_tokens"]))
    base = model.get_base_model()
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    assert [has_valid_embedding_base_layer(x) for x in (embedding, head)] == [True, False]
    assert get_embedding_layer_name(base, head, False) == "lm_head"
    assert get_embedding_layer_name(base, embedding, True) == "model.embed_tokens.base_layer"
    assert get_layer_device_map(base) is None
    base.hf_device_map = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1}
    assert get_layer_device_map(base) == {0: 0, 1: 1}
    with onload_layer(embedding):
        assert not embedding.weight.is_meta
