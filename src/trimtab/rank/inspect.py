"""What an adapter's files say by themselves: no base model is needed, and none is built.

Norms and ranks are those of dW = s·B·A, from its small factors; dW itself is never formed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.core.config import CONFIG_NAME, PeftConfig
from trimtab.core.io import locate
from trimtab.files.codec import PREFIX
from trimtab.files.factors import ENDINGS, Factors, read_factors
from trimtab.files.finding import adapter_folder
from trimtab.files.store import PICKLED, WEIGHTS, load_peft_weights

PROVENANCE = "trimtab.json"  # written by a training run beside the adapter


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter as it lies on disk."""

    source: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    factors: dict[str, Factors]
    faults: list[str]  # of the factors
    file: Path  # of the weights
    provenance: dict[str, Any] | None = None

    @property
    def rest(self) -> dict[str, Tensor]:
        """The tensors that are no pair of factors: magnitudes, biases, heads, other methods' tensors."""
        paired = tuple(end for pair in ENDINGS for end in pair)
        return {k: t for k, t in self.tensors.items() if not k.endswith((*paired, ".lora_E"))}


@dataclass(frozen=True)
class Layer:
    """One module's dW."""

    path: str
    rank: int
    scale: float
    shape: tuple[int, ...]
    norm: float  # Frobenius
    largest: float  # singular value
    stable_rank: float  # norm² / largest²
    effective_rank: float  # exp of the entropy of the singular values' shares


@dataclass(frozen=True)
class Inspection:
    """What `trimtab inspect` shows."""

    source: str
    method: str
    task: str | None
    base: str | None
    revision: str | None
    targets: Any
    parameters: int
    bytes: int
    sha256: str  # of the weights' file
    dtypes: dict[str, int]  # number format -> parameters
    layers: list[Layer]
    rest: dict[str, float]  # norms of the tensors that are no factors
    norm: float  # of all dW together
    provenance: dict[str, Any] | None
    faults: list[str] = field(default_factory=list)  # what makes it useless or wrong
    notes: list[str] = field(default_factory=list)


def read(adapter: str | os.PathLike[str]) -> AdapterFiles:
    """The files of an adapter in a folder or on the Hub.

    Raises:
        AdapterFileError: it is no adapter, or a file of it cannot be read.
    """
    source = adapter_folder(adapter)
    config_file = locate(source, CONFIG_NAME)
    assert config_file is not None
    config = PeftConfig.from_json_file(config_file)
    tensors = load_peft_weights(source)
    file = locate(source, WEIGHTS) or locate(source, PICKLED)
    assert file is not None
    factors, faults = read_factors(config, tensors)
    return AdapterFiles(source, config, tensors, factors, faults, file, _provenance(file.parent / PROVENANCE))


def _provenance(file: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # it was trained by another tool
        return None
    return content if isinstance(content, dict) else None


def inspect(adapter: str | os.PathLike[str]) -> Inspection:
    """Everything that an adapter's files say by themselves."""
    files = read(adapter)
    config = files.config
    faults, notes = list(files.faults), []
    broken = [k for k, t in files.tensors.items() if t.is_floating_point() and not torch.isfinite(t).all()]
    if broken:
        faults.append(f"NaN or infinity in {len(broken)} of {len(files.tensors)} tensors: {_some(broken)}")
    layers = [_layer(path, f) for path, f in files.factors.items()]
    norm = math.sqrt(sum(x.norm**2 for x in layers))
    still = [x.path for x in layers if x.norm == 0]
    rest = {k.removeprefix(PREFIX): float(t.double().norm()) for k, t in files.rest.items()}
    if not files.tensors:
        faults.append("there is no tensor in it")
    elif layers and len(still) == len(layers) and not any(rest.values()):
        faults.append("it changes nothing: every delta is exactly 0, as at the start of training")
    elif still:
        notes.append(f"{len(still)} of {len(layers)} layers change nothing: {_some(still)}")
    if config.get("use_dora"):
        notes.append("DoRA: norms and ranks are those of s·B·A, the change of its direction; magnitudes need the base")
    dtypes: dict[str, int] = {}
    for tensor in files.tensors.values():
        name = str(tensor.dtype).removeprefix("torch.")
        dtypes[name] = dtypes.get(name, 0) + tensor.numel()
    with files.file.open("rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    return Inspection(
        source=files.source,
        method=str(config.get("peft_type")),
        task=config.get("task_type"),
        base=config.get("base_model_name_or_path"),
        revision=config.get("revision"),
        targets=config.get("target_modules"),
        parameters=sum(t.numel() for t in files.tensors.values()),
        bytes=files.file.stat().st_size,
        sha256=digest,
        dtypes=dtypes,
        layers=layers,
        rest=rest,
        norm=norm,
        provenance=files.provenance,
        faults=faults,
        notes=notes,
    )


def _layer(path: str, f: Factors) -> Layer:
    norm = f.norm()
    if not math.isfinite(norm) or norm == 0:
        none = 0.0 if norm == 0 else math.nan
        return Layer(path, f.rank, f.scale, f.shape, norm, none, none, none)
    values = _spectrum(f)
    shares = values[values > 0] / values.sum()
    entropy = -float((shares * shares.log()).sum())
    largest = float(values[0])
    return Layer(path, f.rank, f.scale, f.shape, norm, largest, (norm / largest) ** 2, math.exp(entropy))


def _spectrum(f: Factors) -> Tensor:  # (r,), or (n·r,) of a stack of n
    """The singular values of s·B·A that can differ from 0, largest first: by QR of both factors."""
    RB, RA = (torch.linalg.qr(M, mode="r").R for M in (f.B, f.A.mT))
    return abs(f.scale) * torch.linalg.svdvals(RB @ RA.mT).flatten().sort(descending=True).values


# --- two adapters ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """How two adapters' deltas of one module stand to each other."""

    path: str
    norms: tuple[float, float]
    cosine: float  # of the deltas, as vectors of all their entries
    # How strongly one delta answers to the inputs that the other one reads, relative to the other one's own answer:
    # ||dW_b·P_a|| / ||dW_a|| with P_a the projection on the rows of A_a.
    into_first: float
    into_second: float
    chance: tuple[float, float]  # what both would be for deltas in random directions: sqrt(r / in) at equal norms


@dataclass(frozen=True)
class Difference:
    """What `trimtab diff` shows."""

    sources: tuple[str, str]
    config: dict[str, tuple[Any, Any]]  # field -> its two values, where they differ
    pairs: list[Pair]
    only: tuple[list[str], list[str]]  # modules that one of them changes
    unequal: list[str]  # modules that both change, in other shapes
    tensors: dict[str, float]  # cosines of other tensors that both have
    norms: tuple[float, float]
    cosine: float
    into_first: float
    into_second: float
    chance: tuple[float, float]
    identical: bool  # every tensor, bit for bit
    notes: list[str] = field(default_factory=list)


def diff(first: str | os.PathLike[str], second: str | os.PathLike[str]) -> Difference:
    """How two adapters differ: their configs, and their deltas layer by layer."""
    a, b = read(first), read(second)
    notes = [f"{x.source}: {fault}" for x in (a, b) for fault in x.faults]
    both = [p for p in a.factors if p in b.factors]
    unequal = [p for p in both if a.factors[p].shape != b.factors[p].shape]
    pairs = [_pair(p, a.factors[p], b.factors[p]) for p in both if p not in unequal]
    norms = tuple(math.sqrt(sum(f.norm() ** 2 for f in x.factors.values())) for x in (a, b))
    inner = sum(p.cosine * p.norms[0] * p.norms[1] for p in pairs)
    if a.config.get("base_model_name_or_path") != b.config.get("base_model_name_or_path"):
        notes.append("they name different base models: deltas of different bases can be compared, but not combined")
    shared = {k for k in a.rest if k in b.rest and a.rest[k].shape == b.rest[k].shape}
    return Difference(
        sources=(a.source, b.source),
        config=_config_changes(a.config, b.config),
        pairs=pairs,
        only=([p for p in a.factors if p not in b.factors], [p for p in b.factors if p not in a.factors]),
        unequal=unequal,
        tensors={k.removeprefix(PREFIX): _cosine(a.rest[k], b.rest[k]) for k in sorted(shared)},
        norms=(norms[0], norms[1]),
        cosine=_ratio(inner, norms[0] * norms[1]),
        into_first=_ratio(math.hypot(*(p.into_first * p.norms[0] for p in pairs)), norms[0]),
        into_second=_ratio(math.hypot(*(p.into_second * p.norms[1] for p in pairs)), norms[1]),
        chance=(
            _ratio(math.hypot(*(p.chance[0] * p.norms[0] for p in pairs)), norms[0]),
            _ratio(math.hypot(*(p.chance[1] * p.norms[1] for p in pairs)), norms[1]),
        ),
        identical=a.tensors.keys() == b.tensors.keys()
        and all(torch.equal(t, b.tensors[k]) for k, t in a.tensors.items()),
        notes=notes,
    )


def _pair(path: str, a: Factors, b: Factors) -> Pair:
    norms = (a.norm(), b.norm())
    return Pair(
        path,
        norms,
        cosine=_ratio(a.inner(b), norms[0] * norms[1]),
        into_first=_ratio(_answer(b, a), norms[0]),
        into_second=_ratio(_answer(a, b), norms[1]),
        chance=(
            _ratio(norms[1], norms[0]) * math.sqrt(min(1.0, a.rank / a.shape[-1])),
            _ratio(norms[0], norms[1]) * math.sqrt(min(1.0, b.rank / b.shape[-1])),
        ),
    )


def _answer(f: Factors, to: Factors) -> float:
    """||dW·P|| with P the projection on the inputs that the other adapter reads."""
    if not (torch.isfinite(to.A).all() and to.A.any()):
        return math.nan
    U, S, _ = torch.linalg.svd(to.A.mT, full_matrices=False)  # (..., in, r), (..., r)
    U = U * (S[..., :1] * 1e-12 < S)[..., None, :]  # directions that rows of A which depend on others do not add
    return Factors(f.A @ U, f.B, f.scale).norm()


def _cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.double().flatten(), b.double().flatten()
    return _ratio(float(a @ b), float(a.norm() * b.norm()))


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.nan


def _config_changes(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    def same(x: Any, y: Any) -> bool:
        return sorted(map(str, x)) == sorted(map(str, y)) if isinstance(x, list) and isinstance(y, list) else x == y

    return {k: (a.get(k), b.get(k)) for k in sorted({*a, *b}) if not same(a.get(k), b.get(k))}


def _some(items: list[str], limit: int = 3) -> str:
    short = [i.removeprefix(PREFIX) for i in items[:limit]]
    return ", ".join(short) + (f" and {len(items) - limit} more" if len(items) > limit else "")
