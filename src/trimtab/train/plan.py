"""What a run would train, and what that would take: the table of targets, and time and memory from a few real steps."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trimtab.core.config import match_pattern
from trimtab.errors import TrainError
from trimtab.shell.status import get_layer_status
from trimtab.train.batches import Batch, Batches
from trimtab.train.evaluate import evaluate_loss
from trimtab.train.example import Example
from trimtab.train.loss import batch_loss
from trimtab.train.progress import memory

__all__ = ["Cost", "Target", "measure", "targets", "try_evaluation", "try_longest"]

SECONDS = 10.0  # what timing steps may take


@dataclass(frozen=True)
class Target:
    """Modules of one name in all blocks of the model, and what stands in them."""

    name: str  # with * for the block's number
    count: int
    kind: str  # the class of the frozen layer
    r: str
    alpha: str
    scale: str
    trainable: int  # parameters, of all of them
    why: str


@dataclass(frozen=True)
class Cost:
    """What a run takes, from a few of its steps."""

    tokens_per_second: float
    seconds: float  # of all steps, without evaluations
    memory: int  # bytes: the most in use, with the optimiser's state


def targets(model: Any, asked: Mapping[str, Any] | None = None) -> list[Target]:
    """The adapted modules of a model with one adapter, by name.

    Args:
        asked: the fields of the adapter's config as they were given; the config itself has the names that were found.
    """
    config = model.active_peft_config
    asked = vars(config) if asked is None else asked
    adapter = model.active_adapters[0]
    counts: dict[tuple[str, ...], list[int]] = {}
    try:
        rows = get_layer_status(model)
    except ValueError:  # a prompt stands before the model, in none of its layers
        rows = []
    for row in rows:
        path = row.name.removeprefix("model.")
        layer = _module(model.get_base_model(), path)
        base = getattr(layer, "base_layer", None) or getattr(layer, "original_module", layer)
        said = [_said(layer, name, adapter) for name in ("r", "lora_alpha", "scaling")]
        key = (re.sub(r"(^|\.)\d+(?=\.)", r"\1*", path), type(base).__name__, *said, why(asked, row.module_type, path))
        trained = sum(p.numel() for n, p in layer.named_parameters() if p.requires_grad and adapter in n.split("."))
        found = counts.setdefault(key, [0, 0])
        found[0], found[1] = found[0] + 1, found[1] + trained
    table = [Target(k[0], n, k[1], k[2], k[3], k[4], trained, k[5]) for k, (n, trained) in counts.items()]
    rest = sum(p.numel() for p in model.parameters() if p.requires_grad) - sum(t.trainable for t in table)
    if rest and not table:
        why_so = f"{getattr(config, 'num_virtual_tokens', '')} virtual tokens before every row"
        table.append(Target("(the prompt)", 1, "prompt", "", "", "", rest, why_so))
    elif rest:
        table.append(Target("(shared, or biases)", 1, "", "", "", "", rest, "kept once for all modules"))
    return table


def why(asked: Mapping[str, Any], module_type: str, path: str) -> str:
    """Which setting makes a module a target."""
    wanted, saved = asked.get("target_modules"), asked.get("modules_to_save") or ()
    if module_type == "ModulesToSaveWrapper":
        return f"modules_to_save {next((s for s in saved if path.endswith(s)), '')}".rstrip()
    if isinstance(wanted, str):
        found = wanted if wanted == "all-linear" else f"matches {wanted}"
    elif asked.get("target_parameters"):
        found = "target_parameters"
    else:
        names = [n for n in wanted or () if path == n or path.endswith(f".{n}")]
        found = f"ends in {max(names, key=len)}" if names else "the method's default"
    pattern = match_pattern(asked.get("rank_pattern") or (), path)
    return f"{found}, rank_pattern {pattern}" if pattern else found


def measure(model: nn.Module, batches: Batches, seconds: float = SECONDS) -> Cost:
    """Time and memory of the run's steps: its longest batch first, then others as they come.

    The model's parameters stay as they are. Raises what a batch that does not fit the memory raises.
    """
    try_longest(model, batches)
    most = memory(model)
    was_training = model.training
    model.train()
    try:
        timed = list(_timed(model, batches, (b for step in range(len(batches)) for b in batches[step]), seconds))
    finally:
        model.zero_grad(set_to_none=True)
        model.train(was_training)
    rate = sum(tokens for tokens, _ in timed) / sum(spent for _, spent in timed)
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return Cost(rate, batches.tokens() / rate, most + 2 * trained)


def try_longest(model: nn.Module, batches: Batches) -> None:
    """Forward and backward with the longest batch of the run, so that one that does not fit is known at once.

    Parameters, gradients and random numbers are afterwards as before.

    Raises:
        TrainError: it does not fit the memory.
    """
    every = (batch for step in range(len(batches)) for batch in batches[step])
    longest = max(every, key=lambda b: b.size)
    was_training = model.training
    model.train()
    try:
        with torch.random.fork_rng():
            _pass(model, batches, longest)
    except torch.OutOfMemoryError as e:
        raise TrainError(
            f"The longest batch does not fit the memory: {len(longest.rows)} rows of up to "
            f"{max(len(batches.examples[i].ids) for i in longest.rows)} tokens ({memory(model) / 1e9:.1f} GB in use). "
            "Try a smaller per_device_train_batch_size with more gradient_accumulation_steps, gradient_checkpointing, "
            "or a smaller max_length."
        ) from e
    finally:
        model.zero_grad(set_to_none=True)
        model.train(was_training)


def try_evaluation(model: nn.Module, examples: Sequence[Example], batch_size: int, pad_id: int) -> None:
    """Score one batch of the longest rows to be tested on, for the same reason.

    Raises:
        TrainError: not even one row fits the memory.
    """
    longest = sorted(examples, key=lambda e: -len(e.ids))[:batch_size]
    try:
        evaluate_loss(model, longest, pad_id, batch_size * len(longest[0].ids))
    except torch.OutOfMemoryError as e:
        raise TrainError(
            f"The longest row to be tested on ({len(longest[0].ids)} tokens) does not fit the memory: leave it out."
        ) from e


def _timed(model: nn.Module, batches: Batches, part: Iterable[Batch], seconds: float) -> Iterable[tuple[int, float]]:
    began = time.perf_counter()
    for batch in part:
        start = time.perf_counter()
        _pass(model, batches, batch)
        yield batch.tokens, time.perf_counter() - start
        if time.perf_counter() - began > seconds:
            return


def _pass(model: nn.Module, batches: Batches, batch: Batch) -> None:
    batch_loss(model, batches.tensors(batch)).backward()
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _module(base: nn.Module, path: str) -> Any:
    """The module of a path, or the last one on the way to it: parameters have paths, too."""
    found: Any = base
    for name in path.split("."):
        if name not in found._modules:
            break
        found = found._modules[name]
    return found


def _said(layer: Any, name: str, adapter: str) -> str:
    """What a layer says of one of its adapters, if it says anything."""
    values: Any = getattr(layer, name, None)
    value = values.get(adapter) if hasattr(values, "get") else None
    return f"{float(value):g}" if isinstance(value, int | float) else ""
