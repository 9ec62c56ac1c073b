"""Layers of one input stepped together, against the same layers by single operations; and when they are not."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from tests.contract.cases import move, tensors
from trimtab import LoraConfig, get_peft_model
from trimtab.core.site import LinearSite

WIDTH, TARGETS = 6, ["q", "k", "v", "o"]
Forward = Callable[[Any, Tensor], Tensor]


class Net(nn.Module):
    """Three layers of one input and a fourth behind them, called as `run` says."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 5, bias=False), nn.Linear(WIDTH, 8)
        self.o = nn.Linear(8, WIDTH)
        self.scale = nn.Parameter(torch.rand(WIDTH) + 0.5, requires_grad=False)
        self.run: Forward = usual

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, self.scale * torch.tanh(x))


def joined(net: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return net.o(torch.sigmoid(q) * v) * torch.tanh(k).sum(-1, keepdim=True)


def usual(net: Any, h: Tensor) -> Tensor:
    return joined(net, net.q(h), net.k(h), net.v(h))


def model_of(dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    model = get_peft_model(Net().to(dtype), LoraConfig(r=3, target_modules=TARGETS, **options))
    move(model, "default")
    return model.train()


def net_of(model: Any) -> Any:
    return model.base_model.model


def inputs(dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(4, 5, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def step(model: Any, x: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(3)
    model.zero_grad()
    x = x.detach().requires_grad_()
    y = model(x)
    (y * y.detach().cos()).sum().backward()
    return {"y": y.detach(), "x": x.grad} | {n: p.grad.clone() for n, p in tensors(model).items() if p.grad is not None}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error = float((actual[name] - value).double().norm() / value.double().norm().clamp_min(1e-30))
        assert error <= tolerance, f"{name}: {error:.1e}"


def nodes(model: Any) -> int:
    """How many nodes of the autograd graph the outputs of q, k and v are from."""
    net, h = net_of(model), inputs().to(model.base_model.model.scale.dtype).requires_grad_()
    outputs = [net.q(h), net.k(h), net.v(h)]
    return len({id(y.grad_fn) for y in outputs})


@pytest.fixture
def single(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Tensor]]:
    """`step` with every layer computed by single operations."""

    def run(model: Any, x: Tensor) -> dict[str, Tensor]:
        with monkeypatch.context() as patch:
            patch.setattr(LinearSite, "plain", lambda self: None)
            return step(model, x)

    return run


# ---------------------------------------------------------------------- the same numbers
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["dry", "dropout"])
def test_equals_single_operations(p: float, single: Any) -> None:
    """From the second step on they go together; the adapters move in between. For fp32 see tests/core/kernels."""
    model = model_of(lora_dropout=p)
    assert nodes(model) == 3
    assert nodes(model) == 1
    for seed in range(3):
        x = inputs(seed=seed)
        assert_same(step(model, x), single(model, x))
        move(model, "default")
    assert nodes(model) == 1


def test_derivatives() -> None:
    model, x = model_of(), inputs()[:2, :2].requires_grad_()
    step(model, x)
    own = list(tensors(model).values())

    def run(x: Tensor, *_: Tensor) -> Tensor:
        return model(x)

    assert torch.autograd.gradcheck(run, (x, *own))
    assert torch.autograd.gradgradcheck(run, (x, *own))


def test_scales_of_their_own(single: Any) -> None:
    model, x = model_of(rank_pattern={"k": 2}, alpha_pattern={"v": 5}), inputs()
    step(model, x)
    assert nodes(model) == 1
    assert_same(step(model, x), single(model, x))


def test_without_gradients(single: Any) -> None:
    model, x = model_of().eval(), inputs()
    step(model, x)
    for v in (x, x[:1, :1], x[0], x[:0]):
        with torch.enable_grad():
            wanted = single(model, v)["y"]
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                torch.testing.assert_close(model(v), wanted)


def test_autocast(single: Any) -> None:
    model, x = model_of(torch.float32), inputs(torch.float32)
    step(model, x)

    def run(net: Any, h: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return usual(net, h).float()

    net_of(model).run = run
    assert_same(step(model, x), single(model, x), 0.05)


def test_autocast_for_one_of_them(single: Any) -> None:
    model, x = model_of(torch.float32), inputs(torch.float32)
    step(model, x)

    def run(net: Any, h: Tensor) -> Tensor:
        q = net.q(h)
        with torch.autocast("cpu", torch.bfloat16):
            k = net.k(h)
        assert (q.dtype, k.dtype) == (torch.float32, torch.bfloat16)
        return joined(net, q, k.float(), net.v(h))

    net_of(model).run = run
    assert_same(step(model, x), single(model, x), 0.05)


@torch.no_grad()
def test_values_that_change_in_between() -> None:
    model, h = model_of().eval(), inputs()
    net = net_of(model)
    for _ in range(2):
        net.q(h), net.k(h), net.v(h)
    net.q(h)
    net.k.lora_B["default"].weight.mul_(3)
    torch.testing.assert_close(net.k(h), net.k(h.clone()))


def test_half_precision_with_factors_in_fp32(single: Any) -> None:
    model, x = model_of(torch.bfloat16), inputs(torch.bfloat16)
    step(model, x)
    assert nodes(model) == 1
    assert_same(step(model, x), single(model, x), 0.05)


# ---------------------------------------------------------------------- calls that are not as they were
def written_into(net: Any, h: Tensor) -> Tensor:
    q = net.q(h)
    with torch.no_grad():
        h.mul_(2)
    return joined(net, q.detach(), net.k(h), net.v(h))


def other_tensor(net: Any, h: Tensor) -> Tensor:
    return joined(net, net.q(h), net.k(h.clone()), net.v(h + 1))


def other_order(net: Any, h: Tensor) -> Tensor:
    v, k, q = net.v(h), net.k(h), net.q(h)
    return joined(net, q, k, v)


def twice(net: Any, h: Tensor) -> Tensor:
    return joined(net, net.q(h) + net.q(h), net.k(h), net.v(h)) + usual(net, h)


def one_left_out(net: Any, h: Tensor) -> Tensor:
    return joined(net, net.q(h), net.k(h + 1), net.q(h))


def one_between(net: Any, h: Tensor) -> Tensor:
    q = net.q(h)
    return joined(net, q, net.k(h), net.v(h + net.o(q)))


def without_gradient(net: Any, h: Tensor) -> Tensor:
    q = net.q(h)
    with torch.no_grad():
        k = net.k(h)
    return joined(net, q, k, net.v(h))


def other_adapter(net: Any, h: Tensor) -> Tensor:
    q = net.q(h)
    net.k.set_adapter("other")
    k = net.k(h)
    net.k.set_adapter("default")
    return joined(net, q, k, net.v(h))


def other_parameters(net: Any, h: Tensor) -> Tensor:
    q = net.q(h)
    others = {n: 2 * p for n, p in net.k.named_parameters()}
    return joined(net, q, torch.func.functional_call(net.k, others, (h,)), net.v(h))


def merged(net: Any, h: Tensor) -> Tensor:
    q = net.q(h)
    net.k.merge()
    k = net.k(h)
    net.k.unmerge()
    return joined(net, q, k, net.v(h))


def other_scale(net: Any, h: Tensor) -> Tensor:
    q = net.q(h)
    net.k.scale_layer(2)
    k = net.k(h)
    net.k.unscale_layer()
    return joined(net, q, k, net.v(h))


def checkpointed(net: Any, h: Tensor) -> Tensor:
    q = net.q(h)
    return joined(net, q, checkpoint(net.k, h, use_reentrant=False), checkpoint(net.v, h, use_reentrant=False))


def all_checkpointed(net: Any, h: Tensor) -> Tensor:
    return checkpoint(usual, net, h, use_reentrant=False) + checkpoint(usual, net, h, use_reentrant=True)


def interrupted(net: Any, h: Tensor) -> Tensor:
    net.q(h)
    try:
        net.k(h[..., :2])
    except RuntimeError:
        return usual(net, h)
    raise AssertionError


STRANGE: list[Forward] = [
    written_into, other_tensor, other_order, twice, one_left_out, one_between, without_gradient,
    other_adapter, other_parameters, merged, other_scale, checkpointed, all_checkpointed, interrupted,
]  # fmt: skip


@pytest.mark.parametrize("run", STRANGE, ids=lambda f: f.__name__)
def test_other_calls_give_what_single_operations_give(run: Forward, single: Any) -> None:
    """Before and after layers are known to go together, and back again."""
    model, x = model_of(), inputs()
    model.add_adapter("other", LoraConfig(r=2, target_modules=TARGETS))
    move(model, "other")
    net = net_of(model)
    for forward in (usual, run, run, usual, usual):
        net.run = forward
        assert_same(step(model, x), single(model, x))


def test_a_layer_that_does_not_come_again_ends_the_group() -> None:
    model, x = model_of(), inputs()
    step(model, x)
    assert nodes(model) == 1
    net = net_of(model)
    net.run = one_left_out
    step(model, x)
    assert nodes(model) == nodes(model) == 3


@pytest.mark.parametrize("kind", ["forward", "before", "base"])
def test_hooks_are_called(kind: str, single: Any) -> None:
    model, x, seen = model_of(), inputs(), []
    step(model, x)
    layer = net_of(model).k
    if kind == "before":
        layer.register_forward_pre_hook(lambda m, args: (seen.append(1), (2 * args[0],))[1])
    else:
        where = layer if kind == "forward" else layer.base_layer
        where.register_forward_hook(lambda m, args, y: (seen.append(1), y + 1)[1])
    assert_same(step(model, x), single(model, x))
    assert len(seen) == 2


def test_a_mixed_batch(single: Any) -> None:
    model, x = model_of(), inputs()
    model.add_adapter("other", LoraConfig(r=2, target_modules=TARGETS))
    move(model, "other")
    step(model, x)
    model.eval()
    names = ["other", "default", "__base__", "other"]
    with torch.no_grad():
        mixed = model(x, adapter_names=names)
        for i, name in enumerate(names):
            if name == "__base__":
                with model.disable_adapter():
                    alone = model(x[i : i + 1])
            else:
                model.set_adapter(name)
                alone = model(x[i : i + 1])
            torch.testing.assert_close(mixed[i : i + 1], alone)


# ---------------------------------------------------------------------- engines
def test_compiled() -> None:
    torch._dynamo.reset()
    model, x = model_of(), inputs()
    wanted = step(model, x)
    step(model, x)
    compiled = torch.compile(net_of(model), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), wanted["y"])


def test_vmapped() -> None:
    model, x = model_of(), inputs()
    step(model, x)
    torch.testing.assert_close(torch.func.vmap(model)(x), model(x))


def test_threads(single: Any) -> None:
    model, xs = model_of(), [inputs(seed=i) for i in range(4)]
    step(model, xs[0])
    wanted = [single(model, x)["x"] for x in xs]
    found: dict[int, list[Tensor]] = {i: [] for i in range(4)}

    def run(i: int) -> None:
        for _ in range(20):
            x = xs[i].clone().requires_grad_()
            y = model(x)
            found[i].append(torch.autograd.grad((y * y.detach().cos()).sum(), x)[0])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i, value in enumerate(wanted):
        assert len(found[i]) == 20
        for g in found[i]:
            torch.testing.assert_close(g, value)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_are_their_own(again: Callable[[Any], Any]) -> None:
    model, x = model_of(), inputs()
    wanted = step(model, x)
    step(model, x)
    twin = again(model)
    move(twin, "default")
    assert nodes(twin) == 3
    assert nodes(twin) == 1
    assert not torch.equal(step(twin, x)["y"], wanted["y"])
    assert_same(step(model, x), wanted)


def test_nothing_is_kept_after_a_forward() -> None:
    model, x = model_of(), inputs()
    kept: list[Any] = []

    def watched(net: Any, h: Tensor) -> Tensor:
        kept.append(weakref.ref(h))
        return net.q(h).sum()

    step(model, x)
    net_of(model).run = watched
    model(x).backward()
    gc.collect()
    assert kept[0]() is None


def test_unloaded_layers_are_freed() -> None:
    model, x = model_of(), inputs()
    step(model, x)
    step(model, x)
    layers = [weakref.ref(getattr(net_of(model), name)) for name in TARGETS]
    base = model.unload()
    base(x)
    del model
    gc.collect()
    assert [ref() for ref in layers] == [None] * 4


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["dry", "dropout"])
@pytest.mark.parametrize("each", [False, True], ids=["whole", "each layer"])
def test_sharded(each: bool, p: float) -> None:
    """Under FSDP 2, which gathers the parameters of what is wrapped for its forward and again for its backward pass."""
    model, x = model_of(lora_dropout=p), inputs()
    wanted = step(model, x)
    step(model, x)
    mesh = init_device_mesh("cpu", (1,))
    for name in TARGETS if each else ():
        fully_shard(getattr(net_of(model), name), mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    for _ in range(3):
        found = step(model, x)
        assert_same({k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in found.items()}, wanted)
