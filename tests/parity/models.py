"""The models of the zoo by name. `build(name)` gives the same weights each time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

from tests import models as zoo
from tests.models import WORDS as VOCABULARY
from tests.models import tensor_of as tensor_of

SEED = 7
SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "num_attention_heads": 2, "num_key_value_heads": 1}
GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip

llama = partial(zoo.llama, SEED, **SIZES)
gpt2 = partial(zoo.gpt2, SEED, **GPT2)
bert = partial(zoo.bert, SEED, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
t5 = partial(zoo.t5, SEED, dropout_rate=0.0)

MODELS: dict[str, Callable[[], nn.Module]] = {
    "toy": zoo.Heads,
    "gpt2": gpt2,
    "gpt2_seq": partial(gpt2, tf.GPT2ForSequenceClassification, num_labels=3),
    "llama": llama,
    "llama_deep": partial(llama, num_hidden_layers=11),
    "llama_tied": partial(llama, tie_word_embeddings=True),
    "llama_base": partial(llama, tf.LlamaModel),
    "llama_seq": partial(llama, tf.LlamaForSequenceClassification, num_labels=3),
    "bert": partial(bert, tf.BertModel),
    "bert_seq": bert,
    "bert_token": partial(bert, tf.BertForTokenClassification),
    "bert_qa": partial(bert, tf.BertForQuestionAnswering, num_labels=2),
    "t5": t5,
    "t5_untied": partial(t5, tie_word_embeddings=False),
    "conv": zoo.ConvNet,
    "conv_groups": partial(zoo.ConvNet, groups=2),
    "conv_reflect": partial(zoo.ConvNet, mode="circular"),
    "attention": zoo.AttentionNet,
    "attention_second": partial(zoo.AttentionNet, batch_first=False),
    "attention_unbiased": partial(zoo.AttentionNet, bias=False),
    "encoder": zoo.EncoderNet,
    "mixtral": zoo.mixtral,
    "qwen2_moe": zoo.qwen2_moe,
    "qwen3_moe": zoo.qwen3_moe,
    "llama4": zoo.llama4,
    "gpt_oss": zoo.gpt_oss,
}


def build(name: str, dtype: torch.dtype = torch.float32, scale: float = 4.0) -> nn.Module:
    """The model `name` in training mode, its matrices and biases large enough that every path is felt in the outputs."""
    torch.manual_seed(SEED)
    model = MODELS[name]()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale if name not in ("toy", "t5", "t5_untied") else 1.0)
            elif path.endswith("bias"):
                parameter.normal_(std=0.1)
    return model.to(dtype).train()


def batch(name: str, rows: int = 3) -> dict[str, Tensor]:
    """Inputs for the model `name`."""
    draw = torch.Generator().manual_seed(3)
    inputs = {"input_ids": torch.randint(3, VOCABULARY, (rows, 6), generator=draw)}
    if name.startswith("t5"):
        inputs["decoder_input_ids"] = torch.randint(3, VOCABULARY, (rows, 4), generator=draw)
    return inputs
