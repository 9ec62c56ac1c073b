"""An adapter at another rank: the best approximation of each layer's dW, with its error stated before it is written.

By Eckart and Young the first k components of the SVD of dW are its best approximation of rank k, and the error is the
norm of the others. Which layer keeps how many is one of four choices: the same everywhere; as many as hold a share of
each layer's energy; the largest of all layers together that hold a share of all energy (PARA, 2026,
https://arxiv.org/abs/2604.27796, section 3); the best that fit a file of some size.

A layer of DoRA, W' = m·(W + dW) / ||W + dW||, has dW cut and m kept: each row keeps its length, and its direction is
what is approximated.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.core.method import require_rank
from trimtab.errors import ConfigError
from trimtab.rank.adapter_file import EXPERTS, AdapterFile, Pair
from trimtab.rank.spectrum import delta_spectrum, energy_rank, significant, svd_of_product

Ranks = dict[str, int]  # path -> how many components of each of its matrices stay
HEADER = 100  # bytes of a safetensors file that say where a tensor lies, beside its name; generous
FORMER = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class ResizedLayer:
    """One layer before and after.

    Attributes:
        norm: ||dW||, Frobenius.
        error: ||dW - dW'||, Frobenius.
        rank: afterwards; 0 where the layer is left out.
    """

    path: str
    old_rank: int
    rank: int
    norm: float
    error: float

    @property
    def relative(self) -> float:
        """error / norm."""
        return self.error / self.norm if self.norm else 0.0


@dataclass(frozen=True)
class Resized:
    """What was cut, and what it cost.

    Attributes:
        old_bytes, bytes: the sizes of all tensors.
        old_score, score: what `score` said of the adapter before and after.
        output: where it was written, if it was.
    """

    layers: list[ResizedLayer]
    old_parameters: int
    parameters: int
    old_bytes: int
    bytes: int
    output: str | None = None
    old_score: float | None = None
    score: float | None = None

    @property
    def relative(self) -> float:
        """The error of all layers together, relative to their norm."""
        norm = math.hypot(*(x.norm for x in self.layers))
        return math.hypot(*(x.error for x in self.layers)) / norm if norm else 0.0


def resize_adapter(
    adapter: str | os.PathLike[str],
    rank: int | None = None,
    energy: float | None = None,
    global_energy: float | None = None,
    max_size: int | None = None,
    output: str | os.PathLike[str] | None = None,
    score: Callable[[str | os.PathLike[str]], float] | None = None,
) -> Resized:
    """A LoRA adapter cut down to another rank, or grown to it.

    Give one of `rank`, `energy`, `global_energy` and `max_size`. With `rank` a layer that has fewer is grown: its dW
    stays exactly the same, and training can go on from it. With the others a layer that keeps nothing is left out.

    Args:
        adapter: its folder or Hub id; the base model is not needed.
        rank: the same for every layer.
        energy: each layer keeps the fewest components that hold this share of its own energy, the sum of the squares
            of its singular values. 1.0 is the true rank of each.
        global_energy: of all components of all layers the fewest that hold this share of all energy.
        max_size: bytes of the weights' file: of all components those that lose the least for it.
        output: the folder of the new adapter; None: nothing is written.
        score: adapter's folder -> a figure of its quality, taken before and after.

    Raises:
        ConfigError: not one choice, or one that cannot be met.
        AdapterFileError: files that are missing, damaged, or of an adapter that has no rank to change.
    """
    chosen = {"rank": rank, "energy": energy, "global_energy": global_energy, "max_size": max_size}
    given = [name for name, value in chosen.items() if value is not None]
    if len(given) != 1:
        raise ConfigError(f"Give one of {', '.join(chosen)}; {' and '.join(given) if given else 'none'} was given.")
    if score is not None and output is None:
        raise ConfigError("To score the adapter afterwards it must be written: name an output.")
    old = AdapterFile.read(adapter)
    old.require_own_base()
    energies = {path: energies_of(pair) for path, pair in old.pairs.items()}
    ranks = _chosen(old, energies, rank, energy, global_energy, max_size)
    if not any(ranks.values()):
        raise ConfigError(f"The adapter in {old.source} changes nothing, every dW is 0: only `rank` can resize it.")
    new = old.with_pairs({path: cut(pair, ranks[path]) for path, pair in old.pairs.items() if ranks[path]})
    report = _report(old, new, energies, ranks)
    if output is None:
        return report
    before = score(adapter) if score else None  # of the old one, which the output may replace
    folder = new.write(output)
    return replace(report, output=str(folder), old_score=before, score=score(folder) if score else None)


def energies_of(pair: Pair) -> Tensor:
    """The squares of a layer's singular values, largest first (k,); summed over several matrices of one rank."""
    return delta_spectrum(pair.A, pair.B, pair.scale).square().sum(0)


def cut(pair: Pair, rank: int) -> Pair:
    """A layer's factors with `rank` rows of each A: the best approximation of dW, or dW itself where they are more."""
    have = pair.A.shape[1]
    if rank == have:
        return pair
    if rank > have:
        return pair.grown(rank)
    U, S, Vh = svd_of_product(pair.A, pair.B)
    root = S[:, :rank].sqrt()  # of equal size: neither factor leaves the range of half precision
    A, B = root[..., None] * Vh[:, :rank], U[..., :rank] * root[:, None]
    A, B = F.pad(A, (0, 0, 0, rank - A.shape[1])), F.pad(B, (0, rank - B.shape[2]))  # a rank above both dimensions
    return replace(pair, A=A.to(pair.A.dtype), B=B.to(pair.B.dtype))


# ---------------------------------------------------------------------- the choices
def _chosen(
    old: AdapterFile,
    energies: Mapping[str, Tensor],
    rank: int | None,
    energy: float | None,
    global_energy: float | None,
    max_size: int | None,
) -> Ranks:
    if rank is not None:
        return _uniform(old, rank)
    _refuse_unequal(old, sized=max_size is not None)
    if energy is not None:
        return {path: max(energy_rank(e, energy), _least(old, path)) for path, e in energies.items()}
    if global_energy is not None:
        return _all(old, energies, global_energy)
    assert max_size is not None
    return _fitting(old, energies, max_size)


def _uniform(old: AdapterFile, rank: int) -> Ranks:
    require_rank(rank, "rank")
    if odd := [f"{p} ({pair.step} groups)" for p, pair in old.pairs.items() if rank % pair.step]:
        raise ConfigError(f"The rank of a grouped convolution is a multiple of its groups: {rank} is not of {odd[0]}.")
    return {path: rank // pair.step for path, pair in old.pairs.items()}


def _all(old: AdapterFile, energies: Mapping[str, Tensor], share: float) -> Ranks:
    order = _components(old, energies, lambda path, energy: energy)
    kept = energy_rank(torch.tensor([energy for energy, _ in order], dtype=torch.float64), share)
    return _counted(old, [path for _, path in order[:kept]])


def _fitting(old: AdapterFile, energies: Mapping[str, Tensor], size: int) -> Ranks:
    """What loses the least energy for its bytes goes in first."""
    width = {path: pair.cost * pair.A.element_size() for path, pair in old.pairs.items()}
    names = {path: sum(len(key) + HEADER for key in pair.tensors()) for path, pair in old.pairs.items()}
    ranks = {path: _least(old, path) for path in old.pairs}
    used = HEADER + sum(t.numel() * t.element_size() + len(key) + HEADER for key, t in old.rest.items())
    used += sum(r * width[path] + names[path] for path, r in ranks.items() if r)
    left = dict(ranks)  # components of `ranks` still to come by in order
    closed = set()  # the next of a layer cannot come before the one before it
    for _, path in _components(old, energies, lambda path, energy: energy / width[path]):
        if left[path]:
            left[path] -= 1
            continue
        more = width[path] + (0 if ranks[path] else names[path])
        if path in closed or used + more > size:
            closed.add(path)
            continue
        ranks[path] += 1
        used += more
    if used > size or not any(ranks.values()):
        least = used if any(ranks.values()) else used + min(width[p] + names[p] for p in width)
        raise ConfigError(f"A file of {size:,} bytes is too small: the least this adapter can have is {least:,}.")
    return ranks


def _components(
    old: AdapterFile, energies: Mapping[str, Tensor], value: Callable[[str, float], float]
) -> list[tuple[float, str]]:
    """(value, path) of every component of every layer that is more than rounding, the most valuable first."""
    found = [(value(p, float(x)), p) for p, e in energies.items() for x in e[: significant(e)]]
    return sorted(found, key=lambda item: -item[0])


def _counted(old: AdapterFile, paths: list[str]) -> Ranks:
    counts = dict.fromkeys(old.pairs, 0)
    for path in paths:
        counts[path] += 1
    return {path: max(n, _least(old, path)) if paths else 0 for path, n in counts.items()}


def _least(old: AdapterFile, path: str) -> int:
    """The rank that a layer must keep: 0 where it can be left out."""
    pair = old.pairs[path]
    beside = any(key.startswith(f"{pair.stem}.") for key in old.rest)  # a magnitude, a bias
    nested = pair.form == "stack" or "base_layer" in pair.stem  # a key counts the layers around it
    ending = any(other.endswith(f".{path}") for other in old.pairs)  # to name it would name that one too
    tokens = bool(old.config.trainable_token_indices)
    return int(beside or nested or ending or tokens or bool(old.config.target_parameters))


def _refuse_unequal(old: AdapterFile, sized: bool) -> None:
    """Raise where layers must have one rank, because a reader could not tell which has which."""
    if former := next((p for p in old.pairs if FORMER.search(p)), None):
        raise ConfigError(
            f"The adapter names the experts of an older transformers ('{former}'), which a newer one reads as one "
            "parameter with one rank: give `rank`."
        )
    if sized and (inner := next((p for p, pair in old.pairs.items() if pair.owner != p), None)):
        raise ConfigError(f"'{inner}' and '{old.pairs[inner].owner}' have one rank: give another choice than a size.")
    stacks = [pair.path for pair in old.pairs.values() if pair.form == "stack"]
    modules = [path.rpartition(".")[0] for path in stacks]
    unknown = [p for p in stacks if modules.count(p.rpartition(".")[0]) > 1 and p.rpartition(".")[2] not in EXPERTS]
    if unknown:
        raise ConfigError(
            f"The file does not say which parameter of '{unknown[0].rpartition('.')[0]}' is which, so that all must "
            "have one rank: give `rank`."
        )


# ---------------------------------------------------------------------- what came of it
def _report(old: AdapterFile, new: AdapterFile, energies: Mapping[str, Tensor], ranks: Ranks) -> Resized:
    layers = []
    for path, pair in old.pairs.items():
        now = new.pairs.get(path)
        lost = energies[path][ranks[path] :]
        norm, error = math.sqrt(float(energies[path].sum())), math.sqrt(float(lost.sum()))
        layers.append(ResizedLayer(path, pair.rank, now.rank if now else 0, norm, error))
    before, after = old.tensors.values(), new.tensors.values()
    return Resized(
        layers,
        old_parameters=sum(t.numel() for t in before),
        parameters=sum(t.numel() for t in after),
        old_bytes=sum(t.numel() * t.element_size() for t in before),
        bytes=sum(t.numel() * t.element_size() for t in after),
    )
