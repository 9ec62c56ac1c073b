"""Tiny random models, a tokenizer trained on the spot, a few sentences: nothing is downloaded."""

from __future__ import annotations

import os
from pathlib import Path

import torch

WORDS = "the a red blue green small big old cat dog bird fish sees eats likes finds one two three today".split()
SENTENCES = [
    f"the {WORDS[2 + i % 6]} {WORDS[8 + i % 4]} {WORDS[12 + i % 4]} a {WORDS[2 + (i * 5) % 6]} {WORDS[8 + (i * 3) % 4]}"
    for i in range(24)
]


def tokenizer():
    """A word-level tokenizer with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.train_from_iterator(
        SENTENCES + WORDS, trainers.WordLevelTrainer(special_tokens=["<pad>", "<unk>", "<s>", "</s>"])
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    made.chat_template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    return made


SIZES = {"hidden_size": 32, "intermediate_size": 48}  # wider than the zoo's own: these are trained


def llama(vocab: int = 40, **changes):
    """A causal language model of 2 layers."""
    from tests import models

    return models.llama(vocab_size=vocab, bos_token_id=2, eos_token_id=3, **SIZES, **changes)


def bert(vocab: int = 40, cls: str = "BertForSequenceClassification", **changes):
    """An encoder of 2 layers."""
    import transformers

    from tests import models

    sizes = {**SIZES, "num_attention_heads": 4, "max_position_embeddings": 64, "num_labels": 2}
    return models.bert(0, getattr(transformers, cls), **{"vocab_size": vocab, **sizes, **changes})


def batch(rows: int = 4, length: int = 8, vocab: int = 40) -> torch.Tensor:
    """Random token ids."""
    return torch.randint(4, vocab, (rows, length), generator=torch.Generator().manual_seed(1))


def moved(model, adapter: str = "default") -> None:
    """Give an adapter's B values, so that it changes the output."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name and f".{adapter}." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def environment(**more: str) -> dict[str, str]:
    """For subprocesses: this checkout, one thread, no network."""
    root = Path(__file__).resolve().parents[2]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(root / "src"), os.environ.get("PYTHONPATH", "")])),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **more,
    }
