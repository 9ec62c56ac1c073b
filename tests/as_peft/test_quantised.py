"""What holds a layer quantised, as peft's modules are asked."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.nn import Linear4bit as Bnb4
from bitsandbytes.nn import Linear8bitLt as Bnb8
from peft import LoraConfig, OFTConfig, get_layer_status, get_model_status, get_peft_model
from peft.tuners.lora import bnb
from peft.tuners.lora.layer import dispatch_default
from peft.tuners.lora.model import dispatch_bnb_4bit, dispatch_hqq
from peft.utils.integrations import dequantize_bnb_weight, dequantize_module_weight, get_bnb_param_type
from peft.utils.quantization_utils import (
    Bnb4bitBackend,
    get_quantization_kwargs,
    quantization_extra_repr,
    resolve_quantization_backend,
)
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_


def four(size=32, weight=None):
    layer = Bnb4(size, size, bias=False, compute_dtype=torch.float32)
    layer.load_state_dict(nn.Linear(size, size, bias=False).state_dict() if weight is None else {"weight": weight})
    return layer.to("cpu")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.four, self.plain = four(), nn.Linear(32, 32)
        self.eight = Bnb8(32, 32, has_fp16_weights=False)
        self.eight.load_state_dict(nn.Linear(32, 32).state_dict())
        self.eight.to("cpu")
        self.ao = nn.Linear(32, 32)
        quantize_(self.ao, Int8WeightOnlyConfig())

    def forward(self, x):
        return self.ao(self.eight(self.plain(self.four(x))))


NAMES = {"four": "bnb 4bit", "plain": None, "eight": "bnb 8bit", "ao": "torchao"}


@pytest.mark.parametrize("config", [LoraConfig(r=2, target_modules=[*NAMES]),
                                    OFTConfig(r=0, oft_block_size=4, target_modules=[*NAMES])])  # fmt: skip
def test_the_status_names_what_holds_the_weight(config):
    model = get_peft_model(Net(), config)
    assert {row.name.split(".")[-1]: row.quantization_backend for row in get_layer_status(model)} == NAMES
    assert get_model_status(model).quantization_backend == "irregular"


def test_backends_and_weights():
    net = Net()
    for name, backend in NAMES.items():
        found = resolve_quantization_backend(getattr(net, name), **get_quantization_kwargs(net))
        assert (found and found.backend_name) == backend
    backend = resolve_quantization_backend(net.four)
    assert isinstance(backend, Bnb4bitBackend)
    assert backend.supports_merge
    weight = backend.get_base_weight(net.four)
    torch.testing.assert_close(weight, dequantize_bnb_weight(net.four.weight, net.four.weight.quant_state))
    torch.testing.assert_close(weight, dequantize_module_weight(net.four).data)
    backend.set_base_weight(net.four, 2 * weight)
    twice = four(weight=2 * weight)  # bitsandbytes rounds the scales as well, each processor in its own way
    assert torch.equal(backend.get_base_weight(net.four), backend.get_base_weight(twice))
    assert [get_bnb_param_type(x.weight) for x in (net.four, net.eight, net.plain)] == ["4bit", "8bit", False]
    assert quantization_extra_repr(net.plain) == ""
    assert "bnb 8bit" in quantization_extra_repr(net.eight)


def test_layer_classes_and_dispatchers_follow_the_backend():
    config = LoraConfig(r=2, init_lora_weights=False)
    net = Net()
    layer = dispatch_bnb_4bit(net.four, "default", config)
    assert isinstance(layer, bnb.Linear4bit)
    assert not isinstance(layer, bnb.Linear8bitLt)
    assert dispatch_bnb_4bit(net.plain, "default", config) is None
    assert dispatch_default(net.eight, "default", config) is None
    assert dispatch_hqq(net.plain, "default", config=config) is None
    assert dispatch_default(nn.ReLU(), "default", config) is None
    plain = dispatch_default(net.plain, "default", config)
    assert not isinstance(plain, bnb.Linear4bit)
    x = torch.randn(3, 32)
    assert not torch.equal(plain(x), net.plain(x))
    eight = get_peft_model(Net(), LoraConfig(r=2, target_modules=["eight"])).base_model.model.eight
    assert isinstance(eight, bnb.Linear8bitLt)
