"""Random operations on an adapted model, beside a plain one: dense weights plus s·B·A of tensors kept here by hand."""

from __future__ import annotations

import copy
import gc
import random
import tempfile
import tracemalloc
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from trimtab import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

SIZES = {"up": (6, 9), "down": (9, 5)}  # layer -> (in, out)
MANY = 14  # adapters at most: more than stay in the module tree unused
Wanted = list[tuple[str, float]]  # adapters of a row, innermost first, each with its scale


@pytest.fixture(autouse=True)
def _parked_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that with no more adapters some are in the module tree, some beside it and some numbers only."""
    monkeypatch.setattr("trimtab.graft.residents.ASIDE", 2)


class Net(nn.Module):
    """Two linear layers, one with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(*SIZES["up"]), nn.Linear(*SIZES["down"], bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


@dataclass
class Known:
    """An adapter as the reference knows it: its factors by layer, A (r, in) and B (out, r), and its scale."""

    factors: dict[str, tuple[Tensor, Tensor]]
    scale: float
    r: int
    alpha: float

    def copy(self) -> Known:
        return replace(self, factors={k: (A.clone(), B.clone()) for k, (A, B) in self.factors.items()})

    def to(self, dtype: torch.dtype) -> None:
        self.factors = {k: (A.to(dtype), B.to(dtype)) for k, (A, B) in self.factors.items()}


@dataclass
class Reference:
    """The plain model: what each operation should make of it."""

    base: dict[str, Tensor]
    adapters: dict[str, Known] = field(default_factory=dict)
    active: list[str] = field(default_factory=list)
    merged: list[str] = field(default_factory=list)
    enabled: bool = True
    dtype: torch.dtype = torch.float64

    def forward(self, x: Tensor, pairs: Wanted) -> Tensor:
        """x (..., 6) through dense weights, in fp64 whatever the model computes in."""
        for name in SIZES:
            W = self.base[f"{name}.weight"].double()
            for adapter, scale in pairs:
                known = self.adapters[adapter]
                if name in known.factors:
                    A, B = (M.double() for M in known.factors[name])
                    W = W + scale * known.scale * B @ A
            x = x @ W.T
            if f"{name}.bias" in self.base:
                x = x + self.base[f"{name}.bias"].double()
            x = torch.tanh(x) if name == "up" else x
        return x

    def now(self) -> Wanted:
        """What the model computes with when nobody says otherwise."""
        names = dict.fromkeys([*self.merged, *self.active]) if self.enabled else {}
        return [(name, 1.0) for name in names]


class World:
    """An adapted model and its reference, and what can be done to both."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.folder, self.count = folder, 0
        net = Net().double()
        self.reference = Reference({k: v.detach().clone() for k, v in net.named_parameters()})
        self.saved: list[tuple[Path, Known]] = []
        self.model: PeftModel = get_peft_model(net, LoraConfig(r=2, target_modules=["up", "down"]), "a0").eval()
        self._put("a0", self._drawn(random.Random(0), 2, 8.0, ["up", "down"]))
        self.reference.active = ["a0"]
        self.check(random.Random(0))

    # ------------------------------------------------------------------ what holds at any time
    def _x(self, rng: random.Random, rows: int = 3) -> Tensor:
        return torch.randn(rows, 2, 6, generator=torch.Generator().manual_seed(rng.randrange(1000)))

    def close(self, y: Tensor, expected: Tensor) -> None:
        assert y.dtype == self.reference.dtype
        limit = 1e-10 if self.reference.dtype == torch.float64 else 1e-4
        torch.testing.assert_close(y.double(), expected, rtol=limit, atol=limit * max(1, float(expected.abs().max())))

    def check(self, rng: random.Random) -> None:
        """The output is the reference's, with and without adapters; names and states are."""
        reference, x = self.reference, self._x(rng)
        with torch.no_grad():
            self.close(self.model(x.to(reference.dtype)), reference.forward(x.double(), reference.now()))
        assert set(self.model.peft_config) == set(reference.adapters)
        assert self.model.active_adapters == reference.active
        assert set(self.model.graft.merged) == set(reference.merged)

    # ------------------------------------------------------------------ helpers
    def _drawn(self, rng: random.Random, r: int, alpha: float, layers: list[str]) -> Known:
        seed = torch.Generator().manual_seed(rng.randrange(1 << 30))
        draw = lambda *shape: (0.3 * torch.randn(*shape, generator=seed)).to(self.reference.dtype)
        factors = {n: (draw(r, SIZES[n][0]), draw(SIZES[n][1], r)) for n in layers}
        return Known(factors, alpha / r, r, alpha)

    def _put(self, name: str, known: Known) -> None:
        """Give an adapter of the model these numbers, through a state dict in the names of files."""
        tensors = {}
        for layer, (A, B) in known.factors.items():
            tensors[f"base_model.model.{layer}.lora_A.weight"] = A.clone()
            tensors[f"base_model.model.{layer}.lora_B.weight"] = B.clone()
        found = set_peft_model_state_dict(self.model, tensors, adapter_name=name)
        assert not found.unexpected_keys
        self.reference.adapters[name] = known

    def _read(self, name: str) -> None:
        """Take over an adapter's numbers as the model has them, where they are right but for roundings."""
        tensors = get_peft_model_state_dict(self.model, adapter_name=name)
        for layer, pair in self.reference.adapters[name].factors.items():
            own = [tensors[f"base_model.model.{layer}.lora_{side}.weight"] for side in "AB"]
            limit = 1e-10 if self.reference.dtype == torch.float64 else 1e-4
            torch.testing.assert_close(own, list(pair), rtol=limit, atol=limit)
            self.reference.adapters[name].factors[layer] = (own[0].detach().clone(), own[1].detach().clone())

    def _new(self) -> str:
        self.count += 1
        return f"a{self.count}"

    def _some(self, rng: random.Random, most: int = 3) -> list[str]:
        names = list(self.reference.adapters)
        return rng.sample(names, rng.randint(1, min(most, len(names))))

    # ------------------------------------------------------------------ operations
    def add(self, rng: random.Random) -> None:
        if len(self.reference.adapters) >= MANY:
            self.delete(rng)
            return
        r, alpha, layers = rng.randint(1, 4), float(rng.randint(1, 9)), rng.choice([["up"], ["down"], ["up", "down"]])
        name = self._new()
        self.model.add_adapter(name, LoraConfig(r=r, lora_alpha=alpha, target_modules=layers))
        self.model.eval()
        self._put(name, self._drawn(rng, r, alpha, layers))

    def save(self, rng: random.Random) -> None:
        name = rng.choice(list(self.reference.adapters))
        folder = self.folder / f"s{rng.randrange(6)}"
        self.saved = [(f, k) for f, k in self.saved if f.parent != folder]
        self.model.save_pretrained(folder, selected_adapters=[name])
        self.saved.append((folder / name, self.reference.adapters[name].copy()))

    def load(self, rng: random.Random) -> None:
        if not self.saved or len(self.reference.adapters) >= MANY:
            self.save(rng)
            return
        folder, known = rng.choice(self.saved)
        name = self._new()
        self.model.load_adapter(folder, name)
        self.reference.adapters[name] = own = known.copy()
        own.to(self.reference.dtype)

    def choose(self, rng: random.Random) -> None:
        self.reference.active, self.reference.merged = self._some(rng), []  # what is merged is unmerged first
        names = self.reference.active
        self.model.set_adapter(names[0] if len(names) == 1 and rng.random() < 0.5 else names)

    def mix(self, rng: random.Random) -> None:
        """A batch whose rows have different adapters, in one call, or in a block with another call inside."""
        x = self._x(rng, 5)
        rows = [rng.choice([[], *([(n, rng.choice([1.0, 0.5, -2.0])) for n in self._some(rng)] for _ in "ab")])
                for _ in range(5)]  # fmt: skip
        names: list[Any] = [row or "__base__" for row in rows]
        own, dtype = x.to(self.reference.dtype), self.reference.dtype
        if self.reference.merged:
            with pytest.raises(ValueError, match="merged"):
                self.model(own, adapter_names=names)
            return
        # The rows' adapters act, but where all of the model is switched off.
        wanted = [row if self.reference.enabled else [] for row in rows]
        expected = torch.cat([self.reference.forward(x[[i]].double(), row) for i, row in enumerate(wanted)])
        with torch.set_grad_enabled(rng.random() < 0.5):
            self.close(self.model(own, adapter_names=names).detach(), expected)
        with torch.no_grad(), self.model.base_model.routed(names):
            self.close(self.model(own), expected)
            self.model(torch.zeros(2, 2, 6, dtype=dtype), adapter_names=["__base__", rng.choice(self._some(rng))])
            self.close(self.model(own), expected)

    def step(self, rng: random.Random) -> None:
        """One step of gradient descent on the active adapters."""
        reference = self.reference
        if reference.merged or not reference.enabled:
            self.unmerge(rng)
            return
        self.model.set_adapter(reference.active)
        x = self._x(rng)
        self.model.zero_grad()
        self.model(x.to(reference.dtype)).sin().mean().backward()
        trained = [(n, k, M) for n in reference.active for k, M in reference.adapters[n].factors.items()]
        for _, _, pair in trained:
            for M in pair:
                M.requires_grad_()
        flat = [M for _, _, pair in trained for M in pair]
        gradients = torch.autograd.grad(reference.forward(x.double(), reference.now()).sin().mean(), flat)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        assert sum(p.numel() for p in parameters) == sum(M.numel() for M in flat)
        with torch.no_grad():
            for p in parameters:
                p -= 0.05 * p.grad
                p.grad = None
            for M, gradient in zip(flat, gradients, strict=True):
                M.requires_grad_(False)
                M -= 0.05 * gradient
        for name in reference.active:  # roundings must not grow from step to step
            self._read(name)

    def merge(self, rng: random.Random) -> None:
        names = [n for n in self._some(rng) if n not in self.reference.merged]
        if names and self.reference.enabled:
            self.model.merge_adapter(names)
            self.reference.merged += names

    def unmerge(self, rng: random.Random) -> None:
        if self.reference.merged:
            self.model.unmerge_adapter()
            self.reference.merged = []

    def delete(self, rng: random.Random) -> None:
        reference = self.reference
        name = rng.choice(list(reference.adapters))
        if name in reference.merged:
            with pytest.raises(ValueError, match="merged"):
                self.model.delete_adapter(name)
        elif len(reference.adapters) > 1:
            self.model.delete_adapter(name)
            del reference.adapters[name]
            reference.active = [n for n in reference.active if n != name] or [min(reference.adapters)]  # as in PEFT

    def off(self, rng: random.Random) -> None:
        """Switched off inside a block, even while merged, and even where the block is left by an error."""
        x = self._x(rng)
        with torch.no_grad():
            with self.model.disable_adapter():
                self.close(self.model(x.to(self.reference.dtype)), self.reference.forward(x.double(), []))
            with pytest.raises(RuntimeError), self.model.disable_adapter():
                self.model(x[..., :-1])

    def switch(self, rng: random.Random) -> None:
        """All adapters off, or on again, outside any block."""
        self.reference.enabled = not self.reference.enabled
        (self.model.enable_adapter_layers if self.reference.enabled else self.model.disable_adapter_layers)()

    def copies(self, rng: random.Random) -> None:
        """Go on with a copy; what is done to the one that stays behind is not seen in it."""
        left, self.model = self.model, copy.deepcopy(self.model)
        with torch.no_grad():
            for parameter in left.parameters():
                parameter.zero_()

    def moves(self, rng: random.Random) -> None:
        self.moves_to(rng.choice([torch.float32, torch.float64]))

    def moves_to(self, dtype: torch.dtype) -> None:
        reference = self.reference
        reference.dtype = dtype
        self.model.to(reference.dtype)
        reference.base = {k: v.to(reference.dtype) for k, v in reference.base.items()}
        for known in reference.adapters.values():
            known.to(reference.dtype)
        if reference.merged:  # a merged weight has been rounded by itself: start from the originals again
            names = reference.merged
            self.unmerge(random.Random(0))
            self.model.merge_adapter(names)
            reference.merged = names

    def do(self, operation: str, seed: int) -> None:
        rng = random.Random(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            getattr(self, operation)(rng)
            self.check(rng)


OPERATIONS = [
    "add",
    "save",
    "load",
    "choose",
    "mix",
    "step",
    "merge",
    "unmerge",
    "delete",
    "off",
    "switch",
    "copies",
    "moves",
]


class Machine(RuleBasedStateMachine):
    """Operations in any order, the shortest failing one being looked for."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.world = World(Path(self.folder.name))

    @rule(operation=st.sampled_from(OPERATIONS), seed=st.integers(0, 1 << 16))
    def operate(self, operation: str, seed: int) -> None:
        self.world.do(operation, seed)

    @precondition(lambda self: len(self.world.reference.adapters) < MANY)
    @rule(seed=st.integers(0, 1 << 16))
    def grow(self, seed: int) -> None:
        """Often, so that there are more adapters than stay in the module tree."""
        self.world.do("add", seed)

    def teardown(self) -> None:
        self.folder.cleanup()


def test_any_order_of_operations_is_the_plain_models() -> None:
    run_state_machine_as_test(
        Machine,
        settings=settings(max_examples=12, stateful_step_count=25, derandomize=True, deadline=None, database=None),
    )


def test_what_deleted_adapters_of_many_configs_leave_behind_does_not_grow(tmp_path: Path) -> None:
    world, counts = World(tmp_path), []
    for i in range(61):
        if i % 20 == 0:
            gc.collect()
            counts.append(len(gc.get_objects()))
        world.model.add_adapter("passing", LoraConfig(r=2, lora_alpha=i + 1, target_modules=["up"]))
        world.model.delete_adapter("passing")
    assert counts[3] <= counts[1] + 50, counts


@dataclass
class Held:
    """What there is with one adapter of a given size left.

    Resident memory tells nothing here: what allocators keep of freed memory differs from run to run.
    """

    tensors: int  # live ones, of whoever
    bytes: int  # of their storages, each counted once
    objects: int  # of the collector
    numbers: int  # in parameters
    traced: int  # bytes of Python objects, which the collector does not see all of


def held(world: World) -> Held:
    world.unmerge(random.Random(0))
    name = world._new()
    world.model.add_adapter(name, LoraConfig(r=2, target_modules=["up", "down"]))
    world._put(name, world._drawn(random.Random(0), 2, 8.0, ["up", "down"]))
    world.model.set_adapter(name)
    for other in [n for n in world.reference.adapters if n != name]:
        world.model.delete_adapter(other)
        del world.reference.adapters[other]
    world.reference.active, world.saved = [name], []
    world.moves_to(torch.float64)
    gc.collect()
    objects = gc.get_objects()
    tensors = [o for o in objects if issubclass(type(o), Tensor) and not issubclass(type(o), FakeTensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    numbers = sum(p.numel() for p in world.model.parameters())
    return Held(len(tensors), sum(storages.values()), len(objects), numbers, tracemalloc.get_traced_memory()[0])


@pytest.mark.slow
@pytest.mark.parametrize("seed", [11, 12])
def test_two_thousand_operations_leave_memory_flat(seed: int, tmp_path: Path) -> None:
    world, rng, seen = World(tmp_path), random.Random(seed), []
    tracemalloc.start()
    try:
        for i in range(2001):
            if i % 500 == 0:
                seen.append(held(world))
            world.do(rng.choice([*OPERATIONS, "add", "add"]), rng.randrange(1 << 30))
    finally:
        tracemalloc.stop()
    first, warm, *_, last = seen  # what is made once is there after the first 500 operations
    assert last.numbers == first.numbers
    assert last.tensors <= warm.tensors + 4, seen  # a leak of one an operation would be 1,500
    assert last.bytes <= 2 * warm.bytes, seen
    assert last.objects <= warm.objects + 300, seen  # some of what is kept is bounded, not constant
    assert last.traced <= warm.traced + 100 * 1500, seen  # 100 bytes an operation
