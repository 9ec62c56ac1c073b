"""Activations made again in the backward pass: bit by bit what they were, or not at all."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trimtab.core.kernels.rebuilt import Rebuilt, rebuilt

norm = torch.rand(8) + 0.5


def rms(x: Tensor) -> Tensor:
    """As transformers' Llama spells it."""
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return norm.to(x.dtype) * wide.to(x.dtype)


MADE: dict[str, Callable[[Tensor], Tensor]] = {
    "a gated activation": lambda x: F.silu(x + 1) * (x - 1),
    "a norm": lambda x: rms(x + 1),
    "a norm in half precision": lambda x: rms((x + 1).bfloat16()),
    "silu": lambda x: F.silu(x + 1),
    "gelu": lambda x: F.gelu(x + 1),
    "gelu by tanh": lambda x: F.gelu(x + 1, approximate="tanh"),
    "relu": lambda x: F.relu(x + 1),
    "a product of products": lambda x: (x * (x + 1)) * (x + 2),
}
SAVED: dict[str, Callable[[Tensor], Tensor]] = {
    "a leaf": lambda x: x,
    "no gradient": lambda x: x.detach() * 2,
    "a sum": lambda x: x + x,
    "a product with a constant that nothing keeps": lambda x: (x + 1) * norm,
    "a linear layer": lambda x: x @ torch.eye(8),
    "layer norm": lambda x: F.layer_norm(x, (8,)),
}


def start() -> Tensor:
    return torch.randn(3, 8).requires_grad_()


@pytest.mark.parametrize("name", MADE)
def test_the_same_bits(name: str) -> None:
    x = MADE[name](start())
    found = rebuilt(x)
    assert found is not None
    with torch.no_grad():
        again = found.take()
    assert torch.equal(again, x)
    assert again.dtype == x.dtype


@pytest.mark.parametrize("name", SAVED)
def test_what_must_be_saved(name: str) -> None:
    assert rebuilt(SAVED[name](start())) is None


def test_changed_in_place() -> None:
    """A tensor that was changed after it was made is not what its operands give."""
    x = start() * start()
    x += 1
    assert rebuilt(x) is None


def test_one_value_for_all_users_and_none_left() -> None:

    def use() -> None:
        x = start() * start()
        found = [rebuilt(x) for _ in range(3)]
        assert len(set(map(id, found))) == 1
        with torch.no_grad():
            values = [f.take() for f in found]
        assert len(set(map(id, values))) == 1
        assert found[0].value is None

    before = len(Rebuilt.known)
    use()
    assert len(Rebuilt.known) == before


def test_not_under_hooks() -> None:
    """Checkpointing unpacks a saved tensor once."""
    seen: list[object] = []

    def run(x: Tensor) -> Tensor:
        x = x * (x + 1)
        seen.append(rebuilt(x))
        return x.sin()

    checkpoint(run, start(), use_reentrant=False).sum().backward()
    with torch.autograd.graph.save_on_cpu():
        run(start())
    assert seen == [None, None, None]


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_came_out_of_a_checkpoint(reentrant: bool) -> None:
    """Its nodes' tensors are packed though no hook is on any more."""
    made = checkpoint(lambda x: (x + 1) * (x * 2).sin(), start(), use_reentrant=reentrant)
    assert rebuilt(made) is None
    assert rebuilt(F.silu(made)) is not None


def test_in_a_real_model() -> None:
    """The inputs of every linear layer of a Llama block but those that are kept by attention anyway."""
    from tests.models import llama

    model, made = llama(), {}
    model.requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda m, i, o: o.requires_grad_())
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_pre_hook(lambda m, i, name=name: made.update({name: (i[0], rebuilt(i[0]))}))
    model(torch.arange(6)[None])
    for name, (x, found) in made.items():
        if name.endswith("o_proj") or name == "lm_head":
            continue
        assert found is not None, name
        with torch.no_grad():
            assert torch.equal(found.take(), x), name
