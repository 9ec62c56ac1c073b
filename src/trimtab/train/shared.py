"""One forward pass for the batches of several runs: their rows side by side, each run's loss by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.core.method import Call
from trimtab.layer.head import FusedLoss
from trimtab.train.batches import Batch
from trimtab.train.data import IGNORE
from trimtab.train.loop import Run, call_of

__all__ = ["Part", "fixed_cost", "losses", "passes"]

# What a pass costs beside its tokens, in tokens: on processors estimated from two timings with SmolLM2-135M (40 to 60);
# elsewhere, where a small pass leaves most of the device idle, a guess.
FIXED, ELSEWHERE = 64, 2048


@dataclass(frozen=True)
class Part:
    """A batch of one run, as it goes into a pass.

    Attributes:
        tensors: `input_ids` and `labels` (rows, tokens), and `position_ids` where several rows share a sequence.
        share: what the mean loss of its trained tokens counts in the run's step.
        call: what the adapter's formulas are handed: the random numbers that the batch alone would have.
    """

    run: Run
    batch: Batch
    tensors: dict[str, Tensor]
    share: float
    call: Call

    @classmethod
    def of(cls, run: Run, batch: Batch, trained: int) -> Part:
        """A batch of a step that trains `trained` tokens."""
        tensors = run.batches.tensors(batch)
        tensors.pop("attention_mask", None)  # rows are padded at their end, and no row looks ahead
        return cls(run, batch, tensors, batch.trained / trained, call_of(run, batch))

    @property
    def adapter(self) -> str:
        """The run's."""
        assert self.run.adapter is not None
        return self.run.adapter

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, tokens)."""
        rows, tokens = self.tensors["input_ids"].shape
        return rows, tokens


def passes(parts: Sequence[Part], tokens: int, fixed: int = 0) -> list[list[Part]]:
    """Parts that go through the model together: of like lengths, up to `tokens` with their padding, one at least.

    Of all ways to divide them, by length, the one that computes least: padding is computed, too.

    Args:
        fixed: what a pass costs beside its tokens, in tokens.
    """
    ordered = sorted(parts, key=lambda p: -p.shape[1])
    best: list[tuple[int, int]] = [(0, 0)]  # of the first n parts: (what their passes cost, where the last one begins)
    for end in range(1, len(ordered) + 1):
        found, rows = [], 0
        for begin in reversed(range(end)):
            rows += ordered[begin].shape[0]
            cost = rows * ordered[begin].shape[1]
            if cost > tokens and begin < end - 1:
                break
            found.append((best[begin][0] + fixed + cost, begin))
        best.append(min(found))
    groups, end = [], len(ordered)
    while end:
        begin = best[end][1]
        # Rows of one run side by side, and the runs in an order that does not change from step to step.
        groups.append(sorted(ordered[begin:end], key=lambda p: p.adapter))
        end = begin
    return groups[::-1]


def fixed_cost(model: Any) -> int:
    """What a pass of a model costs beside its tokens, in tokens."""
    return FIXED if next(model.parameters()).device.type == "cpu" else ELSEWHERE


def losses(model: Any, parts: Sequence[Part], fused: FusedLoss | None) -> Tensor:  # (parts,)
    """The mean loss over each part's trained tokens; one forward for all of them.

    Args:
        model: a PeftModel with the parts' adapters.
        fused: what `fuse_loss` put into the model, if it could.
    """
    base, tuner = model.get_base_model(), model.tuner
    device = base.get_input_embeddings().weight.device
    longest = max(part.shape[1] for part in parts)
    inputs = {"input_ids": _rows(parts, "input_ids", longest, 0).to(device)}
    labels = _rows(parts, "labels", longest, IGNORE).to(device)
    if any("position_ids" in part.tensors for part in parts):
        inputs["position_ids"] = torch.cat([_positions(part, longest) for part in parts]).to(device)
    rows = [part.shape[0] for part in parts]
    names = [part.adapter for part in parts for _ in range(part.shape[0])]
    calls = {part.adapter: part.call for part in parts}
    extras = tuner.extras({**inputs, "labels": labels}, names)  # what formulas must know of the forward
    with tuner.routed(names, shape=tuple(labels.shape), calls=calls, **extras):
        if fused is not None:
            with fused.apart(rows):
                sums = base(**inputs, labels=labels, use_cache=False).loss
        else:
            sums = _sums(base(**inputs, use_cache=False).logits, labels, rows)
    trained: Tensor = sums.new_tensor([part.batch.trained for part in parts])
    return sums / trained


def _rows(parts: Sequence[Part], name: str, longest: int, fill: int) -> Tensor:
    """The parts' rows under one another, padded at their end."""
    return torch.cat([F.pad(p.tensors[name], (0, longest - p.shape[1]), value=fill) for p in parts])


def _positions(part: Part, longest: int) -> Tensor:
    """The place of each token in its row; padding begins anew, as a row of its own that nothing looks at."""
    rows, length = part.shape
    own = part.tensors.get("position_ids")
    own = torch.arange(length).expand(rows, -1) if own is None else own
    return torch.cat([own, torch.arange(longest - length).expand(rows, -1)], 1)


def _sums(logits: Tensor, labels: Tensor, rows: Sequence[int]) -> Tensor:  # (parts,)
    """The summed losses of each part's trained tokens, in fp32 at least."""
    found = []
    for part, wanted in zip(logits[:, :-1].split(rows), labels[:, 1:].split(rows), strict=True):
        kept = wanted != IGNORE
        chosen = part[kept]
        chosen = chosen if chosen.dtype == torch.float64 else chosen.float()
        found.append(F.cross_entropy(chosen, wanted[kept], reduction="sum"))
    return torch.stack(found)
