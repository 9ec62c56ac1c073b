"""Number formats: what is read is what the layer computes; what is written is rounded once, into a new object."""

from __future__ import annotations

import subprocess
import sys
from collections import OrderedDict
from typing import Any

import pytest
import torch
from bitsandbytes import functional as bnb
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm
from torchao.prototype.quantization.int4 import Int4OpaqueTensor

from tests.quantised import FORMATS, HIDDEN, IN, inputs, net, quantise
from trimtab import HRAConfig, LoraConfig, get_peft_model
from trimtab.errors import ReadOnlyWeight
from trimtab.formats import weights

each = pytest.mark.parametrize("name", FORMATS)


def bits(layer: Any, weight: Any) -> list[Tensor]:
    """Everything a stored weight consists of, copied."""
    parts = [getattr(weight, n, None) for n in ("qdata", "scale", "SCB", "absmax", "nested_absmax")]
    if getattr(weight, "SCB", None) is None and hasattr(layer, "state"):
        parts.append(layer.state.SCB)
    data = weight.data if not hasattr(weight, "qdata") else None
    return [p.detach().clone().view(torch.uint8) for p in [data, *parts] if isinstance(p, Tensor)]


@each
def test_reads_what_the_layer_computes(name: str) -> None:
    """The plain numbers give the layer's output, before and after its first forward."""
    layer, x = net(name).up, inputs()
    W = weights.read(layer, layer.weight)
    assert W.shape == (HIDDEN, IN)
    assert weights.shape(layer, "weight") == (HIDDEN, IN)
    assert W.is_floating_point()
    assert not W.requires_grad
    y = layer(x)
    torch.testing.assert_close(y, nn.functional.linear(x, W, layer.bias), rtol=1e-5, atol=1e-6)
    assert torch.equal(weights.read(layer, layer.weight), W)


@each
def test_rounds_once(name: str) -> None:
    """A written weight is within one rounding of what was asked, and the old parameter object is whole."""
    layer, x = net(name).up, inputs()
    layer(x)
    old, before, W = layer.weight, bits(layer, layer.weight), weights.read(layer, layer.weight)
    wanted = W + 0.02 * torch.randn(W.shape)
    weights.write(layer, "weight", wanted)
    assert layer.weight is not old
    assert type(layer.weight) is type(old)
    assert not layer.weight.requires_grad
    got = weights.read(layer, layer.weight)
    assert (got - wanted).abs().max() <= FORMATS[name][1] * wanted.abs().max()
    torch.testing.assert_close(layer(x), nn.functional.linear(x, got, layer.bias), rtol=1e-5, atol=1e-6)
    weights.install(layer, {"weight": old})
    assert layer.weight is old
    assert all(torch.equal(a, b) for a, b in zip(before, bits(layer, old), strict=True))
    assert torch.equal(weights.read(layer, old), W)


@each
def test_writes_what_the_library_would(name: str) -> None:
    """Writing gives the numbers the library itself makes of a weight."""
    layer = net(name).up
    torch.manual_seed(9)
    fresh = nn.Linear(IN, HIDDEN)
    wanted = fresh.weight.detach().clone()
    theirs = quantise(fresh, name)
    weights.write(layer, "weight", wanted)
    torch.testing.assert_close(
        weights.read(layer, layer.weight), weights.read(theirs, theirs.weight), rtol=1e-4, atol=1e-6
    )


@each
def test_exchanges_while_running(name: str) -> None:
    """Parameter objects may be exchanged between forwards as often as one likes: each gives its own output."""
    layer, x = net(name).up, inputs()
    first, y = layer.weight, layer(x)
    weights.write(layer, "weight", weights.read(layer, first) * 2)
    second, z = layer.weight, layer(x)
    for weight, wanted in [(first, y), (second, z), (second, z), (first, y)]:
        weights.install(layer, {"weight": weight})
        assert torch.equal(layer(x), wanted)
    assert not torch.equal(y, z)


@each
def test_says_what_it_is(name: str) -> None:
    """A quantised layer is known as one, its bias and plain layers are not."""
    layer = net(name).up
    assert weights.quantised(layer)
    assert not weights.quantised(layer, "bias")
    assert not weights.quantised(nn.Linear(2, 2))
    assert not weights.quantised(nn.LayerNorm(2))
    assert not weights.quantised(nn.Dropout())
    assert weights.device(layer, layer.weight).type == "cpu"


@each
def test_plain_layer(name: str) -> None:
    """`plain` gives an nn.Linear of the same numbers; what is shared stays shared."""
    layer, x = net(name).up, inputs()
    holder = nn.ModuleDict({"a": nn.Sequential(layer), "b": nn.Sequential(layer, nn.ReLU())})
    weights.plain(holder)
    assert type(holder["a"][0]) is nn.Linear
    assert holder["a"][0] is holder["b"][0]
    torch.testing.assert_close(holder["a"](x), layer(x), rtol=1e-5, atol=1e-6)


def test_packed_for_avx512() -> None:
    """A 4-bit weight that bitsandbytes repacked for the processor's own instructions is read right, and left packed."""
    layer = net("bnb-nf4").up
    W = weights.read(layer, layer.weight)
    layer.weight.data, state = bnb._convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
    layer.weight.quant_state = state
    assert state.packing_format_for_cpu
    torch.testing.assert_close(weights.read(layer, layer.weight), W, rtol=1e-2, atol=1e-3)  # scales went to bf16
    assert layer.weight.quant_state.packing_format_for_cpu


LAYERS = [lambda: Linear8bitLt(IN, HIDDEN, has_fp16_weights=True), lambda: Linear4bit(IN, HIDDEN)]


@pytest.mark.parametrize("make", LAYERS, ids=["int8", "fp4"])
def test_not_quantised_yet(make: Any) -> None:
    """A bitsandbytes layer that still holds floating point is read and written as such, in its own class."""
    layer = make()
    old, W = layer.weight, layer.weight.detach().clone()
    assert torch.equal(weights.read(layer, old), W)
    weights.write(layer, "weight", 2 * W)
    assert type(layer.weight) is type(old)
    assert layer.weight is not old
    assert torch.equal(weights.read(layer, layer.weight), 2 * W)
    assert torch.equal(weights.read(layer, old), W)
    x = inputs()
    y = layer.to("cpu")(x)  # quantised now, where it is to be
    wanted = nn.functional.linear(x, 2 * W, layer.bias)
    assert (y - wanted).norm() < 0.2 * wanted.norm()


def test_parameter_made_plain_by_an_engine() -> None:
    """FSDP makes a 4-bit weight a plain Parameter; its scales are on the layer then."""
    layer = net("bnb-nf4-bf16-storage").up
    W = weights.read(layer, layer.weight)
    layer.quant_state = layer.weight.quant_state
    layer._parameters["weight"] = nn.Parameter(layer.weight.data, requires_grad=False)
    assert type(layer.weight) is nn.Parameter
    assert torch.equal(weights.read(layer, layer.weight), W)
    assert weights.shape(layer, "weight") == (HIDDEN, IN)


@each
def test_moved(name: str) -> None:
    """A parameter that no module holds follows a conversion as one in a module does."""
    layer, x = net(name).up, inputs()
    old, y = layer.weight, layer(x)
    weights.write(layer, "weight", weights.read(layer, old) * 2)
    weights.moved(old, lambda t: t.to("cpu"))
    weights.install(layer, {"weight": old})
    assert layer.weight is old
    assert torch.equal(layer(x), y)


class PackedLinear(nn.Module):
    """A layer as GPTQ libraries build them: no nn.Linear, no weight."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        scale = plain.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("qweight", (plain.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scales", scale)
        self.bias = plain.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.qweight * self.scales, self.bias)


class ScaledFloat8(nn.Linear):
    """A layer as transformers' fp8 ones: a weight that means nothing without its scale."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features)
        self.bias = plain.bias
        self.weight_scale_inv = nn.Parameter(plain.weight.detach().abs().amax() / 400)
        self.weight = nn.Parameter((plain.weight.detach() / self.weight_scale_inv).to(torch.float8_e4m3fn), False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.weight_scale_inv, self.bias)


def _int4(plain: nn.Linear) -> nn.Module:
    plain = plain.to(torch.bfloat16)
    packed = Int4OpaqueTensor.from_hp(plain.weight.detach(), [1, 32])
    plain.weight = nn.Parameter(packed, requires_grad=False)
    return plain


@pytest.mark.parametrize("make", [PackedLinear, ScaledFloat8, _int4])
def test_formats_of_others(make: Any) -> None:
    """A layer only its own library understands is read by what it computes; writing it names the class and ways out."""
    torch.manual_seed(0)
    layer = make(nn.Linear(IN, HIDDEN))
    assert weights.quantised(layer)
    assert weights.shape(layer, "weight") == (HIDDEN, IN)
    W = weights.read(layer, getattr(layer, "weight", None))
    x = inputs().to(W.dtype)
    close = 2e-2 if W.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(nn.functional.linear(x, W, layer.bias), layer(x), rtol=close, atol=close)
    with pytest.raises(ReadOnlyWeight, match=r"keep the adapter unmerged.*dequantize") as error:
        weights.write(layer, "weight", W)
    assert type(layer).__name__ in str(error.value)
    assert type(weights.plain(layer)) is nn.Linear


def test_unreadable() -> None:
    """A layer that cannot even be run says so."""

    class Broken(PackedLinear):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("needs a GPU")

    with pytest.raises(ReadOnlyWeight, match=r"Broken cannot be read \(RuntimeError: needs a GPU\)"):
        weights.read(Broken(nn.Linear(3, 4)), None)


def test_no_library_for_plain_models() -> None:
    """Reading and writing plain layers imports no quantisation library."""
    code = (
        "import sys, torch; from torch import nn; from trimtab.core import site; from trimtab.formats import weights;"
        "l = nn.Linear(2, 2); weights.write(l, 'weight', weights.read(l, l.weight) * 2); weights.plain(l);"
        "assert not {'bitsandbytes', 'torchao'} & set(sys.modules), sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


COMPUTED = [parametrizations.weight_norm, parametrizations.spectral_norm, weight_norm]


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("norm", COMPUTED, ids=["weight norm", "spectral norm", "by a hook"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_weight_that_is_computed_is_adapted_and_never_merged(norm: Any, kind: str) -> None:
    """What is put beside the parameters it is computed from would be ignored, and the adapter lost in silence."""
    torch.manual_seed(0)
    layer = nn.Linear(8, 8) if kind == "linear" else nn.Conv2d(4, 8, 3, padding=1)
    x = torch.randn(2, 8) if kind == "linear" else torch.randn(2, 4, 5, 5)
    base = nn.Sequential(OrderedDict(part=norm(layer, "weight"))).eval()
    names, before = set(base.state_dict()), base(x).detach()
    for config in (
        LoraConfig(r=2, target_modules=["part"], init_lora_weights=False),
        HRAConfig(r=2, target_modules=["part"], init_weights=False),  # on convolutions by its weight
    ):
        model = get_peft_model(base, config).eval()
        adapted = model(x).detach()
        assert not torch.allclose(adapted, before, atol=1e-2)
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(ReadOnlyWeight, match="computed from others"):
                merge()
            assert torch.equal(model(x), adapted)
        assert torch.equal(model.unload()(x), before)
        assert set(base.state_dict()) == names
    with pytest.raises(ReadOnlyWeight, match="computed from others"):
        get_peft_model(base, LoraConfig(r=2, target_modules=["part"], init_lora_weights="pissa"))
    assert torch.equal(base(x), before)
    assert set(base.state_dict()) == names
