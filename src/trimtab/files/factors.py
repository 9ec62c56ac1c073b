"""The pairs of factors in an adapter's file: dW = s·B·A of each module, read off the file alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from trimtab.core.config import match_pattern
from trimtab.files.codec import PREFIX

# How a pair's keys end: (of A, of B).
LAYER = (".lora_A.weight", ".lora_B.weight")  # linear and convolutional
EMBEDDING = (".lora_embedding_A", ".lora_embedding_B")
BARE = (".lora_A", ".lora_B")  # AdaLoRA's
ENDINGS = (LAYER, EMBEDDING, BARE)


@dataclass(frozen=True)
class Factors:
    """dW = s·B·A of one module, or of each matrix of a stack."""

    A: Tensor  # (..., r, in), fp64
    B: Tensor  # (..., out, r), fp64
    scale: float

    @property
    def rank(self) -> int:
        """r."""
        return self.A.shape[-2]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of dW: (..., out, in)."""
        return (*self.B.shape[:-1], self.A.shape[-1])

    def inner(self, other: Factors) -> float:
        """<dW, dW'> = s·s'·tr((Bᵀ·B')·(A'·Aᵀ)), without forming either."""
        return self.scale * other.scale * float(((self.B.mT @ other.B) * (self.A @ other.A.mT)).sum())

    def norm(self) -> float:
        """The Frobenius norm of dW."""
        square = self.inner(self)
        return math.sqrt(max(square, 0.0)) if math.isfinite(square) else square


def read_factors(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[dict[str, Factors], list[str]]:
    """({path of a module: its factors}, what is wrong with the rest).

    Args:
        config: the content of the adapter's `adapter_config.json`.
        tensors: the adapter's tensors by their keys on disk.
    """
    found: dict[str, Factors] = {}
    faults: list[str] = []
    for key, A in tensors.items():
        ends = next((e for e in ENDINGS if key.endswith(e[0])), None)
        if ends is None:
            if any(key.endswith(b) and key.removesuffix(b) + a not in tensors for a, b in ENDINGS):
                faults.append(f"{key} has no A beside it")
            continue
        stem = key.removesuffix(ends[0])
        B = tensors.get(stem + ends[1])
        if B is None:
            faults.append(f"{key} has no B beside it")
            continue
        E = tensors.get(stem + ".lora_E")
        path = _path(config, stem.removeprefix(PREFIX))
        r, scale = _rank_and_scale(config, path)
        A, B = A.detach().double().flatten(1), B.detach().double().flatten(1)
        if A.shape[0] != B.shape[1]:
            faults.append(f"{path}: A has {A.shape[0]} rows, B {B.shape[1]} columns")
            continue
        if E is not None:  # AdaLoRA, cut down to the triplets that are left
            A = A * E.detach().double()
        elif r and _stacked(config, path) and A.shape[0] > r and A.shape[0] % r == 0:
            # A has the rows of one expert after another; B's columns are the experts' first ones, then their second ...
            A, B = A.unflatten(0, (-1, r)), B.unflatten(1, (r, -1)).movedim(-1, 0)
        elif r and A.shape[0] != r:
            faults.append(f"{path}: the config says rank {r}, the file has {A.shape[0]}")
        found[path] = Factors(A, B, scale)
    return found, faults


def _path(config: Mapping[str, Any], stem: str) -> str:
    """The module's path; a parameter's by its own name, which the key hides: of two, the inner is gate and up."""
    names = [str(n) for n in config.get("target_parameters") or ()]
    if not names or not stem.removesuffix(".base_layer").endswith("experts"):
        return stem
    if stem.endswith(".base_layer"):
        return stem.removesuffix("base_layer") + "gate_up_proj"
    alone = {n.rpartition(".")[2] for n in names}
    return f"{stem}.{alone.pop() if len(alone) == 1 else 'down_proj'}"


def _stacked(config: Mapping[str, Any], path: str) -> bool:
    return any(path.endswith(str(n).rpartition(".")[2]) for n in config.get("target_parameters") or ())


def _rank_and_scale(config: Mapping[str, Any], path: str) -> tuple[int, float]:
    """(rank by the config, or 0 where it does not say; s)."""
    if "init_r" in config:  # the file has what is left of it
        alpha, start = config.get("lora_alpha") or config["init_r"], config["init_r"]
        return 0, alpha / (start + 1e-5)
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    rank, alpha = match_pattern(ranks, path), match_pattern(alphas, path)
    r = config.get("r", 8) if rank is None else ranks[rank]
    a = config.get("lora_alpha", 8) if alpha is None else alphas[alpha]
    if not r:
        return 0, 1.0
    return r, a / (math.sqrt(r) if config.get("use_rslora") else r)
