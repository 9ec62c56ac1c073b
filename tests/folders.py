"""Folders as users have them: a tiny base model with tokenizer and chat template, and adapters on it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.models import llama
from trimtab import LoraConfig, get_peft_model

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<s>", "<|im_start|>", "<|im_end|>"]
SIZES: dict[str, Any] = {"vocab_size": 260, "bos_token_id": 256, "eos_token_id": 258, "max_position_embeddings": 512}


def tokenizer(chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Bytes as tokens, and three special ones."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="<|im_end|>")
    made.add_special_tokens({"additional_special_tokens": SPECIAL})
    made.chat_template = chat_template
    return made


def base_folder(folder: Path, chat_template: str | None = CHATML, **changes: Any) -> Path:
    """A tiny Llama with weights that are large enough for its answers to differ, and its tokenizer."""
    model = llama(seed=0, **{**SIZES, "initializer_range": 0.3, **changes})
    model.save_pretrained(folder)
    tokenizer(chat_template).save_pretrained(folder)
    return folder


def adapter_folder(folder: Path, base: Path, seed: int = 1, size: float = 0.3, config: Any = None) -> Path:
    """An adapter of a base folder, every number of it random: `size` 0 leaves it as it starts."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = config or LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        if size:
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.normal_(std=size)
        model.save_pretrained(folder)
    return folder


def rows_file(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as .jsonl."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
