"""What rank an adapter really has: the spectrum of each layer's dW, and with the base its intruder dimensions."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from trimtab.core.config import type_name
from trimtab.core.targets import layer_index
from trimtab.errors import AdapterFileError
from trimtab.files.codec import PREFIX
from trimtab.rank.adapter_file import AdapterFile, Pair
from trimtab.rank.changes import Change, changes, read_model
from trimtab.rank.intruders import count_intruders
from trimtab.rank.spectrum import ROUNDING, EffectiveRanks, delta_spectrum, effective_ranks, significant
from trimtab.shell.state import adapter_tensors, locate_graft

Item = TypeVar("Item")
ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LayerSpectrum:
    """One adapted weight.

    Attributes:
        layer: the index of the block it lies in, or None.
        module: its path, with a star for that index.
        shape: of dW, (out, in), or (n, out, in) of a stack of experts.
        rank, alpha, scale: as the config has them; None for methods that have none.
        norm: ||dW||, Frobenius.
        values: the singular values of dW that are more than rounding, largest first; of a stack, the root of the sum
            of squares over its matrices.
        effective: how many of them count.
        relative: ||dW|| / ||W||, where the base is known.
        intruders: how many of the strongest directions of W + dW are none of W's, where the base is known.
    """

    path: str
    layer: int | None
    module: str
    shape: tuple[int, ...]
    rank: int | None
    alpha: float | None
    scale: float | None
    norm: float
    values: tuple[float, ...]
    effective: EffectiveRanks
    relative: float | None = None
    intruders: int | None = None


@dataclass(frozen=True)
class Survey:
    """What `inspect_ranks` found.

    Attributes:
        note: what the spectra leave out.
        other: how many parameters the adapter has beside those (heads, biases, magnitudes).
    """

    source: str
    method: str
    layers: list[LayerSpectrum]
    parameters: int
    other: int = 0
    note: str = ""


@torch.no_grad()
def inspect_ranks(
    adapter: str | os.PathLike[str] | nn.Module,
    model: nn.Module | None = None,
    adapter_name: str = "default",
    top_k: int = 10,
    epsilon: float = 0.5,
) -> Survey:
    """The spectrum and the effective ranks of each layer's dW.

    Args:
        adapter: the folder or Hub id of an adapter; or a model that has it, as `adapter_name`.
        model: the base of an adapter that is a folder. A LoRA needs none; with it, its intruder dimensions are counted.
            Of other methods it gives the dW. The model is as before afterwards.
        top_k, epsilon: what an intruder is; see `find_intruders`.

    Raises:
        AdapterFileError: files that are missing or damaged, a factor that is not finite, or a method other than LoRA
            without its base.
    """
    if isinstance(adapter, nn.Module):
        return _of_model(adapter, adapter_name, top_k, epsilon)
    if model is None:
        return _of_file(AdapterFile.read(adapter))
    from trimtab.shell.peft_model import PeftModel

    wrapped = PeftModel.from_pretrained(model, adapter, adapter_name)
    try:
        return _of_model(wrapped, adapter_name, top_k, epsilon, os.fspath(adapter))
    finally:
        wrapped.unload()


def _of_file(file: AdapterFile) -> Survey:
    layers = [_layer(p.path, p.shape, delta_spectrum(p.A, p.B, p.scale), p) for p in file.pairs.values()]
    starts = str(file.config.init_lora_weights)
    note = ""
    if file.config.use_dora:
        note = "DoRA: the spectra are those of s·B·A, the change before each row is set to its magnitude."
    elif starts not in ("True", "False", "gaussian", "orthogonal", "eva"):
        note = f"Started by '{starts}': the spectra are those of s·B·A beside the base that start left."
    other = sum(t.numel() for t in file.rest.values())
    total = sum(p.cost * p.A.shape[1] for p in file.pairs.values()) + other
    return Survey(file.source.strip("'"), "LORA", _sorted(layers), total, other, note)


def _of_model(model: nn.Module, name: str, top_k: int, epsilon: float, source: str = "") -> Survey:
    graft = locate_graft(model)[0]
    config = graft.require(name).config
    kind = type_name(config)
    pairs: dict[str, Pair] = {}
    if kind == "LORA" and not config.use_dora and not config.trainable_token_indices:  # then dW is the factors'
        pairs = {pair.stem: pair for pair in read_model(model, name).pairs.values()}
    layers = [_of_change(c, pairs.get(PREFIX + c.place), top_k, epsilon) for c in changes(model, name)]
    if not layers:
        raise AdapterFileError(f"Adapter '{name}' changes the weight of no layer: it has no rank to look at.")
    total = sum(t.numel() for t in adapter_tensors(graft, name, False, state=None).values())
    return Survey(source or name, kind, _sorted(layers), total)


def _of_change(change: Change, pair: Pair | None, top_k: int, epsilon: float) -> LayerSpectrum:
    W = change.base()
    if pair is not None:
        found = _layer(change.path, pair.shape, delta_spectrum(pair.A, pair.B, pair.scale), pair)
    else:
        D = change.adapted(W) - W
        if not torch.isfinite(D).all():
            raise AdapterFileError(f"'{change.path}' has a NaN or an infinity in its change.")
        S = torch.linalg.svdvals(D)
        # Formulas that form dW in fp32 leave that much noise in it.
        S = torch.where(S.amax(-1, keepdim=True) * ROUNDING * max(D.shape[-2:]) < S, S, 0)
        found = _layer(change.path, tuple(D.shape), S if S.ndim > 1 else S[None], None)
        own: dict[str, Any] = {n: getattr(change.methods[0], n, None) for n in ("r", "lora_alpha", "scaling")}
        found = replace(found, rank=own["r"], alpha=own["lora_alpha"], scale=own["scaling"])
    norm = float(W.norm())
    intruders = count_intruders(change, top_k, epsilon) if change.site.kind != "vector" else None
    return replace(found, relative=found.norm / norm if norm else None, intruders=intruders)


def _layer(path: str, shape: tuple[int, ...], S: Tensor, pair: Pair | None) -> LayerSpectrum:
    """One layer from the singular values (n, k) of its matrices."""
    energies = S.square().sum(0)
    values = tuple(energies[: significant(energies)].sqrt().tolist())
    index, module = module_of(path)
    rank, alpha, scale = (pair.rank, pair.alpha, pair.scale) if pair else (None, None, None)
    norm = float(energies.sum().sqrt())
    return LayerSpectrum(path, index, module, shape, rank, alpha, scale, norm, values, effective_ranks(S))


def _sorted(layers: list[LayerSpectrum]) -> list[LayerSpectrum]:
    """In the order of the blocks; what lies in none comes first."""
    return sorted(layers, key=lambda x: (-1 if x.layer is None else x.layer, _place(x.module), x.path))


def _place(module: str) -> int:
    """Where a module stands in a block, as most models have it; those of other names come last."""
    name = module.rpartition(".")[2]
    return ORDER.index(name) if name in ORDER else len(ORDER)


def module_of(path: str) -> tuple[int | None, str]:
    """(index of the block a layer lies in, or None; its path with a star for the index)."""
    index = layer_index(path, None)
    return index, path if index is None else path.replace(f".{index}.", ".*.", 1)


def by_module(items: Iterable[Item], path: Callable[[Item], str]) -> dict[str, list[Item]]:
    """Items by the module they are of, under the shortest name that no other module has; those of blocks come first."""
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(module_of(path(item))[1], []).append(item)
    groups = dict(sorted(groups.items(), key=lambda group: (".*." not in group[0], _place(group[0]))))
    forms = {module: (module.rpartition(".")[2], module.rpartition(".*.")[2], module) for module in groups}
    counts = [Counter(names) for names in zip(*forms.values(), strict=True)]
    return {next(n for n, count in zip(forms[m], counts, strict=True) if count[n] == 1): g for m, g in groups.items()}


def medians(layers: list[LayerSpectrum]) -> list[float]:
    """The median over layers of each singular value relative to its layer's largest; 0 where a layer has no more."""
    live = [x.values for x in layers if x.values]
    longest = max(map(len, live), default=0)
    shares = [sorted(v[i] / v[0] if i < len(v) else 0.0 for v in live) for i in range(longest)]
    return [column[len(column) // 2] for column in shares]
