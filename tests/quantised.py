"""Quantised twins of a small net: one row a number format. A new format adds its row; the tests do the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_

from trimtab.formats import weights

IN, HIDDEN, OUT = 64, 96, 8


def _bnb4(kind: str, double: bool = False, **more: Any) -> Callable[[nn.Linear], nn.Module]:
    def make(plain: nn.Linear) -> nn.Module:
        layer = Linear4bit(plain.in_features, plain.out_features, plain.bias is not None, quant_type=kind,
                           compute_dtype=plain.weight.dtype, compress_statistics=double, **more)  # fmt: skip
        layer.load_state_dict(plain.state_dict())
        return layer.to(plain.weight.dtype).to("cpu")

    return make


def _bnb8(plain: nn.Linear) -> nn.Module:
    layer = Linear8bitLt(plain.in_features, plain.out_features, plain.bias is not None, has_fp16_weights=False)
    layer.load_state_dict(plain.state_dict())
    layer.to("cpu")
    if layer.bias is not None:
        layer.bias.data = layer.bias.data.to(plain.weight.dtype)
    return layer


def _torchao(config: Any) -> Callable[[nn.Linear], nn.Module]:
    def make(plain: nn.Linear) -> nn.Module:
        quantize_(plain, config)
        return plain

    return make


# name -> (a plain layer made quantised, the largest error of one rounding relative to the largest weight of its block)
FORMATS: dict[str, tuple[Callable[[nn.Linear], nn.Module], float]] = {
    "bnb-int8": (_bnb8, 0.005),
    "bnb-nf4": (_bnb4("nf4"), 0.16),
    "bnb-nf4-double": (_bnb4("nf4", double=True), 0.18),
    "bnb-fp4": (_bnb4("fp4"), 0.18),
    "bnb-nf4-bf16-storage": (_bnb4("nf4", quant_storage=torch.bfloat16), 0.16),
    "torchao-int8": (_torchao(Int8WeightOnlyConfig()), 0.005),
    "torchao-int4": (_torchao(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))), 0.08),
}


class Net(nn.Module):
    """Two linear layers: `up` is quantised, `head` is plain."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.up = nn.Linear(IN, HIDDEN, bias)
        self.head = nn.Linear(HIDDEN, OUT)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.up(x)))


def quantise(layer: nn.Linear, name: str) -> nn.Module:
    """The layer in another number format."""
    return FORMATS[name][0](layer).requires_grad_(False)


def net(name: str, bias: bool = True, dtype: torch.dtype = torch.float32) -> Net:
    """The same net every time, its `up` quantised; in training mode: in evaluation, LLM.int8() rounds its input too."""
    torch.manual_seed(3)
    model = Net(bias).to(dtype)
    model.up = quantise(model.up, name)
    return model


def twin(name: str, bias: bool = True) -> Net:
    """The same net with the quantised layer's numbers in a plain layer, the reference for all that is computed."""
    model = net(name, bias)
    plain = nn.Linear(IN, HIDDEN, bias)
    with torch.no_grad():
        plain.weight.copy_(weights.read(model.up, model.up.weight))
        if bias:
            plain.bias.copy_(model.up.bias)
    model.up = plain
    return model


def inputs(rows: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    """Some inputs of the net."""
    return torch.randn(rows, IN, generator=torch.Generator().manual_seed(1)).to(dtype)


def quantised_model(model: nn.Module, name: str, skip: tuple[str, ...] = ("lm_head",)) -> nn.Module:
    """Every Linear of a transformer but the head quantised, in place."""
    for parent in list(model.modules()):
        for attribute, child in list(parent.named_children()):
            if type(child) is nn.Linear and attribute not in skip:
                setattr(parent, attribute, quantise(child, name))
    return model
