"""A layer in one fused step against the same layer by single operations: the same numbers, and the same gradients.

Single operations are what a layer gives way to as soon as its site has no plain weight to show.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.contract.cases import BY_NAME, CASES, Case, adapted, layer_of, move, tensors
from tests.models import HIDDEN, WIDTH, llama, tokens
from trimtab import LoraConfig, get_peft_model
from trimtab.core.method import Call
from trimtab.core.site import LinearSite
from trimtab.layer.plan import Plan

FUSED = [case for case in CASES if case.method.through is not None and "up" in case.names]
methods = pytest.mark.parametrize("case", FUSED, ids=lambda c: c.name)
wet = pytest.mark.parametrize("case", [BY_NAME["lora"], BY_NAME["lora-dropout"]], ids=lambda c: c.name)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Run = Callable[[Any], Any]


@pytest.fixture
def single(monkeypatch: pytest.MonkeyPatch) -> Callable[[Run], Run]:
    """Runs a function with every layer computed by single operations."""

    def wrap(run: Run) -> Run:
        def by_single_operations(model: Any) -> Any:
            with monkeypatch.context() as patch:
                patch.setattr(LinearSite, "plain", lambda self: None)
                return run(model)

        return by_single_operations

    return wrap


def layer(case: Case, dtype: torch.dtype = torch.float32) -> nn.Module:
    return layer_of(adapted(case, "up", dtype=dtype).train(), "up")


def is_fused(y: Tensor) -> bool:
    node = y.grad_fn
    if node.name() == "AddBackward0":  # of what is added to the bias
        node = node.next_functions[0][0]
    return node.name() in ("_LowRankBackward", "_DeltaBackward")


def step(module: nn.Module, x: Tensor, run: Callable[[nn.Module, Tensor], Tensor] | None = None) -> dict[str, Tensor]:
    """Output and gradients, the random numbers being the same each time."""
    torch.manual_seed(3)
    module.zero_grad()
    x = x.detach().requires_grad_()
    y = module(x) if run is None else run(module, x)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(y.dtype)
    (y * weight).sum().backward()
    found = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return {"y": y.detach(), "x": x.grad, **found}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        error = float((actual[name] - value).double().norm() / value.double().norm().clamp_min(1e-30))
        assert error <= tolerance, f"{name}: {error:.1e}"


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(4, 5, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)


# ---------------------------------------------------------------------- one layer
@methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_equals_single_operations(case: Case, dtype: torch.dtype, single: Any) -> None:
    module, x = layer(case, dtype), inputs(dtype)
    declined = any(case.options.get(n) for n in ("rank_dropout", "lora_bias", "hira_dropout", "randlora_dropout"))
    declined = declined or (case.peft_type == "SUPERTUNING" and case.options.get("r") is not None)
    assert is_fused(module(x.requires_grad_())) != declined, "else nothing is compared here"
    assert_same(step(module, x), single(lambda m: step(m, x))(module), 1e-6 if dtype == torch.float32 else 1e-13)


@methods
def test_derivatives(case: Case) -> None:
    """First and second, of the input and of the adapter's tensors."""
    module = layer(case, torch.float64)
    names = [n for n, p in module.named_parameters() if p.requires_grad]
    own = [dict(module.named_parameters())[n].detach().clone().requires_grad_() for n in names]

    def run(x: Tensor, *values: Tensor) -> Tensor:
        torch.manual_seed(0)
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))

    x = inputs(torch.float64)[:2, :2].requires_grad_()
    assert torch.autograd.gradcheck(run, (x, *own))
    assert torch.autograd.gradgradcheck(run, (x, *own))


@wet
@pytest.mark.parametrize("base", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_a_base_in_half_precision_with_factors_in_fp32(case: Case, base: torch.dtype, single: Any) -> None:
    module, x = layer(case, base), inputs(base)
    assert module.lora_A["default"].weight.dtype == torch.float32
    found = step(module, x)
    assert found["y"].dtype == base
    assert_same(found, single(lambda m: step(m, x))(module), 2 * torch.finfo(base).eps)


@methods
def test_autocast(case: Case, single: Any) -> None:
    """Computed in autocast's format; gradients in the parameters' own."""
    module, x = layer(case), inputs()

    def run(module: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = module(x)
        assert y.dtype == torch.bfloat16
        return y

    found = step(module, x, run)
    assert_same(found, single(lambda m: step(m, x, run))(module), 0.02)


@methods
def test_an_input_of_two_layers_and_a_layer_used_twice(case: Case, single: Any) -> None:
    module, other, x = layer(case), copy.deepcopy(layer(case)), inputs()
    move(other, "default")

    def run(module: nn.Module, x: Tensor) -> Tensor:
        h = torch.tanh(x) * torch.sigmoid(x)
        y = module(h) + other(h)
        return y + module(y[..., :WIDTH] * h)

    assert_same(step(module, x, run), single(lambda m: step(m, x, run))(module))


@methods
def test_a_copy_has_a_life_of_its_own(case: Case) -> None:
    module, x = layer(case), inputs()
    wanted = step(module, x)
    twin = copy.deepcopy(module)
    assert_same(step(twin, x), wanted, 0)
    move(twin, "default")
    assert not torch.equal(step(twin, x)["y"], wanted["y"])
    assert_same(step(module, x), wanted, 0)


@methods
def test_without_gradients(case: Case, single: Any) -> None:
    module, x = layer(case).eval(), inputs()
    with torch.no_grad():
        for v in (x, x[:1, :1], x[0], x[0, 0], x[:0]):
            found, wanted = module(v), single(lambda m, v=v: m(v))(module)
            size = max(1.0, *wanted.abs().flatten().tolist(), 0.0)  # sums are rounded by the size of what they sum
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6 * size)


# ---------------------------------------------------------------------- giving way
class Strange(Tensor):
    """A tensor with ideas of its own."""

    seen: list[Any] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_hooks_of_the_base_layer_are_called() -> None:
    module, x, seen = layer(BY_NAME["lora"]), inputs(), []
    wanted = step(module, x)
    handle = module.base_layer.register_forward_hook(lambda m, args, y: seen.append(y.shape))
    assert_same(step(module, x), wanted)
    assert seen == [(4, 5, HIDDEN)]
    handle.remove()
    assert is_fused(module(x.requires_grad_()))


def test_a_base_layer_with_a_forward_of_its_own_is_called() -> None:
    module, x = layer(BY_NAME["lora"]), inputs()
    before = module(x)
    own = module.base_layer.forward
    module.base_layer.forward = lambda v: own(v) + 1
    torch.testing.assert_close(module(x), before + 1)


def test_an_input_of_a_subclass_keeps_its_rules() -> None:
    module, x = layer(BY_NAME["lora"]), inputs()
    wanted = module(x)
    Strange.seen.clear()
    y = module(x.as_subclass(Strange))
    assert nn.functional.linear in Strange.seen
    torch.testing.assert_close(y.as_subclass(Tensor), wanted)


def test_a_base_that_is_trained_gets_its_gradient(single: Any) -> None:
    module, x = layer(BY_NAME["lora"]), inputs()
    module.base_layer.requires_grad_(True)
    found = step(module, x)
    assert found["base_layer.weight"].abs().max() > 0
    assert_same(found, single(lambda m: step(m, x))(module))


@methods
def test_tracing_and_forward_derivatives(case: Case) -> None:
    """A tracer records single operations; forward-mode derivatives are had."""
    module, x = layer(case).eval(), inputs()
    traced = torch.jit.trace(module, (x,), check_trace=False)
    assert "PythonOp" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(2 * x), module(2 * x))
    _, tangent = torch.func.jvp(module, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, (module(x + 0.5) - module(x - 0.5)))


@wet
def test_compiles_for_training(case: Case) -> None:
    torch._dynamo.reset()
    module, x = layer(case), inputs()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    if case.options.get("lora_dropout"):
        assert torch.isfinite(step(module, x, lambda m, v: compiled(v))["x"]).all()
    else:
        assert_same(step(module, x, lambda m, v: compiled(v)), step(module, x))


@methods
@pytest.mark.usefixtures("one_process")
def test_sharded_parameters(case: Case) -> None:
    """FSDP 2 swaps the parameters for gathered ones around each pass, and frees these between."""
    module, x = layer(case, torch.float64), inputs(torch.float64)
    wanted = step(module, x)
    fully_shard(module, mesh=init_device_mesh("cpu", (1,)), reshard_after_forward=True)
    for _ in range(2):
        found = step(module, x)
        assert_same({k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in found.items()}, wanted, 1e-12)


# ---------------------------------------------------------------------- a model
def model_of(**options: Any) -> Any:
    model = get_peft_model(llama().double(), LoraConfig(r=3, target_modules=TARGETS, **options))
    move(model, "default")
    return model.train()  # in fp64: in fp32 its layers make more of a rounding than any difference here


def gradients(model: Any) -> dict[str, Tensor]:
    torch.manual_seed(3)
    model.zero_grad()
    ids = tokens(3, 9, 64)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad.clone() for n, p in tensors(model).items()}}


@pytest.mark.parametrize("p", [0.0, 0.3], ids=["dry", "dropout"])
def test_a_model(p: float, single: Any) -> None:
    model = model_of(lora_dropout=p)
    assert_same(gradients(model), single(gradients)(model), 1e-12)


@pytest.mark.parametrize("p", [0.0, 0.3], ids=["dry", "dropout"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_a_model_under_checkpointing(reentrant: bool, p: float) -> None:
    model = model_of(lora_dropout=p)
    if not p:
        wanted = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = gradients(model)
    if not p:
        assert_same(found, wanted, 1e-12)
    else:  # the masks of the second forward are those of the first: the loss is a function, and this its gradient
        name, parameter = next((n, t) for n, t in tensors(model).items() if "layers.0.mlp.down_proj.lora_B" in n)
        move = torch.randn_like(parameter) * 1e-2
        with torch.no_grad():
            losses = []
            for sign in (1, -1):
                parameter += sign * move
                torch.manual_seed(3)
                losses.append(model(input_ids=tokens(3, 9, 64), labels=tokens(3, 9, 64)).loss)
                parameter -= sign * move
        slope = float(losses[0] - losses[1]) / 2
        assert slope == pytest.approx(float((found[name] * move).sum()), rel=0.05, abs=1e-6)


# ---------------------------------------------------------------------- masks
def test_a_row_has_its_mask_alone_packed_and_mixed() -> None:
    """In one fused step, in a packed sequence and in a mixed batch a row of one name meets the same mask."""
    model = adapted(BY_NAME["lora-dropout"], "up").train()
    model.add_adapter("other", BY_NAME["lora"].config("up"))
    module, x = layer_of(model, "up"), inputs()
    board = module.board
    with board.using(call=Call(seed=7, keys=(5, 6, 7, 8))):
        together = module(x)
        assert is_fused(together)
    with board.using(call=Call(seed=7, keys=(7,))):
        torch.testing.assert_close(module(x[2:3]), together[2:3])
        torch.testing.assert_close(module(x[2:3, :3]), together[2:3, :3])
    with board.using(call=Call(seed=7, keys=(7, 5), lengths=(5, 2))):
        packed = module(torch.cat([x[2], x[0, :2]])[None])
        torch.testing.assert_close(packed[0], torch.cat([together[2], together[0, :2]]))
    plan = Plan(["other", "default", "default", "other"], calls={"default": Call(seed=7, keys=(6, 7))})
    with board.using(plan=plan):
        torch.testing.assert_close(module(x)[1:3], together[1:3])
    with board.using(call=Call(seed=8, keys=(5, 6, 7, 8))):
        assert not torch.allclose(module(x), together)
