"""Tiny models, built from their configs: no download. `build(name)` gives the same weights each time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

VOCABULARY = 40


def _gpt2(cls: Any = tf.GPT2LMHeadModel, **more: Any) -> nn.Module:
    return cls(
        tf.GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=32,
            n_embd=16,
            n_layer=2,
            n_head=2,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            **more,
        )
    )


def _llama(cls: Any = tf.LlamaForCausalLM, layers: int = 2, **more: Any) -> nn.Module:
    return cls(
        tf.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            **more,
        )
    )


def _bert(cls: Any = tf.BertModel, labels: int = 3, **more: Any) -> nn.Module:
    return cls(
        tf.BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=32,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            num_labels=labels,
            **more,
        )
    )


def _t5(**more: Any) -> nn.Module:
    return tf.T5ForConditionalGeneration(
        tf.T5Config(
            vocab_size=VOCABULARY,
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=2,
            num_heads=2,
            dropout_rate=0.0,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=2,
            **more,
        )
    )


class Toy(nn.Module):
    """Every kind of site: an embedding, a Linear with and without bias, a Conv1D; and heads with confusable names."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 12, padding_idx=0)
        self.plain = nn.Linear(12, 10, bias=False)
        self.biased = nn.Linear(10, 14)
        self.conv = Conv1D(12, 14)
        self.norm = nn.LayerNorm(12)
        self.my_score = nn.Linear(12, 12)
        self.score = nn.Linear(12, 5)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = torch.tanh(self.biased(torch.tanh(self.plain(self.embed(input_ids)))))
        return self.score(torch.tanh(self.my_score(self.norm(self.conv(x)))))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "toy": Toy,
    "gpt2": _gpt2,
    "gpt2_seq": lambda: _gpt2(tf.GPT2ForSequenceClassification, num_labels=3),
    "llama": _llama,
    "llama_deep": lambda: _llama(layers=11),
    "llama_tied": lambda: _llama(tie_word_embeddings=True),
    "llama_base": lambda: _llama(tf.LlamaModel),
    "llama_seq": lambda: _llama(tf.LlamaForSequenceClassification, num_labels=3),
    "bert": _bert,
    "bert_seq": lambda: _bert(tf.BertForSequenceClassification),
    "bert_token": lambda: _bert(tf.BertForTokenClassification),
    "bert_qa": lambda: _bert(tf.BertForQuestionAnswering, labels=2),
    "t5": _t5,
    "t5_untied": lambda: _t5(tie_word_embeddings=False),
}


def build(name: str, dtype: torch.dtype = torch.float32, scale: float = 4.0) -> nn.Module:
    """The model `name`, its matrices and biases large enough that every path is felt in the outputs."""
    torch.manual_seed(7)
    model = MODELS[name]()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale if name not in ("toy", "t5", "t5_untied") else 1.0)
            elif path.endswith("bias"):
                parameter.normal_(std=0.1)
    return model.to(dtype)


def batch(name: str, rows: int = 3) -> dict[str, Tensor]:
    """Inputs for the model `name`."""
    draw = torch.Generator().manual_seed(3)
    inputs = {"input_ids": torch.randint(3, VOCABULARY, (rows, 6), generator=draw)}
    if name.startswith("t5"):
        inputs["decoder_input_ids"] = torch.randint(3, VOCABULARY, (rows, 4), generator=draw)
    return inputs


def tensor_of(output: Any) -> Tensor:
    """The one tensor of a model's output that depends on all of it."""
    if isinstance(output, Tensor):
        return output
    if "start_logits" in output:
        return torch.stack([output.start_logits, output.end_logits], -1)
    return output.logits if "logits" in output else output.last_hidden_state
