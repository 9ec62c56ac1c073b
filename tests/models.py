"""The zoo: models small enough to be built for every test. A toy with one layer of every kind, nets of the layers that
plain models lack, and tiny transformers, each with its sizes written once."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

VOCABULARY, WIDTH, HIDDEN, CLASSES = 13, 6, 10, 7
WORDS = 40  # tokens of the nets below the toy


class Scaled(nn.Embedding):
    """An embedding that scales its output, as Gemma's does."""

    def __init__(self, *shape: int) -> None:
        super().__init__(*shape)
        self.register_buffer("embed_scale", torch.tensor(2.5), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embed_scale.to(self.weight.dtype)


class Toy(nn.Module):
    """One layer of every kind in a row; no two sizes are equal, so that a transposed product cannot pass."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH, padding_idx=0)
        self.scaled = Scaled(VOCABULARY, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = Conv1D(WIDTH, HIDDEN)  # GPT-2's: its weight is stored (in, out)
        nn.init.normal_(self.down.weight, std=0.3)
        nn.init.normal_(self.down.bias)
        self.head = nn.Linear(WIDTH, CLASSES, bias=False)
        self.conv = nn.Conv1d(WIDTH, CLASSES + 1, 3, padding=1)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.embed(ids) + self.scaled(ids))
        return self.head(x + self.down(torch.tanh(self.up(x)))) + self.conv(x.mT).mT[..., :CLASSES]


# The toy's layers by name -> the kind of site each is. A new kind of layer: one module above, one row here.
SITES: dict[str, str] = {
    "embed": "embedding",
    "scaled": "embedding",
    "norm": "vector",
    "up": "linear",
    "down": "linear",
    "head": "linear",
    "conv": "conv",
}


def toy(dtype: torch.dtype = torch.float32, seed: int = 0) -> Toy:
    """The same toy every time, in evaluation mode."""
    torch.default_generator.manual_seed(seed)
    return Toy().to(dtype).eval()


def tokens(rows: int = 4, length: int = 5, vocabulary: int = VOCABULARY, seed: int = 1) -> Tensor:
    """Random token ids; every row has some of the ids 1 to 3."""
    ids = torch.randint(1, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = torch.arange(rows) % 3 + 1
    return ids


# ---------------------------------------------------------------------- other kinds of layers
class Heads(nn.Module):
    """An embedding, a Linear with and without bias, a Conv1D; and heads with names to be taken for each other."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 12, padding_idx=0)
        self.plain = nn.Linear(12, 10, bias=False)
        self.biased = nn.Linear(10, 14)
        self.conv = Conv1D(12, 14)
        self.norm = nn.LayerNorm(12)
        self.my_score = nn.Linear(12, 12)
        self.score = nn.Linear(12, 5)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = torch.tanh(self.biased(torch.tanh(self.plain(self.embed(input_ids)))))
        return self.score(torch.tanh(self.my_score(self.norm(self.conv(x)))))


class ConvNet(nn.Module):
    """Convolutions of one, two and three dimensions over what six tokens look up."""

    def __init__(self, groups: int = 1, mode: str = "zeros") -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 12)
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


class Net(nn.Module):
    """A convolution with a kernel, a grouped one, one without a kernel, a norm and a Linear, all of other sizes."""

    def __init__(self) -> None:
        super().__init__()
        torch.default_generator.manual_seed(0)
        self.conv = nn.Conv2d(6, 8, 3, padding=1, stride=2)
        self.grouped = nn.Conv2d(8, 4, 3, groups=2, padding=1)
        self.point = nn.Conv2d(4, 12, 1)
        self.norm = nn.LayerNorm(12)
        self.linear = nn.Linear(12, 5)
        for p in self.norm.parameters():
            nn.init.normal_(p)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.point(torch.tanh(self.grouped(torch.tanh(self.conv(x))))))
        return self.linear(self.norm(x.mean((-1, -2))))


class AttentionNet(nn.Module):
    """Self-attention and cross-attention, rows first or second."""

    def __init__(self, batch_first: bool = True, bias: bool = True) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.embed = nn.Embedding(WORDS, 8)
        self.self_attn = nn.MultiheadAttention(8, 2, batch_first=batch_first, bias=bias)
        self.cross_attn = nn.MultiheadAttention(8, 4, batch_first=batch_first, bias=bias)
        self.head = nn.Linear(8, 5)
        with torch.no_grad():  # parity makes them as large again: two softmaxes in a row must not saturate
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
        self.embed = nn.Embedding(WORDS, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.encoder(self.embed(input_ids), src_key_padding_mask=torch.zeros_like(input_ids, dtype=torch.bool))
        assert isinstance(hidden, Tensor)
        return hidden


# ---------------------------------------------------------------------- transformers
LLAMA: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS: dict[str, Any] = {**LLAMA, "vocab_size": WORDS, "num_attention_heads": 2, "num_key_value_heads": 1}
del EXPERTS["max_position_embeddings"]  # some of them take it with their rotations


def llama(seed: int = 0, cls: type = tf.LlamaForCausalLM, **changes: Any) -> Any:
    """A Llama of two narrow layers, in evaluation mode."""
    torch.default_generator.manual_seed(seed)
    return cls(tf.LlamaConfig(**{**LLAMA, **changes})).eval()


def classifier(seed: int = 0, **changes: Any) -> Any:
    """A tiny Llama with a head of three classes."""
    return llama(seed, tf.LlamaForSequenceClassification, num_labels=3, **changes)


def gpt2(seed: int = 0, cls: type = tf.GPT2LMHeadModel, **changes: Any) -> Any:
    """A GPT-2 of two narrow layers with tied embeddings, in evaluation mode."""
    torch.default_generator.manual_seed(seed)
    sizes = {"vocab_size": 64, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return cls(tf.GPT2Config(**{**sizes, **changes})).eval()


def bert(seed: int = 0, cls: type = tf.BertForSequenceClassification, **changes: Any) -> Any:
    """An encoder of two narrow layers, in evaluation mode."""
    torch.default_generator.manual_seed(seed)
    sizes = {
        "vocab_size": WORDS, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 32, "num_labels": 3,
    }  # fmt: skip
    return cls(tf.BertConfig(**{**sizes, **changes})).eval()


def t5(seed: int = 0, **changes: Any) -> Any:
    """An encoder and a decoder of two narrow layers, in evaluation mode."""
    torch.default_generator.manual_seed(seed)
    sizes = {
        "vocab_size": WORDS, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2,
        "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2,
    }  # fmt: skip
    return tf.T5ForConditionalGeneration(tf.T5Config(**{**sizes, **changes})).eval()


def grown(model: nn.Module, factor: float) -> Any:
    """The model with larger matrices, so that every path is felt in its outputs."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(factor)
    return model


def mixtral() -> nn.Module:
    """Three experts, each (out, in)."""
    return tf.MixtralForCausalLM(tf.MixtralConfig(**EXPERTS, num_local_experts=3, num_experts_per_tok=2))


def qwen3_moe() -> nn.Module:
    """Four experts."""
    config = tf.Qwen3MoeConfig(**EXPERTS, head_dim=8, moe_intermediate_size=12, num_experts=4, num_experts_per_tok=2)
    return tf.Qwen3MoeForCausalLM(config)


def qwen2_moe() -> nn.Module:
    """Four experts and one that all tokens share."""
    config = tf.Qwen2MoeConfig(**EXPERTS, moe_intermediate_size=12, shared_expert_intermediate_size=20, num_experts=4,
                               num_experts_per_tok=2)  # fmt: skip
    return tf.Qwen2MoeForCausalLM(config)


def llama4() -> nn.Module:
    """Experts that lie (in, out) without saying so."""
    config = tf.Llama4TextConfig(**EXPERTS, head_dim=8, intermediate_size_mlp=20, num_local_experts=3,
                                 num_experts_per_tok=1, interleave_moe_layer_step=1)  # fmt: skip
    return tf.Llama4ForCausalLM(config)


def gpt_oss() -> nn.Module:
    """Experts that lie (in, out) and say so."""
    return tf.GptOssForCausalLM(tf.GptOssConfig(**EXPERTS, head_dim=8, num_local_experts=3, num_experts_per_tok=2))


# ---------------------------------------------------------------------- what is the same afterwards
def snapshot(model: nn.Module) -> dict[str, Any]:
    """What must be the same after adapters have come and gone: modules and parameters as objects, and their bits."""
    return {
        "modules": {n: id(m) for n, m in model.named_modules()},
        "parameters": {n: id(p) for n, p in model.named_parameters(remove_duplicate=False)},
        "attributes": {n: sorted(m.__dict__) for n, m in model.named_modules()},
        "children": {n: sorted(m._modules) for n, m in model.named_modules()},
        "modes": {n: m.training for n, m in model.named_modules()},
        "bits": {n: t.detach().clone() for n, t in model.state_dict().items()},
    }


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    """The model is the one the snapshot was taken of, in every object and bit."""
    now = snapshot(model)
    for part in ("modules", "parameters", "attributes", "children", "modes"):
        assert now[part] == before[part], part
    assert now["bits"].keys() == before["bits"].keys()
    for name, bits in before["bits"].items():
        assert torch.equal(now["bits"][name], bits), name


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """The output of any of these models as a tensor."""
    return tensor_of(model(ids))


def tensor_of(output: Any) -> Tensor:
    """The one tensor of a model's output that depends on all of it."""
    if isinstance(output, Tensor):
        return output
    if "start_logits" in output:
        return torch.stack([output.start_logits, output.end_logits], -1)
    return output.logits if "logits" in output else output.last_hidden_state
