"""Tiny models for the kinds of site that transformers' plain models lack. They join the table of `models.build`."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

from tests.parity.models import MODELS, VOCABULARY


class ConvNet(nn.Module):
    """Convolutions of one, two and three dimensions over what six tokens look up."""

    def __init__(self, groups: int = 1, mode: str = "zeros") -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 12)
        self.one = nn.Conv1d(12, 8, 3, padding=1, groups=groups, padding_mode=mode)
        self.two = nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=1, groups=groups, padding_mode=mode)
        self.three = nn.Conv3d(2, 4, (2, 1, 2), groups=groups, padding=(1, 0, 1), padding_mode=mode, bias=False)
        self.point = nn.Conv2d(8, 4, 1)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = torch.tanh(self.one(self.embed(input_ids).mT))  # (rows, 8, 6)
        y = torch.tanh(self.two(x.unflatten(1, (4, 2))))  # (rows, 6, 2, ...)
        z = torch.tanh(self.three(x.reshape(len(x), 2, 4, 2, 3)))
        w = self.point(x[:, :, None])
        return torch.cat([y.flatten(1), z.flatten(1), w.flatten(1)], 1)


class AttentionNet(nn.Module):
    """Self-attention and cross-attention, rows first or second."""

    def __init__(self, batch_first: bool = True, bias: bool = True) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.self_attn = nn.MultiheadAttention(8, 2, batch_first=batch_first, bias=bias)
        self.cross_attn = nn.MultiheadAttention(8, 4, batch_first=batch_first, bias=bias)
        self.head = nn.Linear(8, 5)
        with torch.no_grad():  # `build` makes them as large again: two softmaxes in a row must not saturate
            for parameter in self.parameters():
                parameter.div_(4)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        x = x if self.batch_first else x.transpose(0, 1)
        mask = input_ids % 5 == 0
        mask[:, 0] = False
        y, _ = self.self_attn(x, x, x, key_padding_mask=mask)
        z, weights = self.cross_attn(x + y, y, x)
        z = z if self.batch_first else z.transpose(0, 1)
        return self.head(z) + weights.sum(-1, keepdim=True)


class EncoderNet(nn.Module):
    """PyTorch's own Transformer encoder, which in evaluation mode has a way past its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.encoder(self.embed(input_ids), src_key_padding_mask=torch.zeros_like(input_ids, dtype=torch.bool))
        assert isinstance(hidden, Tensor)
        return hidden


SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def mixtral() -> nn.Module:
    """Three experts, each (out, in)."""
    return tf.MixtralForCausalLM(tf.MixtralConfig(**SIZES, num_local_experts=3, num_experts_per_tok=2))


def qwen3_moe() -> nn.Module:
    """Four experts."""
    config = tf.Qwen3MoeConfig(**SIZES, head_dim=8, moe_intermediate_size=12, num_experts=4, num_experts_per_tok=2)
    return tf.Qwen3MoeForCausalLM(config)


def qwen2_moe() -> nn.Module:
    """Four experts and one that all tokens share."""
    config = tf.Qwen2MoeConfig(**SIZES, moe_intermediate_size=12, shared_expert_intermediate_size=20, num_experts=4,
                               num_experts_per_tok=2)  # fmt: skip
    return tf.Qwen2MoeForCausalLM(config)


def llama4() -> nn.Module:
    """Experts that lie (in, out) without saying so."""
    return tf.Llama4ForCausalLM(tf.Llama4TextConfig(**SIZES, head_dim=8, intermediate_size_mlp=20, num_local_experts=3,
                                                    num_experts_per_tok=1, interleave_moe_layer_step=1))  # fmt: skip


def gpt_oss() -> nn.Module:
    """Experts that lie (in, out) and say so."""
    return tf.GptOssForCausalLM(tf.GptOssConfig(**SIZES, head_dim=8, num_local_experts=3, num_experts_per_tok=2))


MODELS.update(
    conv=ConvNet,
    conv_groups=lambda: ConvNet(groups=2),
    conv_reflect=lambda: ConvNet(mode="circular"),
    attention=AttentionNet,
    attention_second=lambda: AttentionNet(batch_first=False),
    attention_unbiased=lambda: AttentionNet(bias=False),
    encoder=EncoderNet,
    mixtral=mixtral,
    qwen2_moe=qwen2_moe,
    qwen3_moe=qwen3_moe,
    llama4=llama4,
    gpt_oss=gpt_oss,
)
