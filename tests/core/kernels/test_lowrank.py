"""The fused low-rank step against the same formula by single operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from trimtab.core.dropout import Dropout, Several, rows_of
from trimtab.core.kernels import Layer, lora_linear, lora_linear_group

IN, OUT, RANK = 24, 40, 4
NARROW = {"width": 6, "out": 7}  # for derivatives by differences: a pass for each number that goes in
ROWS = rows_of(torch.empty(3, 5, IN))
DROP = Dropout(0.3, 7, ROWS)
Tensors = dict[str, Any]


def tensors(
    dtype: torch.dtype = torch.float32,
    factors: torch.dtype | None = None,
    out: int = OUT,
    seed: int = 0,
    width: int = IN,
) -> Tensors:
    """x (3, 5, width), a frozen W, a bias and factors that matter as much as W."""
    draw = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)
    factors = factors or dtype
    return {
        "x": make(3, 5, width).to(dtype).requires_grad_(),
        "W": (make(out, width) / width**0.5).to(dtype),
        "b": make(out).to(dtype),
        "A": (make(RANK, width) / width**0.5).to(factors).requires_grad_(),
        "B": (make(out, RANK) / RANK**0.5).to(factors).requires_grad_(),
    }


def formula(t: Tensors, scale: float, drop: Dropout | None = None) -> Tensor:
    """What a LoRA layer computes."""
    x = t["x"] if drop is None else drop(t["x"])
    return F.linear(t["x"], t["W"], t["b"]) + scale * (x @ t["A"].T @ t["B"].T)


def fused(t: Tensors, scale: float, drop: Dropout | None = None) -> Tensor:
    return lora_linear(t["x"], t["W"], t["b"], t["A"], t["B"], scale, drop)


def step(run: Callable[..., Tensor], t: Tensors, *args: Any) -> dict[str, Tensor]:
    """The output and the gradients of a loss that weighs each output differently."""
    y = run(t, *args)
    weigh = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(y.dtype)
    y.backward(weigh)
    found = {"y": y.detach()} | {k: v.grad for k, v in t.items() if v is not None and v.grad is not None}
    for v in t.values():
        if v is not None:
            v.grad = None
    return found


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert value.dtype == wanted[name].dtype, name
        error = (value - wanted[name]).double().norm() / wanted[name].double().norm().clamp_min(1e-30)
        assert error <= tolerance, f"{name}: {error:.1e}"


drops = pytest.mark.parametrize(
    "drop", [None, DROP, Dropout(0.05, 3, ROWS), Dropout(0.0, 3, ROWS)], ids=["dry", "p=0.3", "p=0.05", "p=0"]
)
VARIANTS: dict[str, Callable[[Tensors], Any]] = {
    "all": lambda t: None,
    "no bias": lambda t: t.update(b=None),
    "trained bias": lambda t: t["b"].requires_grad_(),
    "frozen A": lambda t: t["A"].requires_grad_(False),
    "frozen B": lambda t: t["B"].requires_grad_(False),
    "frozen x": lambda t: t["x"].requires_grad_(False),
    "only x": lambda t: (t["A"].requires_grad_(False), t["B"].requires_grad_(False)),
    "trained W": lambda t: t["W"].requires_grad_(),
    "one dimension": lambda t: t.update(x=t["x"].detach().flatten(0, 1)[0].requires_grad_()),
    "two dimensions": lambda t: t.update(x=t["x"].detach().flatten(0, 1).requires_grad_()),
    "four dimensions": lambda t: t.update(x=t["x"].detach()[:, None].requires_grad_()),
    "empty": lambda t: t.update(x=t["x"].detach()[:0].requires_grad_()),
    "transposed x": lambda t: t.update(x=t["x"].detach().mT.contiguous().mT.requires_grad_()),
    "strided x": lambda t: t.update(x=t["x"].detach().repeat(1, 2, 1)[:, ::2].requires_grad_()),
    "stored (in, out)": lambda t: t.update(W=t["W"].T.contiguous().T),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_formula(variant: str, dtype: torch.dtype) -> None:
    t = tensors(dtype)
    VARIANTS[variant](t)
    assert_same(step(fused, t, 1.7), step(formula, t, 1.7), 1e-6 if dtype == torch.float32 else 1e-14)


@drops
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_formula_with_dropout(drop: Dropout | None, dtype: torch.dtype) -> None:
    t = tensors(dtype)
    assert_same(step(fused, t, 1.7, drop), step(formula, t, 1.7, drop), 1e-6 if dtype == torch.float32 else 1e-14)


def test_everything_dropped_leaves_the_base() -> None:
    t = tensors()
    assert torch.equal(fused(t, 2.0, Dropout(1.0, 0, ROWS)), F.linear(t["x"], t["W"], t["b"]))


@drops
def test_first_and_second_derivatives(drop: Dropout | None) -> None:
    t = tensors(torch.float64, **NARROW)
    run = lambda x, A, B: lora_linear(x, t["W"], t["b"], A, B, 0.7, drop)
    assert torch.autograd.gradcheck(run, (t["x"], t["A"], t["B"]))
    assert torch.autograd.gradgradcheck(run, (t["x"], t["A"], t["B"]))


def test_second_derivatives_through_a_rebuilt_input() -> None:
    t = tensors(torch.float64, **NARROW)
    gate = torch.randn(3, 5, NARROW["width"], dtype=torch.float64, requires_grad=True)
    run = lambda x, gate, A, B: lora_linear(x * gate, t["W"], t["b"], A, B, 0.7)
    assert torch.autograd.gradgradcheck(run, (t["x"], gate, t["A"], t["B"]))


def test_an_expanded_gradient() -> None:
    """What `y.sum()` sends back has strides of zero."""
    for dtype in (torch.float32, torch.bfloat16):
        t = tensors(dtype, torch.float32)
        fused(t, 1.7).sum().backward()
        exact = tensors(torch.float64)
        exact = {k: v.detach().double().requires_grad_(v.requires_grad) for k, v in t.items()}
        formula(exact, 1.7).sum().backward()
        for name in "xAB":
            error = (t[name].grad - exact[name].grad).norm() / exact[name].grad.norm()
            assert error < (1e-6 if dtype == torch.float32 else 5e-3), name


# ---------------------------------------------------------------------- several layers of one input
def group(
    drop: Dropout | None, scales: tuple[float, ...], dtype: torch.dtype = torch.float64
) -> tuple[Tensor, list[Tensors]]:
    parts = [tensors(dtype, out=out, seed=i) for i, out in enumerate((OUT, 8, 16))]
    return parts[0]["x"], [p | {"scale": s, "drop": drop} for p, s in zip(parts, scales, strict=True)]


@drops
@pytest.mark.parametrize("scales", [(2.0, 2.0, 2.0), (2.0, 0.5, 1.0)], ids=["one scale", "three scales"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_group_equals_its_layers(drop: Dropout | None, scales: tuple[float, ...], dtype: torch.dtype) -> None:
    x, parts = group(drop, scales, dtype)
    layers = [Layer(*(p[k] for k in ("W", "b", "A", "B", "scale", "drop"))) for p in parts]
    found: list[list[Tensor]] = []
    for run in (lora_linear_group, lambda x, layers: [lora_linear(x, *layer) for layer in layers]):
        outs = run(x, layers)
        loss = sum((y * y.detach().cos()).sum() for y in outs)
        wanted = [x, *(p[k] for p in parts for k in "AB")]
        found.append([*outs, *torch.autograd.grad(loss, wanted)])
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= (1e-6 if dtype == torch.float32 else 1e-14) * b.norm()


def test_a_group_of_which_one_output_is_unused() -> None:
    x, parts = group(None, (1.0, 1.0, 1.0))
    layers = [Layer(*(p[k] for k in ("W", "b", "A", "B", "scale"))) for p in parts]
    lora_linear_group(x, layers)[1].sum().backward()
    alone = torch.autograd.grad(lora_linear(x, *layers[1]).sum(), [x, layers[1].A])
    assert torch.allclose(x.grad, alone[0])
    assert torch.allclose(layers[1].A.grad, alone[1])
    assert layers[0].B.grad is None


# ---------------------------------------------------------------------- pieces of a batch, each with its own factors
def pieces(
    drop: Any, dtype: torch.dtype, factors: torch.dtype | None = None, out: int = OUT, width: int = IN
) -> tuple[Tensor, list[Tensors]]:
    """x (3, 5, width) of three pieces and two layers of it, with factors for each piece."""
    made = [[tensors(dtype, factors, o, 7 * k + g, width) for g in range(3)] for k, o in enumerate((out, 16))]
    both = [
        layer[0] | {n: torch.stack([t[n].detach() for t in layer]).requires_grad_() for n in "AB"} | {"drop": drop}
        for layer in made
    ]
    return made[0][0]["x"], both


def each_alone(x: Tensor, layers: list[Layer]) -> list[Tensor]:
    """What each piece's own LoRA computes."""
    dry = [x if layer.drop is None else layer.drop(x) for layer in layers]
    update = lambda low, A, B: low @ A.T @ B.T
    return [
        F.linear(x, layer.W, layer.b)
        + layer.scale * torch.stack([update(low[g], layer.A[g], layer.B[g]) for g in range(3)])
        for layer, low in zip(layers, dry, strict=True)
    ]


ROW = [rows_of(torch.empty(1, 5, IN), [key]) for key in range(3)]
SEVERAL = Several(((Dropout(0.3, 7, ROW[0]), 5), (None, 5), (Dropout(0.05, 3, ROW[2]), 5)))
MUCH = Several(((Dropout(0.05, 7, ROW[0]), 5), (Dropout(0.1, 4, ROW[1]), 5), (Dropout(0.02, 3, ROW[2]), 5)))
pieces_drops = pytest.mark.parametrize("drop", [None, SEVERAL, MUCH], ids=["dry", "some are dropped", "few places"])


@pieces_drops
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pieces_equal_their_own_formulas(drop: Any, dtype: torch.dtype) -> None:
    x, parts = pieces(drop, dtype)
    layers = [Layer(p["W"], p["b"], p["A"], p["B"], 1.7, drop) for p in parts]
    found = []
    for run in (lora_linear_group, each_alone):
        outs = run(x, layers)
        loss = sum((y * y.detach().cos()).sum() for y in outs)
        found.append([*outs, *torch.autograd.grad(loss, [x, *(p[k] for p in parts for k in "AB")])])
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= (1e-6 if dtype == torch.float32 else 1e-14) * b.norm()


@pieces_drops
def test_derivatives_of_pieces(drop: Any) -> None:
    x, (first, _) = pieces(drop, torch.float64, **NARROW)
    run = lambda x, A, B: lora_linear_group(x, [Layer(first["W"], first["b"], A, B, 0.7, drop)])
    assert torch.autograd.gradcheck(run, (x, first["A"], first["B"]))
    assert torch.autograd.gradgradcheck(run, (x, first["A"], first["B"]))


@pieces_drops
def test_pieces_in_half_precision_are_as_near_as_one_by_one(drop: Any) -> None:
    """Factors in fp32 act on bfloat16 as exactly for pieces as for a whole batch."""
    x, parts = pieces(drop, torch.bfloat16, torch.float32)
    layers = [Layer(p["W"], p["b"], p["A"], p["B"], 1.7, drop) for p in parts]
    exact = [Layer(*(t.detach().double() for t in layer[:4]), 1.7, drop) for layer in layers]
    factors = [t.requires_grad_() for layer in exact for t in (layer.A, layer.B)]
    x64 = x.detach().double().requires_grad_()
    draw = torch.Generator().manual_seed(5)
    weigh = [torch.randn(3, 5, len(layer.W), generator=draw).bfloat16() for layer in layers]
    outs, truth = lora_linear_group(x, layers), each_alone(x64, exact)
    got = torch.autograd.grad(outs, [x, *(t for layer in layers for t in (layer.A, layer.B))], weigh)
    wanted = torch.autograd.grad(truth, [x64, *factors], [w.double() for w in weigh])
    for a, b in zip([*outs, *got], [*truth, *wanted], strict=True):
        assert (a - b).norm() <= 4e-3 * b.norm()


# ---------------------------------------------------------------------- half precision
def peft_like(t: Tensors, scale: float) -> Tensor:
    """PEFT's spelling of factors in fp32 on a base in half precision."""
    y = F.linear(t["x"], t["W"], t["b"])
    low = t["x"].to(t["A"].dtype) @ t["A"].T @ t["B"].T * scale
    return (y + low).to(y.dtype)


@pytest.mark.parametrize("strength", [0.03, 0.3, 1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_is_no_further_from_the_truth_than_peft(dtype: torch.dtype, strength: float) -> None:
    """Output and gradient of the input, for adapters from weak to stronger than the base."""
    draw = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=draw)
    t: Tensors = {"x": make(512, 64).to(dtype), "W": (make(96, 64) / 8).to(dtype), "b": None}
    t |= {"A": make(16, 64) / 8, "B": make(96, 16) / 4 * strength}
    for name in "xAB":
        t[name].requires_grad_()
    exact = {k: None if v is None else v.detach().double().requires_grad_(v.requires_grad) for k, v in t.items()}
    truth = step(formula_64, exact, 1.0)
    ours, theirs = step(fused, t, 1.0), step(peft_like, t, 1.0)
    for name in ("y", "x"):
        error, bar = ((r[name].double() - truth[name]).norm() for r in (ours, theirs))
        assert error <= 1.02 * bar, f"{name}: {error / bar:.3f} of PEFT's error"
    for name in "AB":  # rounded once to the activations' format at most
        assert ours[name].dtype == torch.float32
        assert (ours[name] - truth[name]).norm() <= torch.finfo(dtype).eps / 2 * truth[name].norm()


def formula_64(t: Tensors, scale: float) -> Tensor:
    return t["x"] @ t["W"].T + scale * (t["x"] @ t["A"].T @ t["B"].T)


@pytest.mark.parametrize("rows", [1, 7, 2048])
def test_half_precision_without_gradients(rows: int) -> None:
    """Decoding widens, longer inputs split: both round once."""
    t = tensors(torch.bfloat16, torch.float32)
    x = torch.randn(rows, IN).bfloat16()
    with torch.no_grad():
        y = lora_linear(x, t["W"], None, t["A"], t["B"], 2.0)
        base = F.linear(x, t["W"])
        wanted = base.double() + 2 * (x.double() @ t["A"].double().T @ t["B"].double().T)
    assert y.dtype == torch.bfloat16
    assert torch.allclose(y.double(), wanted, rtol=2**-8, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("autocast", [False, True])
def test_without_gradients(autocast: bool) -> None:
    t = tensors()
    for x in (t["x"], t["x"][:0], t["x"].mT.contiguous().mT, t["x"][:, ::2], t["x"][0]):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = fused(t | {"x": x}, 1.7)
        assert y.dtype == (torch.bfloat16 if autocast else torch.float32)
        torch.testing.assert_close(
            y.float(), formula(t | {"x": x}, 1.7), rtol=0.02 if autocast else 1e-5, atol=0.05 if autocast else 1e-5
        )


def test_factors_in_half_precision_too() -> None:
    t = tensors(torch.bfloat16)
    exact = {k: v.detach().double().requires_grad_(v.requires_grad) for k, v in t.items()}
    found, wanted = step(fused, t, 1.5), step(formula, exact, 1.5)
    for name, value in found.items():
        assert value.dtype == torch.bfloat16
        assert (value - wanted[name]).norm() < 0.02 * wanted[name].norm(), name


# ---------------------------------------------------------------------- autocast
@drops
@pytest.mark.parametrize("inside", [True, False], ids=["backward inside", "backward outside"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast(dtype: torch.dtype, inside: bool, drop: Dropout | None) -> None:
    """Computed in autocast's format; parameters' gradients in their own."""
    t = tensors()
    results = []
    for run in (fused, formula):
        with torch.autocast("cpu", dtype):
            y = run(t, 1.7, drop)
            assert y.dtype == dtype
            if inside:
                (y * y.detach()).sum().backward()
        if not inside:
            (y * y.detach()).sum().backward()
        results.append({"y": y.detach()} | {k: t[k].grad for k in "xAB"})
        for k in "xAB":
            t[k].grad = None
    assert_same(*results, tolerance=0.02 if dtype == torch.bfloat16 else 0.003)


def test_backward_under_autocast_of_a_step_without() -> None:
    t = tensors()
    wanted = step(formula, t, 1.7)
    y = fused(t, 1.7)
    weigh = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).float()
    with torch.autocast("cpu", torch.bfloat16):
        y.backward(weigh)
    assert_same({"y": y.detach()} | {k: t[k].grad for k in "xAB"}, wanted)


def test_autocast_leaves_doubles_alone() -> None:
    t = tensors(torch.float64)
    wanted = step(formula, t, 1.7)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(step(fused, t, 1.7), wanted, 1e-14)


# ---------------------------------------------------------------------- engines
class Block(nn.Module):
    """Two LoRA layers in a row behind a norm and a gate, as a transformer has them."""

    def __init__(
        self, run: Callable[..., Tensor], drop: Dropout | None = None, dtype: torch.dtype = torch.float64
    ) -> None:
        super().__init__()
        first, second = tensors(torch.float64), tensors(torch.float64, out=IN, seed=1)
        self.run, self.drop, self.norm = run, drop, nn.Parameter(first["b"][:IN].abs(), requires_grad=False)
        for i, t in enumerate((first, second)):
            for name in "WbAB":
                self.register_parameter(f"{name}{i}", nn.Parameter(t[name].detach(), requires_grad=name in "AB"))
        self.W1 = nn.Parameter(self.W1.data, requires_grad=False)

    def layer(self, i: int, x: Tensor) -> Tensor:
        t = {name: getattr(self, f"{name}{i}") for name in "WbAB"}
        return self.run({"x": x, **t}, 1.7, self.drop)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))
        x = x + self.layer(1, h)
        return F.silu(self.layer(1, x)) * self.layer(1, h) + self.layer(0, x)[..., :IN]


def gradients(model: nn.Module, x: Tensor, run: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
    y = (model if run is None else run)(x)
    (y * y.detach().cos()).sum().backward()
    found = [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]
    x.grad = None
    model.zero_grad()
    return found


def assert_alike(found: list[Tensor], wanted: list[Tensor]) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)


@drops
def test_a_layer_used_twice(drop: Dropout | None) -> None:
    """The same layer at several places, one input of several layers, a residual around them."""
    x = tensors(torch.float64)["x"]
    assert_alike(gradients(Block(fused, drop), x), gradients(Block(formula, drop), x))


@drops
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool, drop: Dropout | None) -> None:
    """Masks are the same when a block is computed again, whatever else was drawn meanwhile."""
    x, model = tensors(torch.float64)["x"], Block(fused, drop)
    again = lambda x: checkpoint(model, x, use_reentrant=reentrant, preserve_rng_state=False)
    assert_alike(gradients(model, x, again), gradients(Block(formula, drop), x))


@pytest.mark.parametrize("reentrant", [True, False])
def test_behind_a_checkpoint(reentrant: bool) -> None:
    x, gate = tensors(torch.float64)["x"], lambda x: (x + 1) * torch.sin(x)
    behind = lambda model: lambda x: model(checkpoint(gate, x, use_reentrant=reentrant) * 1.5)
    model, other = Block(fused), Block(formula)
    assert_alike(gradients(model, x, behind(model)), gradients(other, x, behind(other)))
    direct = lambda run: (
        lambda x: run(tensors(torch.float64) | {"x": checkpoint(gate, x, use_reentrant=reentrant)}, 1.7)
    )
    assert_alike(gradients(nn.Module(), x, direct(fused)), gradients(nn.Module(), x, direct(formula)))


def test_saved_tensors_moved_elsewhere() -> None:
    x, model = tensors(torch.float64)["x"], Block(fused)
    with torch.autograd.graph.save_on_cpu():
        assert_alike(gradients(model, x), gradients(Block(formula), x))


@drops
def test_backward_twice_through_one_graph(drop: Dropout | None) -> None:
    x, model = tensors(torch.float64)["x"], Block(fused, drop)
    y = model(x).sum()
    y.backward(retain_graph=True)
    once = [x.grad.clone(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]
    y.backward()
    twice = [x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]
    assert_alike(twice, [2 * g for g in once])


def test_compiled_in_one_graph() -> None:
    x, model = tensors(torch.float64)["x"], Block(fused)
    wanted = gradients(model, x)
    assert_alike(gradients(model, x, torch.compile(model, fullgraph=True, backend="aot_eager")), wanted)


def test_vmap_and_functional_gradients() -> None:
    t = tensors(torch.float64)
    loss = lambda A, x: fused(t | {"A": A, "x": x}, 1.7).square().sum()
    wanted = torch.stack([torch.autograd.grad(loss(t["A"], x), t["A"])[0] for x in t["x"]])
    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(t["A"].detach(), t["x"].detach())
    assert torch.allclose(found, wanted)


def test_a_subclass_keeps_its_own_rules() -> None:
    """A tensor subclass as W (quantised, sharded) is multiplied by its own linear."""
    seen: list[Any] = []

    class Strange(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    t = tensors()
    wanted = formula(t, 1.7)
    y = fused(t | {"W": t["W"].as_subclass(Strange)}, 1.7)
    assert F.linear in seen
    assert torch.allclose(y.as_subclass(Tensor), wanted, atol=1e-6)


@pytest.mark.usefixtures("one_process")
@drops
def test_sharded_parameters(drop: Dropout | None) -> None:
    """FSDP 2 swaps the parameters for gathered ones around each pass, and frees these between."""
    x, model = tensors(torch.float64)["x"], Block(fused, drop)
    wanted = gradients(model, x)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)), reshard_after_forward=True)
    found = gradients(model, x)
    assert_alike([g.full_tensor() if isinstance(g, DTensor) else g for g in found], wanted)


# ---------------------------------------------------------------------- what is kept
@pytest.mark.parametrize("p", [0.05, 0.5])
def test_what_is_kept(p: float) -> None:
    """Of x nothing where the graph can make it again; of dropout a list of places, nothing where that is long."""
    t, size = tensors(), 400 * IN
    x = torch.randn(400, IN, requires_grad=True)
    saved = lambda y: sum(v.nbytes for v in y.grad_fn.saved_tensors if v is not None)
    run = lambda x, drop=None: fused({**t, "x": x}, 1.0, drop)
    least = 400 * RANK * 4 + sum(t[k].nbytes for k in "WAB")
    assert saved(run(x)) == least + x.nbytes  # a leaf: nobody could make it again
    assert saved(run(x * x)) == least
    assert saved(run(x * x, Dropout(p, 3, rows_of(x[None])))) <= least + (0.5 * size if p == 0.05 else 0)


def test_a_frozen_A_needs_no_input() -> None:
    t = tensors()
    t["A"].requires_grad_(False)
    assert not any(v is t["x"] for v in fused(t, 1.0).grad_fn.saved_tensors)
