"""An adapter's tensors out of a model and into it, under PEFT's names."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.report import warn
from trimtab.files.codec import PREFIX, aligned, fill, fit, from_state, sharded
from trimtab.files.conversion import Names
from trimtab.graft.adapters import Adapter, complete
from trimtab.graft.graft import Graft
from trimtab.graft.slots import targets_embeddings
from trimtab.shell.locate import locate_graft as locate_graft


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: str | bool = "auto",
) -> dict[str, Tensor]:
    """The tensors of an adapter by their keys on disk.

    Args:
        model: a PeftModel, its tuner, or a model with injected adapters (whose keys then have no prefix); compiled or
            wrapped for several processes or not.
        state_dict: take the tensors from this (gathered) state dict of `model` instead of the model itself.
        unwrap_compiled: accepted for PEFT's sake: a compiled model is always looked through.
        save_embedding_layers: whether the base's embeddings go along; "auto": when adapted or resized.
    """
    graft, prefix = locate_graft(model)
    return adapter_tensors(graft, adapter_name, save_embedding_layers, state=state_dict, prefix=prefix)


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> Any:
    """Fill an adapter from tensors by their keys on disk; reports what did not fit, and does not raise for it.

    Returns:
        A tuple with `missing_keys` and `unexpected_keys`, both in the model's own naming.

    Raises:
        RuntimeError: a tensor has the wrong shape, unless `ignore_mismatched_sizes`.
    """
    from torch.nn.modules.module import _IncompatibleKeys

    graft, prefix = locate_graft(model)
    graft.look()
    adapter = graft.require(adapter_name)
    slots = [*graft.slots(adapter), *graft.embeddings(adapter, reading=True)]
    names = Names(graft.model, graft.base.modules)
    tensors = aligned(slots, peft_model_state_dict, adapter_name, prefix, names.today)
    found = fit(slots, tensors, prefix)
    memory = {s.on_disk(prefix): s.in_memory(prefix) for s in slots}
    if found.mismatched and not ignore_mismatched_sizes:
        shapes = [
            f"size mismatch for {memory[key]}: {given} in the state dict, {wanted} in the model"
            for key, given, wanted in found.mismatched
        ]
        raise RuntimeError("Error(s) in loading the adapter's state dict:\n\t" + "\n\t".join(shapes))
    if found.mismatched:
        shapes = [f"{key}: {given} in the state dict, {wanted} in the model" for key, given, wanted in found.mismatched]
        warn(
            "Some weights of the adapter were not initialized from the model checkpoint and are being ignored because "
            f"you passed `ignore_mismatched_sizes=True`: {'; '.join(shapes)}."
        )
    fill(slots, tensors, prefix)
    complete(adapter)
    unfilled = [*found.missing, *(key for key, _, _ in found.mismatched)]
    return _IncompatibleKeys([memory[k] for k in unfilled], list(found.unexpected))


def get_base_model_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the base model by the keys it has without adapters."""
    return {key: tensor.detach() for key, tensor in _base_tensors(model).items()}


def set_base_model_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor], strict: bool = True) -> Any:
    """Fill the base model from tensors by the keys it has without adapters, which stay as they are.

    Returns:
        A tuple with `missing_keys` and `unexpected_keys`.

    Raises:
        RuntimeError: keys are missing or unexpected, unless `strict=False`.
    """
    from torch.nn.modules.module import _IncompatibleKeys

    own = _base_tensors(model)
    missing, unexpected = [k for k in own if k not in state_dict], [k for k in state_dict if k not in own]
    if strict and (missing or unexpected):
        raise RuntimeError(
            f"The state dict does not fit the base model: missing keys {missing}, unexpected keys {unexpected}."
        )
    with torch.no_grad():
        for key, tensor in own.items():
            if key in state_dict:
                tensor.copy_(sharded(state_dict[key], tensor))
    return _IncompatibleKeys(missing, unexpected)


def _base_tensors(model: nn.Module) -> dict[str, Tensor]:
    graft = locate_graft(model)[0]
    graft.look()
    adapters = graft.adapters.values()
    added = {slot.memory for adapter in adapters for slot in graft.slots(adapter)}
    tensors = {
        re.sub(r"(^|\.)(base_layer|original_module)(?=\.)", "", key): tensor
        for key, tensor in graft.model.state_dict(keep_vars=True).items()
        if key not in added
    }
    for layer in graft.layers.values():  # as they were before a merge, or a start that changed them
        for param in (*layer.originals.held, *layer.originals.pristine):
            if (key := f"{layer.path}.{param}") in tensors:
                tensors[key] = layer.originals.untouched()[param]
    for adapter in adapters:
        for path, bias in adapter.biases.pristine.items() if adapter.biases else ():
            tensors[f"{path}.bias"] = bias
    return tensors


def adapter_tensors(
    graft: Graft, name: str, embeddings: str | bool, state: Mapping[str, Tensor] | None, prefix: str = PREFIX
) -> dict[str, Tensor]:
    """{key on disk: tensor} of an adapter, with the base's embeddings where they must go along."""
    graft.look()
    adapter = graft.require(name)
    live = set(map(id, graft.base.parts))
    if lost := [part.name for part in (*adapter.layers, *adapter.saved) if id(part) not in live]:
        warn(f"What adapter '{name}' has at modules that are not in the model any more is left out: {lost}.")
    parked = adapter.parked  # then no state dict has it
    slots = [s for s in graft.slots(adapter) if not s.optional]
    named, resized = targets_embeddings(graft.base, adapter), embeddings == "auto" and _resized(graft, adapter)
    if embeddings is True or (embeddings == "auto" and (named or resized)):
        if embeddings == "auto":
            resizing = "as the embedding layer has been resized during finetuning"
            why = "as embedding layers found in `target_modules`" if named else resizing
            if not resized:  # then the base model has it all the same
                why += (
                    ": the base's embedding goes into the adapter's file. "
                    "Pass `save_embedding_layers=False` to leave it out"
                )
            warn(f"Setting `save_embedding_layers` to `True` {why}.", UserWarning)
        taken = {s.disk for s in slots}
        some = embeddings == "auto" and not resized  # then just the adapted ones
        along = (s for s in graft.embeddings(adapter) if not some or s.disk.endswith(".base_layer.weight"))
        slots += [s for s in along if s.disk not in taken]
    return from_state(slots, None if parked else state, name, graft.model, prefix)


def _resized(graft: Graft, adapter: Adapter) -> bool:
    now = getattr(getattr(graft.model, "config", None), "vocab_size", None)
    then = original_vocabulary(adapter.config.base_model_name_or_path)
    return then is not None and now is not None and then != now


def original_vocabulary(source: str | None) -> int | None:
    """The base model's vocabulary size, from its folder or the Hub's cache; the network is never asked."""
    if not source:
        return None
    path: Any = Path(source) / "config.json"
    if not path.is_file():
        from huggingface_hub import try_to_load_from_cache

        try:
            path = try_to_load_from_cache(source, "config.json")
        except ValueError:  # not the form of a Hub id
            return None
    if not isinstance(path, str | Path) or not Path(path).is_file():
        return None
    size = json.loads(Path(path).read_text(encoding="utf-8")).get("vocab_size")
    return size if isinstance(size, int) else None
