"""Routes: threads, heads and time-major layers in mixed batches, and recomputation under another route."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.contract.cases import move, tensors
from tests.models import llama, tokens, toy
from trimtab import LoHaConfig, LoraConfig, OFTConfig, VeraConfig, get_peft_model
from trimtab.errors import RouteError

IDS = tokens()


def close(a: Any, b: Any, atol: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=atol)


def two(net: nn.Module, **fields: Any) -> Any:
    """A model with adapters "one" and "two", moved."""
    config = LoraConfig(r=2, **fields)
    model = get_peft_model(net, config, "one")
    model.add_adapter("two", config)
    for name in ("one", "two"):
        move(model, name)
    return model.eval()


# ---------------------------------------------------------------------- threads
def in_threads(work: list[Callable[[], None]]) -> list[BaseException]:
    """Run at the same time; what was raised."""
    raised: list[BaseException] = []
    start = threading.Barrier(len(work), timeout=60)

    def guarded(job: Callable[[], None]) -> None:
        start.wait()
        try:
            job()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=guarded, args=(job,)) for job in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return raised


def test_threads_with_adapter_names_of_their_own_are_all_right() -> None:
    model = two(llama(), target_modules=["q_proj", "down_proj"])
    ids = tokens(3, 6, 64)
    batches = [["one", "two", "__base__"], ["two", "one", "one"], ["__base__", "two", "one"]]
    expected = [model(ids, adapter_names=names).logits for names in batches]
    plain = model(ids).logits
    wrong: list[int] = []

    def job(i: int) -> Callable[[], None]:
        def run() -> None:
            for _ in range(10):
                y = model(ids, adapter_names=batches[i]).logits if i < 3 else model(ids).logits
                wrong.extend([i] if not torch.equal(y, expected[i] if i < 3 else plain) else [])

        return run

    with torch.no_grad():
        assert in_threads([job(i) for i in range(4)]) == []
    assert wrong == []
    assert torch.equal(model(ids).logits, plain), "the model is not left routed"


def test_another_thread_inside_a_callers_block_is_right_or_raises() -> None:
    model = two(toy(), target_modules=["up", "head"])
    expected = model(IDS)
    inside, done = threading.Event(), threading.Event()
    seen: list[Any] = []

    def elsewhere() -> None:
        inside.wait()
        try:
            seen.append(model(IDS))
        except RouteError as error:
            seen.append(error)
        try:
            seen.append(model(IDS, adapter_names=["two"] * 4))
        finally:
            done.set()

    thread = threading.Thread(target=elsewhere)
    thread.start()
    with model.disable_adapter():
        inside.set()
        assert done.wait(60)
        assert torch.equal(model(IDS), toy()(IDS))
    thread.join()
    assert isinstance(seen[0], RouteError) or torch.equal(seen[0], expected)
    model.set_adapter("two")
    close(seen[1], model.eval()(IDS))


def test_a_thread_that_fails_leaves_no_route() -> None:
    model = two(toy(), target_modules=["up"])
    expected = model(IDS)
    raised = in_threads([lambda: model(torch.full_like(IDS, 99), adapter_names=["two"] * 4)])
    assert len(raised) == 1
    assert torch.equal(model(IDS), expected)


def many(count: int) -> Any:
    """More adapters than stay in the module tree unused."""
    config = LoraConfig(r=2, target_modules=["up", "head"])
    model = get_peft_model(toy(), config, "a0")
    for i in range(1, count):
        model.add_adapter(f"a{i}", config)
    for i in range(count):
        model.set_adapter(f"a{i}")
        move(model, f"a{i}")
    model.set_adapter("a0")
    return model.eval()


@torch.no_grad()
def test_threads_that_bring_in_more_adapters_than_stay_are_all_right() -> None:
    model, ids = many(40), tokens(10, 5)
    batches = [[f"a{10 * i + k}" for k in range(10)] for i in range(4)]
    expected = [model(ids, adapter_names=names) for names in batches]
    wrong: list[int] = []

    def job(i: int) -> Callable[[], None]:
        def run() -> None:
            for _ in range(25):
                wrong.extend([] if torch.equal(model(ids, adapter_names=batches[i]), expected[i]) else [i])

        return run

    assert in_threads([job(i) for i in range(4)]) == []
    assert wrong == []


@torch.no_grad()
def test_what_a_block_routes_stays_while_others_come_and_go_inside() -> None:
    model, ids = many(40), tokens(10, 5)
    outer = [f"a{k}" for k in range(10, 20)]
    expected = model(ids, adapter_names=outer)
    with model.base_model.routed(outer):
        for start in (20, 30):
            model(ids, adapter_names=[f"a{start + k}" for k in range(10)])
        for name in ("a20", "a30", *(f"a{k}" for k in range(25, 36))):
            model.set_adapter(name)
        assert torch.equal(model(ids), expected)


# ---------------------------------------------------------------------- mixed batches
class Headed(nn.Module):
    """A head that takes its input by name, and a second tensor of rows beside it."""

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(6, 3)

        def forward(self, hidden: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
            y = self.out(hidden) * scale
            return y if mask is None else y * mask[..., None]

    def __init__(self, how: str) -> None:
        super().__init__()
        self.up, self.head, self.how = nn.Linear(6, 6), self.Head(), how

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.up(x)
        if self.how == "by name":
            return self.head(hidden=h)
        if self.how == "both by name":
            return self.head(mask=mask, hidden=h, scale=2.0)
        return self.head(h, mask)


@pytest.mark.parametrize("how", ["by name", "both by name", "in order"])
def test_a_head_that_is_trained_whole_gets_its_rows(how: str) -> None:
    torch.manual_seed(0)
    model = two(Headed(how), target_modules=["up"], modules_to_save=["head"])
    with torch.no_grad():
        for i, name in enumerate(("one", "two")):
            model.base_model.model.head.modules_to_save[name].out.weight.add_(i + 1)
    x, mask = torch.randn(5, 4, 6), torch.rand(5, 4)
    names = ["two", "one", "__base__", "two", "one"]
    mixed = model(x, mask, adapter_names=names)
    for i, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                close(mixed[[i]], model(x[[i]], mask[[i]]))
        else:
            model.set_adapter(name)
            close(mixed[[i]], model.eval()(x[[i]], mask[[i]]))


class TimeMajor(nn.Module):
    """A model whose inner layer sees (time, rows, d)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.out = nn.Embedding(13, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        h = self.embed(input_ids).transpose(0, 1)
        return self.out(torch.tanh(self.up(h)).transpose(0, 1))


@pytest.mark.parametrize("length", [5, 3, 8])
def test_a_layer_that_sees_time_first_is_dealt_by_rows(length: int) -> None:
    torch.manual_seed(0)
    model = two(TimeMajor(), target_modules=["up"])
    ids, names = tokens(4, length), ["two", "one", "__base__", "one"]
    mixed = model(ids, adapter_names=names)
    for i, name in enumerate(names[:2]):
        model.set_adapter(name)
        close(mixed[[i]], model.eval()(ids[[i]]))


# ---------------------------------------------------------------------- recomputation
class Blocks(nn.Module):
    """Two blocks, checkpointed by hand."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b, self.how = nn.Linear(6, 6), nn.Linear(6, 6), how

    def forward(self, x: Tensor) -> Tensor:
        for block in (self.a, self.b):

            def run(h: Tensor, block: nn.Module = block) -> Tensor:
                return torch.tanh(block(h))

            x = run(x) if self.how == "none" else checkpoint(run, x, use_reentrant=self.how == "reentrant")
        return x


def gradients(how: str, act: Callable[[Any, Tensor], Tensor]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = two(Blocks(how), target_modules=["a", "b"])
    model.set_requires_grad(["one", "two"])
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(3), requires_grad=True)
    act(model, x).square().sum().backward()
    return {n: p.grad for name in ("one", "two") for n, p in tensors(model, name).items() if p.grad is not None}


def switched(model: Any, x: Tensor) -> Tensor:
    model.set_adapter("one")
    y = model(x)
    model.set_adapter("two")
    model.set_requires_grad("one")
    with torch.no_grad():
        model(x)
    return y


def other_forward_too(model: Any, x: Tensor) -> Tensor:
    y = switched(model, x)
    return y + 2 * model(x)


def reference(model: Any, x: Tensor) -> Tensor:
    y = model(x)
    with torch.no_grad(), model.disable_adapter():
        model(x)
    return y


def left_off(model: Any, x: Tensor) -> Tensor:
    y = model(x)
    model.base_model.disable_adapter_layers()
    return y


def within_reference(model: Any, x: Tensor) -> Tensor:
    with model.disable_adapter():
        ref = model(x)
    return model(x) - ref


@pytest.mark.parametrize("how", ["reentrant", "plain"])
@pytest.mark.parametrize("act", [switched, other_forward_too, reference, left_off, within_reference])
def test_gradients_of_hand_made_checkpointing_are_those_without(how: str, act: Callable[[Any, Tensor], Tensor]) -> None:
    expected, found = gradients("none", act), gradients(how, act)
    assert found.keys() == expected.keys()
    assert any(g.abs().max() > 0 for g in expected.values())
    for key, gradient in expected.items():
        close(found[key], gradient)


# ---------------------------------------------------------------------- autocast
@pytest.mark.parametrize(
    "config",
    [
        LoHaConfig(r=2, target_modules=["up", "down", "conv"]),
        LoHaConfig(r=2, target_modules=["conv"], use_effective_conv2d=True),
        OFTConfig(oft_block_size=2, target_modules=["up"]),
        VeraConfig(r=3, target_modules=["up"]),
        LoraConfig(r=2, target_modules=["up", "head"], use_dora=True),
        LoraConfig(r=2, target_modules=["up", "embed", "conv"]),
    ],
    ids=["loha", "loha conv", "oft", "vera", "dora", "lora"],
)
@pytest.mark.parametrize("backward", ["inside", "outside"])
def test_autocast_trains_an_fp32_base(config: Any, backward: str) -> None:
    model = get_peft_model(toy(), config)
    move(model, "default")
    model.train()
    model(IDS).square().sum().backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(IDS).float().square().sum()
        if backward == "inside":
            loss.backward()
    if backward == "outside":
        loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            assert parameter.grad.dtype == torch.float32
            scale = float(wanted[name].abs().max()) + 1e-6
            assert float((parameter.grad - wanted[name]).abs().max()) < 0.1 * scale, name


def test_a_second_derivative_is_right_or_refused() -> None:
    """Whatever functions with a backward of their own there are: they differentiate twice, or say that they cannot."""
    model = get_peft_model(toy(torch.float64), LoraConfig(r=2, target_modules=["up", "head"])).train()
    move(model, "default")
    free = [p for p in model.parameters() if p.requires_grad]
    factor = free[0]

    def steepness() -> Tensor:
        gradients = torch.autograd.grad(torch.tanh(model(IDS)).sum(), free, create_graph=True)
        return torch.stack([g.square().sum() for g in gradients]).sum()

    found = torch.autograd.grad(steepness(), factor)[0]
    with torch.no_grad():
        factor[0, 0] += 1e-5
    above = float(steepness().detach())
    with torch.no_grad():
        factor[0, 0] -= 2e-5
    below = float(steepness().detach())
    close(found[0, 0], torch.tensor((above - below) / 2e-5, dtype=torch.float64), 1e-4 * float(found.abs().max()))
