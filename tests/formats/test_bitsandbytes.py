"""4-bit weights that bitsandbytes would repack for AVX512-BF16 processors: ours are as on every other processor.

There its layers repack their weight at the first forward in evaluation mode and have no gradient from then on, in
training mode neither. The layers here say that they are on such a processor (`FLAG`), and `repack` does what their
forward does; so every test means the same on every processor.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional as bnb
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor, nn

from tests.formats.test_weights import bits
from tests.models import assert_untouched, llama, snapshot, tokens
from tests.quantised import quantise, quantised_model
from trimtab import LoraConfig, PeftModel, PromptTuningConfig, dequantize, get_peft_model
from trimtab.errors import NoMatchingPeftModuleError
from trimtab.formats import weights

FLAG = "support_avx512bf16_for_cpu"
WIDE, NARROW = 192, 128  # rows of several whole blocks of 64 numbers, in whole blocks of 32: others cannot be repacked
FORMATS = ["bnb-nf4", "bnb-nf4-double", "bnb-fp4", "bnb-nf4-bf16-storage"]
each = pytest.mark.parametrize("name", FORMATS)


def layer_of(name: str, into: int = WIDE, out: int = NARROW) -> Any:
    layer = quantise(nn.Linear(into, out), name)
    assert hasattr(layer, FLAG), "bitsandbytes has another name for it: see formats/bitsandbytes.py"
    setattr(layer, FLAG, True)
    return layer


def repack(*models: nn.Module) -> None:
    """What a forward in evaluation mode does to the 4-bit layers."""
    for layer in (m for model in models for m in model.modules() if isinstance(m, Linear4bit)):
        layer.weight.data, _ = bnb._convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)


def packed(model: nn.Module) -> bool:
    found = [m.weight.quant_state for m in model.modules() if isinstance(m, Linear4bit)]
    assert found
    return any(getattr(state, "packing_format_for_cpu", False) for state in found)


def net(name: str) -> nn.Sequential:
    """Three 4-bit layers; the one between is never adapted."""
    torch.manual_seed(3)
    layers = {"low": layer_of(name), "mid": layer_of(name, NARROW, NARROW), "high": layer_of(name, NARROW, 32)}
    steps = OrderedDict((n, m) for key, layer in layers.items() for n, m in ((key, layer), (f"{key}_act", nn.Tanh())))
    return nn.Sequential(steps)


def inputs() -> Tensor:
    return torch.randn(5, WIDE, generator=torch.Generator().manual_seed(1))


def adapted(base: nn.Module) -> Any:
    config = LoraConfig(r=4, target_modules=["low", "high"], init_lora_weights=False)
    torch.manual_seed(4)
    return get_peft_model(base, config)


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return found if x.grad is None else {**found, "x": x.grad}


# ---------------------------------------------------------------------- the format
@each
def test_a_repacked_weight_is_read_to_the_precision_of_its_scales(name: str) -> None:
    layer = layer_of(name)
    W = weights.read(layer, layer.weight)
    repack(layer)
    torch.testing.assert_close(weights.read(layer, layer.weight), W, rtol=2**-8, atol=1e-7)  # they went to bf16
    assert packed(layer), "reading leaves it as it is"


@each
def test_pinning_unpacks_and_no_forward_repacks(name: str) -> None:
    layer, x = layer_of(name).eval(), inputs()
    attributes = sorted(layer.__dict__)
    repack(layer)
    W = weights.read(layer, layer.weight)
    weight = layer.weight
    weights.pin(layer)
    assert layer.weight is weight
    assert not packed(layer)
    assert layer.weight.quant_state is not None
    assert torch.equal(weights.read(layer, layer.weight), W)
    before = bits(layer, layer.weight)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), nn.functional.linear(x, W, layer.bias), rtol=1e-5, atol=1e-5)
    assert not packed(layer)
    assert all(torch.equal(a, b) for a, b in zip(before, bits(layer, layer.weight), strict=True))
    x.requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, W.sum(0).expand_as(x), rtol=1e-4, atol=1e-5)
    weights.unpin(layer)
    assert getattr(layer, FLAG) is True
    assert sorted(layer.__dict__) == attributes


def test_pins_are_counted_and_change_no_other_processor() -> None:
    layer, other = layer_of("bnb-nf4"), layer_of("bnb-nf4")
    setattr(other, FLAG, False)
    repack(other)  # elsewhere, or before it was told not to
    model = nn.Sequential(layer, other, nn.Linear(2, 2))
    weights.unpin(model)  # of no pin: nothing
    assert (getattr(layer, FLAG), getattr(other, FLAG)) == (True, False)
    weights.pin(model)
    assert not packed(other)
    weights.pin(model)
    weights.unpin(model)
    assert (getattr(layer, FLAG), getattr(other, FLAG)) == (False, False)
    weights.unpin(model)
    assert (getattr(layer, FLAG), getattr(other, FLAG)) == (True, False)


@each
def test_an_unpacked_weight_is_saved_whole(name: str) -> None:
    """bitsandbytes' own way back leaves the scales of a weight with plain scales transposed."""
    layer = layer_of(name)
    repack(layer)
    W = weights.read(layer, layer.weight)
    weights.pin(layer)
    saved = layer.state_dict()
    stats = {k.removeprefix("weight."): v for k, v in saved.items() if k.startswith("weight.")}
    again = layer_of(name)
    again.weight = Params4bit.from_prequantized(saved["weight"], stats, device="cpu", module=again)
    again.bias = layer.bias
    assert torch.equal(weights.read(again, again.weight), W)
    assert torch.equal(again(inputs()), layer(inputs()))


# ---------------------------------------------------------------------- models
@each
@pytest.mark.parametrize("training", [True, False])
def test_an_evaluation_first_changes_no_gradient(name: str, training: bool) -> None:
    """The silent one: a QLoRA run that evaluates before it trains."""
    fresh, evaluated = adapted(net(name)), adapted(net(name))
    with torch.no_grad():
        before = evaluated.eval()(inputs())
    evaluated.eval()(inputs())
    wanted = gradients(fresh.train(training), inputs().requires_grad_())
    found = gradients(evaluated.train(training), inputs().requires_grad_())
    assert wanted.keys() == found.keys()
    assert "x" in wanted
    assert any("low.lora_A" in key for key in wanted)
    for key, gradient in wanted.items():
        assert gradient.abs().sum() > 0, key
        assert torch.equal(found[key], gradient), key
    assert torch.equal(evaluated.eval()(inputs()), before)


@each
def test_a_base_that_was_evaluated_before(name: str) -> None:
    """Its scales are rounded by then; all else is as for a plain model of the numbers that are left."""
    base, x = net(name), inputs()
    repack(base)
    plain = dequantize(copy.deepcopy(base))
    before = [weights.read(m, m.weight) for m in (base.low, base.mid, base.high)]
    model, twin = adapted(base).eval(), adapted(plain).eval()
    assert not packed(model)
    with torch.no_grad():
        torch.testing.assert_close(model(x), twin(x), rtol=1e-5, atol=1e-5)
    wanted = gradients(twin, inputs().requires_grad_())
    for run in (model, copy.deepcopy(model)):
        found = gradients(run, inputs().requires_grad_())
        assert wanted.keys() == found.keys()
        for key, gradient in wanted.items():
            torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-5)
    output = model(x)
    with model.disable_adapter(), twin.disable_adapter():
        untouched = model(x)
        torch.testing.assert_close(untouched, twin(x), rtol=1e-5, atol=1e-5)
    model.merge_adapter()
    assert (model(x) - output).norm() < 0.3 * output.norm()
    with model.disable_adapter():
        assert torch.equal(model(x), untouched)
    model.unmerge_adapter()
    assert torch.equal(model(x), output)
    back = model.unload()
    assert back is base
    assert all(torch.equal(weights.read(m, m.weight), W) for m, W in zip((base.low, base.mid, base.high), before))


@pytest.mark.parametrize("name", FORMATS[:-1])  # bytes seen as bf16 may be NaN, which equals nothing
def test_the_base_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    base, x = net(name).eval(), inputs()
    before = snapshot(base)
    model = adapted(base).eval()
    with torch.no_grad():
        output = model(x)
    model.save_pretrained(tmp_path)
    assert model.unload() is base
    assert_untouched(base, before)
    assert all(getattr(m, FLAG) for m in base.modules() if isinstance(m, Linear4bit))
    with torch.no_grad():
        assert torch.equal(PeftModel.from_pretrained(base, tmp_path)(x), output)


def test_adapters_taken_out_by_hand_leave_no_pin() -> None:
    base: Any = net("bnb-nf4")
    adapted(base)
    base.low, base.high = base.low.base_layer, base.high.base_layer
    again = adapted(base)
    assert not getattr(base.mid, FLAG)
    again.unload()
    assert all(getattr(m, FLAG) for m in base.modules() if isinstance(m, Linear4bit))


def test_a_failed_start_leaves_the_processors_way() -> None:
    base = net("bnb-nf4")
    before = snapshot(base)
    with pytest.raises(NoMatchingPeftModuleError):
        get_peft_model(base, LoraConfig(target_modules=["nowhere"]))
    assert_untouched(base, before)
    assert getattr(base.low, FLAG)


def test_a_prompt_has_its_gradient_after_an_evaluation() -> None:
    """No layer is adapted, and yet the gradient has to pass all of them."""
    ids, found = tokens(vocabulary=64), []
    for evaluate in (False, True):
        base = quantised_model(llama(hidden_size=64, intermediate_size=64), "bnb-nf4")
        for layer in (m for m in base.modules() if isinstance(m, Linear4bit)):
            setattr(layer, FLAG, True)
        torch.manual_seed(0)
        model = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
        if evaluate:
            with torch.no_grad():
                model.eval()(input_ids=ids)
        model.train()(input_ids=ids, labels=ids).loss.backward()
        (prompt,) = (p for p in model.parameters() if p.requires_grad)
        found.append(prompt.grad)
    assert found[0].abs().sum() > 0
    assert torch.equal(*found)
