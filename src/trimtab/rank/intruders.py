"""Intruder dimensions: directions that training put among the strongest of a weight, and that the base did not have.

Shuttleworth et al. 2024, https://arxiv.org/abs/2410.21228, section 3: with W = U S V' and W + dW = X T Y', the singular
vector x_j, j <= k, is an intruder where max_i |cos(u_i, x_j)| < epsilon. They come with forgetting: section 6 scales
them, W + dW + (lambda - 1)·t_j x_j y_j', and gets most of what the base knew back for little of the task.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.errors import ConfigError
from trimtab.files.codec import ADDED, PREFIX
from trimtab.rank.changes import Change, changes, read_model


@dataclass(frozen=True)
class MendedLayer:
    """What was done to one layer.

    Attributes:
        intruders: how many were found; of a stack of experts, in all of them.
        moved: ||dW - dW'|| / ||dW||.
    """

    path: str
    intruders: int
    moved: float


@dataclass(frozen=True)
class Mended:
    """What was done to an adapter; scores are what `score` said of it before and after."""

    layers: list[MendedLayer]
    output: str
    old_score: float | None = None
    score: float | None = None

    @property
    def intruders(self) -> int:
        """How many were scaled."""
        return sum(layer.intruders for layer in self.layers)


def find_intruders(W: Tensor, adapted: Tensor, top_k: int = 10, epsilon: float = 0.5) -> Tensor:
    """Which of the first `top_k` left singular vectors of `adapted` are intruders beside W, both (..., out, in).

    Returns:
        (..., k) of bools; k is `top_k`, or the rank that the shape allows where that is less.
    """
    return _svd(W, adapted, top_k, epsilon)[0]


def _svd(W: Tensor, adapted: Tensor, top_k: int, epsilon: float) -> tuple[Tensor, Tensor]:
    """(which are intruders (..., k), the sum of t_j x_j y_j' over those (..., out, in))."""
    if top_k < 1 or not 0 <= epsilon <= 1:
        raise ConfigError(f"`top_k` should be at least 1 and epsilon within 0 and 1, not {top_k} and {epsilon}.")
    base = torch.linalg.svd(W.float(), full_matrices=False).U
    U, S, Vh = torch.linalg.svd(adapted.float(), full_matrices=False)
    U, S, Vh = U[..., :top_k], S[..., :top_k], Vh[..., :top_k, :]
    found = (base.mT @ U).abs().amax(-2) < epsilon
    return found, (U * (S * found)[..., None, :]) @ Vh


@torch.no_grad()
def reduce_intruder_dimension(
    peft_model: Any,
    old_adapter_name: str = "default",
    new_adapter_name: str = "intruder_reduced",
    top_k: int = 10,
    threshold_epsilon: float = 0.5,
    mitigation_lambda: float = 0.75,
    logging_sink: Callable[[str], Any] | None = print,
) -> list[MendedLayer]:
    """Copy a LoRA adapter of a model with its intruder dimensions scaled down; the copy becomes the active one.

    Each layer keeps its rank: what comes out is the best approximation of that rank.

    Args:
        new_adapter_name: of the copy.
        top_k: how many of the strongest directions of each layer are looked at.
        threshold_epsilon: below which cosine one is an intruder.
        mitigation_lambda: what is left of an intruder: 0 takes it out, 1 leaves it as it is.
        logging_sink: is told what was found in each layer, and how far it moved.

    Raises:
        AdapterFileError: the adapter is no LoRA.
        ConfigError: it is a DoRA, whose magnitudes undo the scaling, or its start changed the base.
    """
    old = read_model(peft_model, old_adapter_name)
    old.require_own_base()
    if old.config.use_dora:
        raise ConfigError("DoRA sets the length of each row anew: its intruder dimensions cannot be scaled.")
    by_stem = {pair.stem: pair for pair in old.pairs.values()}
    pairs, report = dict(old.pairs), []
    for change in changes(peft_model, old_adapter_name):
        pair = by_stem.get(PREFIX + change.place)
        if pair is None:  # trained tokens alone
            continue
        found, parts = _of(change, top_k, threshold_epsilon)
        moved = 0.0
        if found.any():
            D = change.delta()
            new = D - (1 - mitigation_lambda) * parts
            times = ADDED["lora_B"] if change.site.reads else 1
            A, B = _factored(new.unflatten(-2, (len(pair.A), -1)) if new.ndim == 2 else new, pair.A.shape[1])
            pairs[pair.path] = replace(pair, A=A.to(pair.A.dtype), B=(B / (pair.scale * times)).to(pair.B.dtype))
            after = (pairs[pair.path].scale * times) * (pairs[pair.path].B.double() @ pairs[pair.path].A.double())
            moved = float((after.reshape(D.shape) - D).norm() / D.norm())
        report.append(MendedLayer(change.path, int(found.sum()), moved))
        if logging_sink is not None:
            logging_sink(f"{change.path}: {report[-1].intruders} intruders" + (f", moved {moved:.1%}" if moved else ""))
    _add(peft_model, old.config, {**old.rest, **{k: t for p in pairs.values() for k, t in p.tensors().items()}},
         new_adapter_name)  # fmt: skip
    return report


def mend_adapter(
    adapter: str | os.PathLike[str],
    model: nn.Module,
    output: str | os.PathLike[str],
    top_k: int = 10,
    epsilon: float = 0.5,
    scale: float = 0.75,
    score: Callable[[str | os.PathLike[str]], float] | None = None,
) -> Mended:
    """Write a LoRA adapter with its intruder dimensions scaled down.

    Args:
        adapter: its folder or Hub id.
        model: the base model; it is as before afterwards.
        output: the folder of the new adapter.
        top_k, epsilon, scale: as `reduce_intruder_dimension` has them; `scale` is its lambda.
        score: adapter's folder -> a figure of its quality (held-out loss, say), taken before and after.
    """
    from trimtab.shell.peft_model import PeftModel

    before = score(adapter) if score else None
    wrapped = PeftModel.from_pretrained(model, adapter)
    try:
        layers = reduce_intruder_dimension(wrapped, "default", "mended", top_k, epsilon, scale, logging_sink=None)
        folder = read_model(wrapped, "mended").write(output)
    finally:
        wrapped.unload()
    return Mended(layers, str(folder), before, score(Path(folder)) if score else None)


def count_intruders(change: Change, top_k: int = 10, epsilon: float = 0.5) -> int:
    """How many intruder dimensions a layer has."""
    return int(_of(change, top_k, epsilon)[0].sum())


def _of(change: Change, top_k: int, epsilon: float) -> tuple[Tensor, Tensor]:
    W = change.base()
    return _svd(W, change.adapted(W), top_k, epsilon)


def _factored(D: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best A (n, rank, in), B (n, out, rank) of D (n, out, in), of equal size."""
    U, S, Vh = torch.linalg.svd(D, full_matrices=False)
    root = S[:, :rank].sqrt()
    A, B = root[..., None] * Vh[:, :rank], U[..., :rank] * root[:, None]
    more = (0, rank - A.shape[1])
    return nn.functional.pad(A, (0, 0, *more)), nn.functional.pad(B, more)


def _add(model: Any, config: Any, tensors: dict[str, Tensor], name: str) -> None:
    """Add an adapter of a config and tensors by their keys on disk, and use it."""
    from trimtab.shell.state import set_peft_model_state_dict

    model.add_adapter(name, config)
    set_peft_model_state_dict(model, tensors, name)
    model.set_adapter(name)
