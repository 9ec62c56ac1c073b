"""Copies that share a model's parameters and nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.models import llama, tokens, toy
from trimtab import LoraConfig, detached_copy, get_peft_model

IDS = tokens(2, 6, 64)


def test_several_models_over_one_base() -> None:
    """The base stays as it is and usable; each copy has adapters, and a choice of the active one, of its own."""
    base = llama().eval()
    modules, wanted = dict(base.named_modules()), base(IDS).logits
    parts = [get_peft_model(detached_copy(base), LoraConfig(r=2, init_lora_weights=False)).eval() for _ in range(2)]
    outs = [part(IDS).logits for part in parts]
    assert torch.equal(base(IDS).logits, wanted)
    assert dict(base.named_modules()) == modules
    assert not torch.equal(*outs)
    frozen = {id(p) for p in base.parameters()}
    for part in parts:
        mine = {id(p): p for p in part.parameters()}
        assert frozen <= mine.keys()
        assert sum(p.numel() for i, p in mine.items() if i not in frozen) == part.get_nb_trainable_parameters()[0]
    parts[0].merge_adapter()
    with parts[1].disable_adapter():
        assert torch.equal(parts[1](IDS).logits, wanted)
    assert torch.equal(base(IDS).logits, wanted)
    torch.testing.assert_close(parts[0](IDS).logits, outs[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(parts[1](IDS).logits, outs[1])


def test_ties_hold_and_buffers_are_shared_or_not() -> None:
    net = toy()
    net.register_buffer("count", torch.zeros(2))
    net.also = net.head
    shared, apart = detached_copy(net), detached_copy(net, share_buffers=False)
    net.count += 1
    assert torch.equal(shared.count, torch.ones(2))
    assert torch.equal(apart.count, torch.zeros(2))
    assert shared.also is shared.head
    assert shared.head is not net.head
    assert shared.head.weight is net.head.weight
    assert isinstance(shared, type(net))


@pytest.mark.parametrize("active", ["one", "two"])
def test_a_peft_model_with_another_adapter_active(active: str) -> None:
    """Adapters are shared, too; which one is active is each model's own."""
    model = get_peft_model(llama(), LoraConfig(r=2, init_lora_weights=False), adapter_name="one").eval()
    model.add_adapter("two", LoraConfig(r=2, init_lora_weights=False))
    alone = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        alone[name] = model(IDS).logits
    other = detached_copy(model)
    other.set_adapter(active)
    model.set_adapter("one")
    assert torch.equal(other(IDS).logits, alone[active])
    assert torch.equal(model(IDS).logits, alone["one"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{active}." in name:
                parameter.mul_(0)
    with other.disable_adapter():
        base = other(IDS).logits
    torch.testing.assert_close(other(IDS).logits, base)


def test_hooks_go_along() -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    net[0].register_forward_hook(lambda module, args, out: out * 0)
    assert not detached_copy(net)(torch.ones(1, 2)).any()
    assert not copy.deepcopy(net)(torch.ones(1, 2)).any()
