"""Gradient checkpointing: the recomputation sees the adapters of the forward it repeats (law 12)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from tests.contract.cases import move, tensors
from tests.models import llama, tokens
from trimtab import LoraConfig, get_peft_model
from trimtab.errors import RouteError

MODES = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
TARGETS = ["q_proj", "v_proj", "down_proj"]


def ids() -> Tensor:
    return tokens(3, 6, 64)


def adapted(reentrant: bool | None, when: str = "after") -> Any:
    """A tiny Llama with two adapters, both trainable; checkpointed before or after it was adapted, or not (None)."""
    base = llama()
    arguments = {"use_reentrant": reentrant}
    if reentrant is not None and when == "before":
        base.gradient_checkpointing_enable(arguments)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=TARGETS))
    model.add_adapter("other", LoraConfig(r=3, target_modules=TARGETS))
    if reentrant is not None and when == "after":
        model.gradient_checkpointing_enable(arguments)
    for name in ("default", "other"):
        move(model, name)
    model.set_requires_grad(["default", "other"], True)
    return model.train()


def gradients(model: Any) -> dict[str, Tensor]:
    found = {}
    for name in ("default", "other"):
        for key, parameter in tensors(model, name).items():
            found[key] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
    model.zero_grad()
    return found


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert any(v.abs().max() > 0 for v in expected.values())
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, msg=lambda m, k=key: f"{k}: {m}")


def loss(model: Any) -> Tensor:
    return model(input_ids=ids(), labels=ids()).loss


@MODES
@pytest.mark.parametrize("when", ["before", "after"])
def test_gradients_are_those_without_it(reentrant: bool, when: str) -> None:
    plain, model = adapted(None), adapted(reentrant, when)
    assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    for each in (plain, model):
        loss(each).backward()
    assert_same(gradients(model), gradients(plain))


@MODES
def test_switching_before_backward_changes_nothing(reentrant: bool) -> None:
    """Two losses of two adapters, and a backward pass through both after a third switch."""
    results = []
    for model in (adapted(None), adapted(reentrant)):
        first = loss(model)
        model.set_adapter("other")
        model.set_requires_grad("default", True)
        second = loss(model)
        model.set_adapter("default")
        model.set_requires_grad("other", True)
        with model.disable_adapter():
            (first + 2 * second).backward()
        results.append(gradients(model))
    assert_same(results[1], results[0])
    parts = {
        name: sum(float(v.abs().sum()) for k, v in results[1].items() if f".{name}." in k)
        for name in ("default", "other")
    }
    assert all(parts.values()), parts


@MODES
def test_leaving_disable_adapter_before_backward(reentrant: bool) -> None:
    """The loss of the plain base, taken inside `disable_adapter()`, gives the adapters no gradient."""
    results = []
    for model in (adapted(None), adapted(reentrant)):
        hook = model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_())
        with model.disable_adapter():
            base = loss(model)
        hook.remove()
        assert base.requires_grad
        ours = loss(model)
        (ours - base).backward()
        results.append(gradients(model))
    assert_same(results[1], results[0])
    plain = adapted(None)
    loss(plain).backward()
    assert_same(results[1], gradients(plain))


@MODES
def test_a_reference_pass_in_between(reentrant: bool) -> None:
    """As DPO does it: policy, then the reference without gradients inside `disable_adapter()`, then backward."""
    results = []
    for model in (adapted(None), adapted(reentrant)):
        policy = loss(model)
        with torch.no_grad(), model.disable_adapter():
            reference = loss(model)
        (policy - reference).square().backward()
        results.append(gradients(model))
    assert_same(results[1], results[0])


@MODES
def test_mixed_batch_recomputes_its_rows(reentrant: bool) -> None:
    results = []
    for mode in (None, reentrant):
        model = adapted(mode).eval()
        for block in model.modules():
            if hasattr(block, "gradient_checkpointing"):
                block.train()  # blocks checkpoint in training mode only; adapter_names wants evaluation mode
        model.training = False
        out = model(input_ids=ids(), adapter_names=["other", "__base__", "default"])
        out.logits.square().mean().backward()
        results.append(gradients(model))
    assert_same(results[1], results[0])


@MODES
def test_unload_and_disable_leave_no_trace(reentrant: bool) -> None:
    base = llama()
    model = get_peft_model(base, LoraConfig(r=2, target_modules=TARGETS))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.unload()
    base.train()
    base.requires_grad_(True)
    base(input_ids=ids(), labels=ids()).loss.backward()
    assert base.model.layers[0].self_attn.q_proj.weight.grad.abs().max() > 0


class HandWired(nn.Module):
    """A model that checkpoints on its own account (or, not `wired`, does not)."""

    def __init__(self, reentrant: bool, wired: bool, foreign: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.reentrant = nn.Linear(4, 6), nn.Linear(6, 3), reentrant
        self.wired, self.foreign = wired, foreign

    def forward(self, x: Tensor) -> Tensor:
        def run(v: Tensor) -> Tensor:
            return self.down(torch.tanh(self.up(v)))

        if self.foreign is not None:
            return self.foreign(run, x)
        return torch.utils.checkpoint.checkpoint(run, x, use_reentrant=self.reentrant) if self.wired else run(x)


@MODES
def test_checkpointing_wired_by_hand_follows_the_route_of_its_forward(reentrant: bool) -> None:
    """Whoever calls torch's checkpointing: switching adapters, or all of them off, before backward changes nothing."""
    targets = LoraConfig(r=2, target_modules=["up", "down"])
    x = torch.randn(5, 4, requires_grad=True)
    results = []
    for wired in (False, True):
        model = get_peft_model(HandWired(reentrant, wired), targets)
        model.add_adapter("other", targets)
        for name in ("default", "other"):
            move(model, name)
        model.set_requires_grad(["default", "other"], True)
        model.train()
        first = model(x).square().sum()
        model.set_adapter("other")
        model.set_requires_grad("default", True)
        second = model(x).square().sum()
        with torch.no_grad(), model.disable_adapter():
            model(x)
        (first + 2 * second).backward()
        with model.disable_adapter():
            off = model(x).square().sum()
        off.backward()
        results.append(gradients(model))
    assert_same(results[1], results[0])


class Repeated(torch.autograd.Function):
    """Checkpointing that is not torch's own."""

    @staticmethod
    def forward(ctx: Any, run: Any, x: Tensor) -> Tensor:
        ctx.run, ctx.x = run, x
        return run(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x = ctx.x.detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.run(x)
        torch.autograd.backward(y, *gradients)
        return None, x.grad


def test_foreign_checkpointing_raises_rather_than_lies() -> None:
    """The documented limit: for it the route must still stand when the backward pass comes."""
    model = get_peft_model(HandWired(False, True, Repeated.apply), LoraConfig(r=2, target_modules=["up", "down"]))
    model.train()
    move(model, "default")
    x = torch.randn(5, 4, requires_grad=True)
    model(x).square().sum().backward()  # unchanged route: right
    assert all(p.grad.abs().max() > 0 for p in tensors(model).values())
    model.zero_grad()
    out = model(x).square().sum()
    model.base_model.disable_adapter_layers()
    with pytest.raises(RouteError, match="recomputed in the backward pass"):
        out.backward()
    assert all(p.grad is None for p in tensors(model).values())
