"""Models small enough to be built for every test: a toy with one layer of every kind, and tiny transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from transformers.pytorch_utils import Conv1D

VOCABULARY, WIDTH, HIDDEN, CLASSES = 13, 6, 10, 7


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
    torch.manual_seed(seed)
    return Toy().to(dtype).eval()


def tokens(rows: int = 4, length: int = 5, vocabulary: int = VOCABULARY, seed: int = 1) -> Tensor:
    """Random token ids; every row has some of the ids 1 to 3."""
    ids = torch.randint(1, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = torch.arange(rows) % 3 + 1
    return ids


LLAMA: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def llama(seed: int = 0, cls: type = LlamaForCausalLM, **changes: Any) -> Any:
    """A Llama of two narrow layers, in evaluation mode."""
    torch.manual_seed(seed)
    return cls(LlamaConfig(**{**LLAMA, **changes})).eval()


def classifier(seed: int = 0, **changes: Any) -> Any:
    """A tiny Llama with a head of three classes."""
    return llama(seed, LlamaForSequenceClassification, num_labels=3, **changes)


def gpt2(seed: int = 0, **changes: Any) -> Any:
    """A GPT-2 of two narrow layers with tied embeddings, in evaluation mode."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 64, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**{**sizes, **changes})).eval()


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
    out = model(ids)
    return out if isinstance(out, Tensor) else out.logits
