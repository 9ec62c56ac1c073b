"""Several examples in one sequence, each attending to itself only."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.errors import DataError, TrainError
from trimtab.train.example import IGNORE, Example

__all__ = ["check_packing", "collate_packed", "pack", "token_losses"]


SHORT = 16  # tokens, enough to tell


def pack(examples: Sequence[Example], max_length: int) -> list[list[int]]:
    """Indices of the examples that share each sequence of at most `max_length` tokens; none is cut or left out.

    Best fit, longest first: each example goes where it leaves the least room. The same examples give the same bins.

    Raises:
        DataError: examples longer than `max_length`, named.
    """
    if longer := [i for i, e in enumerate(examples) if len(e.ids) > max_length]:
        first = f"row {examples[longer[0]].row + 1} has {len(examples[longer[0]].ids)}"
        raise DataError(f"{len(longer)} example(s) do not fit into {max_length} tokens; {first}.")
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, bin), sorted
    for i in sorted(range(len(examples)), key=lambda i: (-len(examples[i].ids), i)):
        length = len(examples[i].ids)
        at = bisect_left(room, (length, -1))
        if at == len(room):
            bins.append([])
            left, bin = max_length, len(bins) - 1
        else:
            left, bin = room.pop(at)
        bins[bin].append(i)
        insort(room, (left - length, bin))
    return bins


def collate_packed(examples: Sequence[Example]) -> dict[str, Tensor]:
    """One sequence of all the examples: `input_ids`, `position_ids` and `labels` (1, T), and `seq_lengths` (examples,).

    There is no `attention_mask`, by intent: transformers masks the examples from each other by the position ids, which
    begin anew with each, and does so only where no mask and no cache is given. Call the model with `use_cache=False`,
    and without `seq_lengths`. The first token of each example is not trained: nothing of its own comes before it.
    """
    return {
        "input_ids": torch.tensor([[id for e in examples for id in e.ids]]),
        "position_ids": torch.tensor([[i for e in examples for i in range(len(e.ids))]]),
        "labels": torch.tensor([[label for e in examples for label in [IGNORE, *e.labels[1:]]]]),
        "seq_lengths": torch.tensor([len(e.ids) for e in examples]),
    }


@torch.no_grad()
def token_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:  # (trained tokens,)
    """The loss of each trained token of a batch, in nats and fp32."""
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in batch.items() if name not in ("labels", "seq_lengths")}
    forward: Any = model
    logits = forward(**inputs, use_cache=False).logits[:, :-1].float()  # (B, T - 1, vocabulary)
    labels = batch["labels"][:, 1:].to(device)  # (B, T - 1)
    return nn.functional.cross_entropy(logits[labels != IGNORE], labels[labels != IGNORE], reduction="none")


def check_packing(model: nn.Module, examples: Sequence[Example]) -> None:
    """Make sure that this model keeps packed examples apart: compare the losses of two with those of each alone.

    It takes two short ones, with the dropout off, and compares the losses of all their tokens, prompts as well.

    Raises:
        TrainError: the losses differ, or the model cannot take packed sequences at all; says by how much, and where.
    """
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise TrainError(
            "A prompt would stand before the first of the packed examples, and not before the others. "
            "Train without packing."
        )
    if len(examples) < 2 or max(len(e.ids) for e in examples) < 2:
        return
    shortest = sorted(examples, key=lambda e: (len(e.ids) < SHORT, abs(len(e.ids) - SHORT)))
    pair = [replace(e, labels=e.ids) for e in shortest[:2]]
    was_training = model.training
    model.eval()
    try:
        alone = torch.cat([token_losses(model, collate_packed([e])) for e in pair])
        packed = token_losses(model, collate_packed(pair))
    except (TypeError, ValueError, RuntimeError) as e:
        raise TrainError(f"This model cannot be trained on packed sequences: {e}. Train without packing.") from e
    finally:
        model.train(was_training)
    difference = (packed - alone).abs()
    worst = int(difference.argmax())
    if not difference[worst] <= (1e-3 if _is_precise(model) else 0.25):  # NaN is no agreement
        raise TrainError(
            f"Packed examples see each other in this model: the loss of token {worst + 1} of two is "
            f"{packed[worst]:.4f} packed and {alone[worst]:.4f} alone (mean difference {difference.mean():.4f}). "
            "Train without packing."
        )


def _is_precise(model: nn.Module) -> bool:
    """Whether products are of fp32: others round differently in another shape of batch. What leaks is much more."""
    parameter = next(model.parameters())
    if torch.is_autocast_enabled(parameter.device.type) or torch.get_float32_matmul_precision() != "highest":
        return False
    return parameter.dtype in (torch.float32, torch.float64)
