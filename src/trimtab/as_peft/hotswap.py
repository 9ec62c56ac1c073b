"""Another LoRA's numbers in the place of a loaded one's: same adapter name, same modules, same parameter objects."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trimtab.core.config import PeftConfig, PeftType
from trimtab.core.io import split_hub_arguments
from trimtab.core.report import warn
from trimtab.errors import ConfigError
from trimtab.files.codec import Slot, aligned
from trimtab.files.conversion import Names
from trimtab.files.store import load_peft_weights
from trimtab.graft.adapters import Adapter
from trimtab.graft.graft import Graft, find_graft
from trimtab.layer.adapted import AdaptedLayer
from trimtab.shell.locate import locate_graft

CONFIG_KEYS_TO_CHECK = {PeftType.LORA: ["use_rslora", "lora_dropout", "alpha_pattern", "use_dora"]}

__all__ = [
    "CONFIG_KEYS_TO_CHECK",
    "check_hotswap_configs_compatible",
    "hotswap_adapter",
    "hotswap_adapter_from_state_dict",
    "prepare_model_for_compiled_hotswap",
]


def check_hotswap_configs_compatible(config0: PeftConfig, config1: PeftConfig) -> None:
    """Raise `ConfigError` unless an adapter of one config can take the numbers of one of the other."""
    if config0.peft_type != config1.peft_type:
        raise ConfigError(f"Incompatible PEFT types found: {_type(config0)} and {_type(config1)}")
    if config0.peft_type not in CONFIG_KEYS_TO_CHECK:
        raise ConfigError(f"Hotswapping only supports LORA but {_type(config0)} was passed.")
    for key in CONFIG_KEYS_TO_CHECK[PeftType.LORA]:
        ours, theirs = getattr(config0, key), getattr(config1, key)
        if ours != theirs:
            raise ConfigError(f"Configs are incompatible: for {key}, {ours} != {theirs}")


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | os.PathLike[str],
    adapter_name: str,
    torch_device: str | None = None,
    **kwargs: Any,
) -> None:
    """Give a loaded adapter the numbers, ranks and scales of the one in a folder or on the Hub.

    Raises:
        ConfigError: the two differ in more than ranks and scales.
        RuntimeError: the new one adapts layers that the old one does not.
    """
    hub, _ = split_hub_arguments(kwargs)
    adapter = locate_graft(model)[0].require(adapter_name)
    config = PeftConfig.from_pretrained(model_name_or_path, **hub)
    check_hotswap_configs_compatible(adapter.config, config)
    tensors = load_peft_weights(model_name_or_path, torch_device, **hub)
    hotswap_adapter_from_state_dict(model, tensors, adapter_name, config)


@torch.no_grad()
def hotswap_adapter_from_state_dict(
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
    """
    graft, prefix = locate_graft(model)
    adapter = graft.require(adapter_name)
    slots = [s for s in graft.slots(adapter) if s.method is not None and not s.optional]
    prefix = prefix if any(key.startswith("base_model.") for key in state_dict) else ""
    tensors = aligned(slots, state_dict, adapter_name, prefix, Names(graft.model, graft.base.modules).today)
    known = {slot.on_disk(prefix) for slot in slots}
    unexpected = [key for key in tensors if key not in known and parameter_prefix in key]
    if unexpected:
        raise RuntimeError(f"Hot swapping the adapter did not succeed, unexpected keys found: {', '.join(unexpected)}.")
    values = {id(s): s.unpacked(tensors[s.on_disk(prefix)]) for s in slots if s.on_disk(prefix) in tensors}
    compiled = _compiled(model)
    if misfits := [s.on_disk(prefix) for s in slots if id(s) in values and not _fits(s, values[id(s)], compiled)]:
        raise ValueError(
            f"The new adapter is larger than the model was compiled for: {', '.join(misfits)}. Call "
            "prepare_model_for_compiled_hotswap(model, target_rank=...) with the largest rank before compiling."
        )
    for slot in slots:
        _put(slot, values.get(id(slot)), compiled)
    _rescale(graft, adapter, config)


def _fits(slot: Slot, value: Tensor, compiled: bool) -> bool:
    own = slot.get()
    return value.ndim == own.ndim and (not compiled or _within(value, own))


def _within(value: Tensor, own: Tensor) -> bool:
    return all(n <= m for n, m in zip(value.shape, own.shape, strict=True))


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
    for place in adapter.layout.places:
        method = _method(place, adapter.name)
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
    _relay(adapter, adapter.config.copy())


def _method(place: Any, name: str) -> Any:
    """An adapter's own method at a place of its layout."""
    return next(m for m in place.layer.methods[name] if m.site is place.method.site)


def _shape(method: Any, leaf: str) -> tuple[int, ...]:
    """The shape of a tensor at the method's rank, whatever room it has."""
    axis, shape = _axis(leaf), tuple(method.tensor(leaf).shape)
    return tuple(method.r if i == axis else n for i, n in enumerate(shape))


def _axis(leaf: str) -> int | None:
    """Which axis of a tensor is the rank."""
    name, _, rest = leaf.partition(".")
    axes = {"lora_A": 0, "lora_embedding_A": 0, "lora_B": 1, "lora_embedding_B": 1}
    return None if rest == "bias" else axes.get(name)


def _relay(adapter: Adapter, config: Any) -> None:
    """Give an adapter a layout of its own, of the tensors that it has now."""
    places = []
    for place in adapter.layout.places:
        method = _method(place, adapter.name)
        leaves = {k: dataclasses.replace(x, shape=tuple(method.tensor(k).shape)) for k, x in place.leaves.items()}
        places.append(dataclasses.replace(place, method=method.twin("", method.options), leaves=leaves))
    adapter.layout = dataclasses.replace(adapter.layout, config=config, places=places)


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
    methods: list[Any] = [m for x in layers for ms in x.methods.values() for m in ms if hasattr(m, "r")]
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
            _relay(adapter, adapter.layout.config)
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
