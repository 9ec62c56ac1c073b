"""A tiny random language model and its tokenizer in a folder, so that the examples run anywhere, at once."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SENTENCES = [
    f"the {color} {animal} {verb} a {other} today"
    for color in ("red", "blue", "green", "small")
    for animal, verb, other in (
        ("cat", "sees", "bird"),
        ("dog", "finds", "fish"),
        ("bird", "likes", "worm"),
        ("fish", "eats", "crumb"),
    )
]


def make(folder: str) -> str:
    """Write model and tokenizer to a folder, unless it has them; returns the folder."""
    if not (Path(folder) / "config.json").exists():
        raw = Tokenizer(models.WordLevel(unk_token="<unk>"))
        raw.pre_tokenizer = pre_tokenizers.Whitespace()
        raw.train_from_iterator(SENTENCES, trainers.WordLevelTrainer(special_tokens=["<pad>", "<unk>", "<s>", "</s>"]))
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
        )
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            pad_token_id=0,
            bos_token_id=2,
            eos_token_id=3,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder
