"""A tiny tokenizer and a tiny random Llama, built on the spot."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def make_tokenizer(chat_template: str | None = CHATML, eos: str | None = "<|im_end|>") -> PreTrainedTokenizerFast:
    """Bytes as tokens: what is trained can be read off exactly."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token=eos)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def make_model(seed: int = 0, dropout: float = 0.0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, attention_dropout=dropout, eos_token_id=257,
        bos_token_id=256, pad_token_id=0, initializer_range=0.1,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.fixture
def model() -> LlamaForCausalLM:
    return make_model()


@pytest.fixture
def tokenizer_factory():
    return make_tokenizer


@pytest.fixture
def model_factory():
    return make_model


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    """The tiny model and its tokenizer, saved."""
    folder = tmp_path_factory.mktemp("base")
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sums(tmp_path_factory):
    """Two files of rows: 24 to learn, 8 to be tested on."""
    folder = tmp_path_factory.mktemp("sums")
    for name, numbers in (("train", range(24)), ("valid", range(24, 32))):
        rows = [{"prompt": f"{i}+{i}=", "completion": str(2 * i)} for i in numbers]
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder
