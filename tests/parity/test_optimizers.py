"""The optimisers: PEFT's groups by name, and PEFT's weights after five steps."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import peft
import peft.optimizers as theirs_all
import pytest
import torch
from torch import nn

import trimtab
from tests.parity.pairs import near, pair, quiet, run, trainable
from trimtab.train.optimizers import LoraFAOptimizer

NAMES = ["create_lorafa_optimizer", "create_loraplus_optimizer", "create_riemannian_optimizer"]
LINEAR: dict[str, Any] = {"r": 3, "lora_alpha": 6}

# Both libraries' model and fields; PEFT's LoRA-FA does not go through with DoRA, trained biases or convolutions.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LINEAR),
    "gpt2": ("gpt2", LINEAR),
    "everything": ("llama", {**LINEAR, "target_modules": "all-linear", "rank_pattern": {"v_proj": 2}}),
    "rslora": ("llama", {**LINEAR, "use_rslora": True}),
    "embedding": ("toy", {**LINEAR, "target_modules": ["embed", "plain", "biased", "conv"]}),
    "saved": ("toy", {**LINEAR, "target_modules": ["plain", "biased"], "modules_to_save": ["norm", "my_score"]}),
    "biases": ("toy", {**LINEAR, "target_modules": ["plain", "biased"], "bias": "all"}),
}
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "dora": ("toy", {**LINEAR, "target_modules": ["embed", "plain", "biased"], "use_dora": True}),
    "lora_bias": ("toy", {**LINEAR, "target_modules": ["plain", "biased"], "lora_bias": True}),
    "tokens": ("llama", {**LINEAR, "trainable_token_indices": [3, 4]}),
}


def table(cases: dict[str, Any]) -> Any:
    return pytest.mark.parametrize(("name", "fields"), cases.values(), ids=cases)


def groups(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """An optimiser's groups with their parameters' names; PEFT's order within a group follows its module tree."""
    names = {id(p): n for n, p in model.named_parameters()}
    return [{**g, "params": sorted(names[id(p)] for p in g["params"])} for g in optimizer.param_groups]


def five_steps(name: str, models: tuple[Any, Any], make: Callable[[Any, Any], torch.optim.Optimizer]) -> float:
    """Train both models and compare what moved; returns how far it went."""
    start = {n: p.detach().clone() for n, p in models[0].named_parameters()}
    for library, model in zip((trimtab, peft.optimizers), models, strict=True):
        model.train()
        optimizer = quiet(make, library, model)
        for _ in range(5):
            optimizer.zero_grad()
            out = run(model, name)
            (out - torch.linspace(-1, 1, out.shape[-1], dtype=out.dtype)).square().mean().backward()
            optimizer.step()
    ours, theirs = models
    held = dict(theirs.named_parameters())
    moved = 0.0
    for n, p in ours.named_parameters():
        if p.requires_grad:
            near(p, held[n], 1e-5)
            moved = max(moved, (p - start[n]).abs().max().item())
    return moved


@pytest.mark.parametrize("name", NAMES)
def test_signature(name: str) -> None:
    mine, other = (inspect.signature(getattr(m, name)).parameters for m in (trimtab, theirs_all))
    assert [(p.name, p.kind, p.default) for p in mine.values()] == [(p.name, p.kind, p.default) for p in other.values()]


def test_signature_of_lorafa() -> None:
    mine, other = (inspect.signature(c).parameters for c in (LoraFAOptimizer, theirs_all.lorafa.LoraFAOptimizer))
    assert [(p.name, p.default) for p in mine.values()] == [(p.name, p.default) for p in other.values()]


@table({**CASES, **MORE})
@pytest.mark.parametrize("extra", [{}, {"loraplus_lr_embedding": 1e-3, "loraplus_weight_decay": 0.1, "eps": 1e-7}])
def test_loraplus_groups(name: str, fields: dict[str, Any], extra: dict[str, Any]) -> None:
    found = []
    for library, model in zip((trimtab, theirs_all), pair(name, fields), strict=True):
        made = library.create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=16, **extra)
        found.append((type(made), made.defaults, groups(model, made)))
    assert found[0] == found[1]
    assert len(found[0][2]) == 4


@table({**CASES, **MORE})
def test_loraplus_weights(name: str, fields: dict[str, Any]) -> None:
    def make(library: Any, model: Any) -> torch.optim.Optimizer:
        return library.create_loraplus_optimizer(
            model,
            torch.optim.AdamW,
            lr=1e-3,
            loraplus_lr_ratio=4,
            loraplus_lr_embedding=1e-3,
            loraplus_weight_decay=0.1,
        )

    assert five_steps(name, pair(name, fields, torch.float64, autocast_adapter_dtype=False), make) > 1e-3


@table(CASES)
def test_lorafa_weights(name: str, fields: dict[str, Any]) -> None:
    """In double precision, where PEFT's autocast to bfloat16 does not act."""

    def make(library: Any, model: Any) -> torch.optim.Optimizer:
        return library.create_lorafa_optimizer(model, 3, 6, lr=1e-2, weight_decay=0.1)

    models = pair(name, fields, torch.float64, autocast_adapter_dtype=False)
    assert five_steps(name, models, make) > 1e-2
    # PEFT never updates an embedding's A either, but computes its gradient.
    assert trainable(models[0]) == {n for n in trainable(models[1]) if "lora_embedding_A" not in n}


@table({**CASES, **MORE})
@pytest.mark.parametrize("optimizer_cls", [torch.optim.SGD, torch.optim.AdamW])
def test_riemannian_weights(name: str, fields: dict[str, Any], optimizer_cls: type[torch.optim.Optimizer]) -> None:
    def make(library: Any, model: Any) -> torch.optim.Optimizer:
        return library.create_riemannian_optimizer(model, optimizer_cls, lr=1e-3, reg=0.02, weight_decay=0.1)

    models = pair(name, fields, torch.float64, autocast_adapter_dtype=False)
    assert five_steps(name, models, make) > 1e-4
    found = [groups(m, quiet(make, lib, m)) for lib, m in zip((trimtab, theirs_all), models, strict=True)]
    assert found[0] == found[1]


def test_lorafa_in_single_precision_is_not_rounded_to_bfloat16() -> None:
    """PEFT projects under bfloat16 autocast; we in fp32. Both beside the same model in double precision."""

    def weights(library: Any, model: Any) -> dict[str, torch.Tensor]:
        optimizer = quiet(library.create_lorafa_optimizer, model, 3, 6, lr=1e-2)
        for _ in range(5):
            optimizer.zero_grad()
            run(model.train(), "llama").float().square().mean().backward()
            optimizer.step()
        return {n: p.detach().double() for n, p in model.named_parameters() if p.requires_grad}

    exact = weights(trimtab, pair("llama", LINEAR, torch.float64, autocast_adapter_dtype=False)[0])
    ours, theirs = pair("llama", LINEAR)
    errors = [
        max((found[n] - exact[n]).abs().max().item() for n in exact)
        for found in (weights(trimtab, ours), weights(theirs_all, theirs))
    ]
    assert errors[0] < 1e-4 < errors[1]


@pytest.mark.parametrize("case", ["dora", "lora_bias"])
def test_lorafa_where_peft_fails(case: str) -> None:
    """PEFT's LoRA-FA crashes beside a trained `lora_bias`, and leaves DoRA's last magnitude as it was."""
    name, fields = MORE[case]
    fields = {**fields, "target_modules": ["plain", "biased"]}
    stuck = []
    for library, model in zip((trimtab, theirs_all), pair(name, fields), strict=True):
        optimizer = quiet(library.create_lorafa_optimizer, model, 3, 6, lr=1e-2)
        before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        run(model.train(), name).square().mean().backward()
        try:
            optimizer.step()
        except (TypeError, RuntimeError):
            assert library is theirs_all
        stuck.append([n for n, p in model.named_parameters() if n in before and torch.equal(p, before[n])])
    assert stuck[0] == []
    assert stuck[1] != []
