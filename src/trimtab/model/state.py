"""An adapter's tensors out of a model and into it, under PEFT's names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from trimtab.files.codec import PREFIX, fill, fit
from trimtab.model.graft import Adapter, Graft, find_graft
from trimtab.core.report import warn


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: str | bool = "auto",
) -> dict[str, Tensor]:
    """The tensors of an adapter by their keys on disk.

    Args:
        model: a PeftModel, its tuner, or a model with injected adapters (whose keys then have no prefix).
        state_dict: take the tensors from this (gathered) state dict of `model` instead of the model itself.
        save_embedding_layers: whether the base's embeddings go along; "auto": when adapted or resized.
    """
    if unwrap_compiled:
        model = getattr(model, "_orig_mod", model)
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
    adapter = graft.require(adapter_name)
    slots = [*graft.slots(adapter), *graft.embeddings(adapter)]
    found = fit(slots, peft_model_state_dict, prefix)
    if found.mismatched and not ignore_mismatched_sizes:
        shapes = [f"size mismatch for {k}: {f} in the state dict, {w} in the model" for k, f, w in found.mismatched]
        raise RuntimeError("Error(s) in loading the adapter's state dict:\n\t" + "\n\t".join(shapes))
    if found.mismatched:
        warn(f"Some weights have the wrong shape and were left out: {[k for k, _, _ in found.mismatched]}.")
    fill(slots, peft_model_state_dict, prefix)
    memory = {s.on_disk(prefix): s.in_memory(prefix) for s in slots}
    return _IncompatibleKeys([memory[k] for k in found.missing], list(found.unexpected))


def adapter_tensors(
    graft: Graft, name: str, embeddings: str | bool, state: Mapping[str, Tensor] | None, prefix: str = PREFIX
) -> dict[str, Tensor]:
    """{key on disk: tensor} of an adapter, with the base's embeddings where they must go along."""
    adapter = graft.require(name)
    slots = [s for s in graft.slots(adapter) if not s.optional]
    if embeddings is True or (embeddings == "auto" and _embeddings_changed(graft, adapter)):
        taken = {s.disk for s in slots}
        some = graft.targets_embeddings(adapter)  # then just the adapted ones; else, resized or on demand, all
        slots += [
            s for s in graft.embeddings(adapter)
            if s.disk not in taken and (not some or s.disk.endswith(".base_layer.weight"))
        ]  # fmt: skip
    if state is not None:
        found = {s.on_disk(prefix): s.get() for s in slots if s.bare}
        held = [(s, s.in_memory(prefix)) for s in slots if s.in_memory(prefix) in state]
        return found | {s.on_disk(prefix): s.packed(state[key]) for s, key in held}
    return {s.on_disk(prefix): s.packed(s.get()) for s in slots}


def _embeddings_changed(graft: Graft, adapter: Adapter) -> bool:
    if graft.targets_embeddings(adapter):
        warn("Setting `save_embedding_layers` to `True` as embedding layers found in `target_modules`: the base's "
             "embedding goes into the adapter's file. Pass `save_embedding_layers=False` to leave it out.", UserWarning)
        return True
    now = getattr(getattr(graft.model, "config", None), "vocab_size", None)
    then = original_vocabulary(adapter.config.base_model_name_or_path)
    if then is not None and now is not None and then != now:
        warn("Setting `save_embedding_layers` to `True` as the embedding layer has been resized during finetuning.", UserWarning)
        return True
    return False


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


def locate_graft(model: nn.Module) -> tuple[Graft, str]:
    """The graft of a PeftModel, its tuner or its base model, and the prefix that the keys of that object have."""
    prefix, module = "", model
    for attribute in ("base_model", "model"):
        graft = find_graft(module)
        if graft is not None:
            return graft, prefix
        child = module._modules.get(attribute)
        if child is not None:
            prefix, module = f"{prefix}{attribute}.", child
    graft = find_graft(module)
    if graft is None:
        raise TypeError(f"No adapters found in {type(model).__name__}: is it a PeftModel or a model that has adapters?")
    return graft, prefix
