"""Optimiser steps told to the methods that act on them (AdaLoRA), by torch's own hooks: any training loop will do."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from trimtab.core.method import Method
from trimtab.core.model_method import ModelMethod
from trimtab.graft.adapters import Adapter
from trimtab.layer import checkpointing

HOOKS = ("begin", "step")


def acts(method: Any) -> bool:
    """Whether a method does anything before or after a step."""
    contract = ModelMethod if issubclass(method, ModelMethod) else Method
    return any(getattr(method, hook).__func__ is not getattr(contract, hook).__func__ for hook in HOOKS)


@functools.cache
def watch() -> None:
    """Be told of every optimiser's steps, from now on."""
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    register_optimizer_step_pre_hook(_before)
    register_optimizer_step_post_hook(_after)


def by_hand(adapter: Adapter, t: int) -> None:
    """Step `t` is done, says the caller, who then says so for all steps: what the hooks did for it is taken back."""
    if adapter.undo is not None:
        _restore(adapter)
    adapter.by_hand = True
    _step(adapter, t)


def _before(optimizer: Any, args: Any, kwargs: Any) -> None:
    for adapter in _stepped(optimizer):
        adapter.method.begin(adapter.formulas, adapter.config, adapter.t + 1)


def _after(optimizer: Any, args: Any, kwargs: Any) -> None:
    for adapter in _stepped(optimizer):
        if adapter.by_hand:
            continue
        # Whether the caller tells adapters of steps is known after the first one: so that can be undone.
        first, adapter.undo = not adapter.told, None
        if first:
            adapter.undo = _state(adapter)
        _step(adapter, adapter.t + 1)
        adapter.told = True


def _step(adapter: Adapter, t: int) -> None:
    adapter.t = t
    adapter.method.step(adapter.formulas, adapter.config, t)


def _stepped(optimizer: Any) -> Iterator[Adapter]:
    """The adapters that act on steps and have gradients in an optimiser."""
    held: set[int] = set()
    for board in list(checkpointing.boards):
        for adapter in list(board.residents.adapters.values()) if board.residents is not None else ():
            if not acts(adapter.method) or adapter.parked:
                continue
            held = held or {id(p) for group in optimizer.param_groups for p in group["params"]}
            if any(id(p) in held and p.grad is not None for p in _trained(adapter)):
                yield adapter


def _trained(adapter: Adapter) -> Iterator[Any]:
    for method in adapter.formulas:
        if isinstance(method, nn.Module):
            yield from method.parameters()
        else:
            yield from (method.tensor(leaf) for leaf in method.trained)


def _tensors(adapter: Adapter) -> Iterator[Any]:
    for method in adapter.formulas:
        yield from method.parameters() if isinstance(method, nn.Module) else map(method.tensor, method.declared)


def _state(adapter: Adapter) -> Any:
    return adapter.t, dict(adapter.config.__dict__), [tensor.detach().clone() for tensor in _tensors(adapter)]


@torch.no_grad()
def _restore(adapter: Adapter) -> None:
    adapter.t, config, values = adapter.undo
    adapter.config.__dict__.update(config)
    for tensor, value in zip(_tensors(adapter), values, strict=True):
        tensor.copy_(value)
    adapter.undo = None
