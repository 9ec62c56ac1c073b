"""Another LoRA's numbers in the place of a loaded one's: same adapter name, same modules, same parameter objects."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from trimtab.core.config import PeftConfig, PeftType
from trimtab.core.io import split_hub_arguments
from trimtab.core.report import warn
from trimtab.errors import AdapterFileError, ConfigError
from trimtab.files.codec import PREFIX, Slot, aligned
from trimtab.files.conversion import Names
from trimtab.files.soundness import unsound
from trimtab.graft.adapters import Adapter, relay
from trimtab.graft.graft import Graft, find_graft
from trimtab.layer.adapted import AdaptedLayer
from trimtab.methods import PLAIN
from trimtab.shell.loading import Source
from trimtab.shell.locate import locate_graft

CONFIG_KEYS_TO_CHECK = {PeftType(PLAIN): ["use_rslora", "lora_dropout", "alpha_pattern", "use_dora"]}

SPARE = "hotswap_spare"  # holds the new adapter while the old one's place is made

__all__ = ["CONFIG_KEYS_TO_CHECK", "check_configs", "hotswap_adapter", "prepare_model_for_compiled_hotswap", "swap"]


def check_configs(config0: PeftConfig, config1: PeftConfig) -> None:
    """Raise `ConfigError` unless an adapter of one config can take the numbers of one of the other."""
    _check_types(config0, config1)
    for key in CONFIG_KEYS_TO_CHECK[PeftType(PLAIN)]:
        ours, theirs = getattr(config0, key), getattr(config1, key)
        if ours != theirs:
            raise ConfigError(f"Configs are incompatible: for {key}, {ours} != {theirs}")


def _check_types(config0: Any, config1: Any) -> None:
    if config0.peft_type != config1.peft_type:
        raise ConfigError(f"Incompatible PEFT types found: {_type(config0)} and {_type(config1)}")
    if config0.peft_type not in CONFIG_KEYS_TO_CHECK:
        raise ConfigError(f"Hotswapping only supports LORA but {_type(config0)} was passed.")


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | os.PathLike[str],
    adapter_name: str,
    torch_device: str | None = None,
    **kwargs: Any,
) -> None:
    """Put the LoRA of a folder or of the Hub in the place of a loaded one, active and trained as it was.

    Where it has the layers that are there, or fewer, the parameters stay the same objects, whatever its rank; a model
    that is compiled is compiled once more for a rank larger than `prepare_model_for_compiled_hotswap` made room for. At
    other layers, or with other settings (DoRA, dropout), it is loaded anew, and its parameters are new ones.

    Args:
        torch_device: where the file is read to.
        kwargs: where on the Hub to look (`revision`, `subfolder` ...).

    Raises:
        AdapterNameError: there is no adapter of that name.
        ConfigError: one of the two is no LoRA.
        AdapterFileError: files that are missing, damaged, or do not fit; nothing has changed then.
        ValueError: the adapter is merged.
    """
    hub, _ = split_hub_arguments(kwargs)
    graft, _ = locate_graft(model)
    adapter = graft.require(adapter_name)
    if adapter_name in graft.merged:
        raise ValueError(f"'{adapter_name}' is merged: call unmerge_adapter() before another takes its place.")
    source = Source(model_name_or_path, graft.model, adapter_name, hub, overrides={}, device=torch_device)
    _check_types(adapter.config, source.config)
    found = _match(graft, adapter, source.tensors, PREFIX)
    whole = not found.unexpected and not any(s.method is None for s in graft.slots(adapter))
    if not whole or not _same_formula(adapter.config, source.config):
        _replace(graft, adapter, source)
        return
    if wrong := unsound(found.slots, found.tensors):
        raise AdapterFileError(f"The adapter in '{model_name_or_path}' is damaged: {wrong[:5]} hold no sound numbers.")
    with source.blamed(), torch.no_grad():
        _take(graft, adapter, found, source.config, _compiled(model))


def _same_formula(config0: Any, config1: Any) -> bool:
    return all(getattr(config0, key) == getattr(config1, key) for key in CONFIG_KEYS_TO_CHECK[PeftType(PLAIN)])


def _replace(graft: Graft, adapter: Adapter, source: Source) -> None:
    """Load an adapter in the place of another; what is wrong with it is found before anything is taken out."""
    name, trainable, active = adapter.name, adapter.trainable, graft.board.route.active
    source.adapter = SPARE
    with source.blamed():
        graft.add(SPARE, source.config, tensors=source, trainable=False)
    try:
        graft.set_active([SPARE], trainable=None)
        graft.delete(name)
        source.adapter = name
        graft.add(name, source.config, tensors=source, trainable=trainable)
    finally:
        graft.set_active([n for n in active if n in graft.adapters] or [SPARE], trainable=None)
        graft.delete(SPARE)


class _Match(NamedTuple):
    """A state dict beside the adapter that takes it."""

    slots: list[Slot]
    tensors: dict[str, Tensor]  # by their keys on disk
    values: dict[int, Tensor]  # of slots, by identity
    unexpected: list[str]


def _match(graft: Graft, adapter: Adapter, state_dict: Mapping[str, Tensor], prefix: str) -> _Match:
    slots = [s for s in graft.slots(adapter) if s.method is not None and not s.optional]
    prefix = prefix if any(key.startswith("base_model.") for key in state_dict) else ""
    tensors = aligned(slots, state_dict, adapter.name, prefix, Names(graft.model, graft.base.modules).today)
    known = {slot.on_disk(prefix): slot for slot in slots}
    values = {id(slot): slot.unpacked(tensors[key]) for key, slot in known.items() if key in tensors}
    return _Match(slots, tensors, values, [key for key in tensors if key not in known])


@torch.no_grad()
def swap(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    adapter_name: str,
    config: Any,
    parameter_prefix: str = "lora_",
) -> None:
    """Give an adapter the tensors of a state dict, in place; layers that it leaves out are left without effect.

    Args:
        config: of the new adapter: its ranks and scales.
        parameter_prefix: what the names of the method's tensors start with; others stay as they are.

    Raises:
        RuntimeError: the new one adapts layers that the old one does not.
        ValueError: the new one is larger than the model was compiled for.
    """
    graft, prefix = locate_graft(model)
    adapter = graft.require(adapter_name)
    found = _match(graft, adapter, state_dict, prefix)
    if unexpected := [key for key in found.unexpected if parameter_prefix in key]:
        raise RuntimeError(f"Hot swapping the adapter did not succeed, unexpected keys found: {', '.join(unexpected)}.")
    compiled = _compiled(model)
    large = [s for s in found.slots if id(s) in found.values and not _within(found.values[id(s)], s.get())]
    if compiled and large:
        raise ValueError(
            f"The new adapter is larger than the model was compiled for: {', '.join(s.on_disk() for s in large)}. Call "
            "prepare_model_for_compiled_hotswap(model, target_rank=...) with the largest rank before compiling."
        )
    _take(graft, adapter, found, config, compiled)


def _take(graft: Graft, adapter: Adapter, found: _Match, config: Any, compiled: bool) -> None:
    """Write what was found into the adapter's parameters."""
    pairs = [(s, found.values[id(s)].shape, s.get().shape) for s in found.slots if id(s) in found.values]
    if wrong := [f"{s.on_disk()} {tuple(new)}, not {tuple(own)}" for s, new, own in pairs if not _alike(s, new, own)]:
        raise AdapterFileError(f"The new adapter does not fit the model's layers: {'; '.join(wrong)}.")
    for slot in found.slots:
        _put(slot, found.values.get(id(slot)), compiled)
    _rescale(graft, adapter, config)


def _alike(slot: Slot, new: Sequence[int], own: Sequence[int]) -> bool:
    """Whether two shapes differ in nothing but the rank."""
    return len(new) == len(own) and all(new[i] == n for i, n in enumerate(own) if i != _axis(slot.leaf))


def _within(value: Tensor, own: Tensor) -> bool:
    return value.ndim == own.ndim and all(n <= m for n, m in zip(value.shape, own.shape, strict=True))


def _put(slot: Slot, value: Tensor | None, compiled: bool) -> None:
    """Write a value into a parameter that stays the same object; nothing, where there is none."""
    own = slot.get()
    if value is None:
        if slot.leaf.startswith(("lora_B", "lora_embedding_B")):
            own.zero_()
        return
    if value.shape == own.shape:
        own.copy_(value)
    elif _within(value, own) and (compiled or slot.method.padded):
        own.zero_()[tuple(slice(n) for n in value.shape)].copy_(value)
    else:
        own.data, own.grad = value.to(own).clone(), None


def _rescale(graft: Graft, adapter: Adapter, config: Any) -> None:
    """Take the ranks and scales of a config, as tensors where the model was prepared for compiling."""
    methods: list[Any] = adapter.methods
    for method in methods:
        own = config.resolve(method.site.name)
        scale = own.scaling()
        method.r, method.lora_alpha, method.unit = own.r, own.lora_alpha, scale
        if isinstance(method.scaling, Tensor):
            method.scaling.fill_(scale)
        else:
            method.scaling = scale
        method.declared = {k: dataclasses.replace(leaf, shape=_shape(method, k)) for k, leaf in method.declared.items()}
    for field in ("r", "lora_alpha", "rank_pattern", "alpha_pattern"):
        setattr(adapter.config, field, getattr(config, field))
    relay(adapter, adapter.config.copy())


def _shape(method: Any, leaf: str) -> tuple[int, ...]:
    """The shape of a tensor at the method's rank, whatever room it has."""
    axis, shape = _axis(leaf), tuple(method.tensor(leaf).shape)
    return tuple(method.r if i == axis else n for i, n in enumerate(shape))


def _axis(leaf: str) -> int | None:
    """Which axis of a tensor is the rank."""
    name, _, rest = leaf.partition(".")
    axes = {"lora_A": 0, "lora_embedding_A": 0, "lora_B": 1, "lora_embedding_B": 1}
    return None if rest == "bias" else axes.get(name)


@torch.no_grad()
def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: Any = None,
    check_compiled: Literal["error", "warn", "ignore"] = "error",
) -> None:
    """Pad LoRA factors to a rank and hold scales in tensors, so that hot-swapping needs no recompiling.

    Args:
        target_rank: the largest rank of the adapters to come; None: ranks stay.
        config: a config, or {adapter: config}, whose rank is set to `target_rank`.
        check_compiled: what to do where the model is compiled already.
    """
    if check_compiled not in ("error", "warn", "ignore"):
        raise ValueError(
            f"check_compiles should be one of 'error', 'warn', or 'ignore', got '{check_compiled}' instead."
        )
    if _compiled(model) and check_compiled != "ignore":
        message = "Call prepare_model_for_compiled_hotswap *before* compiling the model"
        if check_compiled == "error":
            raise ValueError(message)
        warn(message)
    layers = [m for m in model.modules() if isinstance(m, AdaptedLayer)]
    if not layers:
        raise ValueError(
            "No adapter layers found on the model, make sure call `prepare_model_for_compiled_hotswap` after loading "
            "the first adapter and before loading the second adapter."
        )
    methods: list[Any] = [m for x in layers for ms in x.methods.values() for m in ms if "r" in m.__dict__]
    if target_rank is not None and (large := max((m.r for m in methods), default=0)) > target_rank:
        raise ValueError(
            f"Trying to pad the adapter to the target rank {target_rank}, but the original rank is larger ({large}). "
            "This is not possible."
        )
    for method in methods:
        method.scaling = torch.tensor(float(method.scaling), device=method.site.device)
        if target_rank is not None:
            _pad(method, target_rank)
        method.layer.changed()
    graft = next((g for m in model.modules() if (g := find_graft(m)) is not None), None)
    for adapter in graft.adapters.values() if graft is not None else ():
        if not adapter.parked and adapter.layers:
            relay(adapter, adapter.layout.config)
    for one in config.values() if isinstance(config, dict) else [config] if config is not None else []:
        if target_rank is not None:
            one.r = target_rank
            one.rank_pattern = dict.fromkeys(one.rank_pattern, target_rank)


def _pad(method: Any, rank: int) -> None:
    method.padded = True
    for leaf in method.declared:
        if (axis := _axis(leaf)) is None:
            continue
        tensor = method.tensor(leaf)
        shape = [rank if i == axis else n for i, n in enumerate(tensor.shape)]
        padded = tensor.new_zeros(shape)
        padded[tuple(slice(n) for n in tensor.shape)] = tensor
        tensor.data = padded


def _compiled(model: nn.Module) -> bool:
    return hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None


def _type(config: Any) -> str:
    return str(config.peft_type.value)
