"""Adapters of a model written to folders, with a model card, and to the Hub."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trimtab.files import card, store
from trimtab.files.codec import PREFIX, gathered
from trimtab.graft.graft import Graft
from trimtab.shell import training
from trimtab.shell.convert import subtract_start
from trimtab.shell.state import adapter_tensors


def save(
    model: Any,
    root: Path,
    safe: bool,
    selected: Sequence[str] | None,
    embeddings: str | bool,
    main: bool,
    start: str | None,
    state: Any,
    place: Callable[[Path, str], Path] = store.folder_of,
) -> None:
    """Write a PeftModel's adapters and the card, all files or none; see `PeftModel.save_pretrained`.

    Args:
        main: whether this process writes; the others only take part in gathering what is sharded.
        start: the folder of the adapter as it started, to be subtracted.
        state: the state dict that tensors are taken from in place of the model's.
        place: the folder of an adapter, from `root` and its name.
    """
    if root.is_file():
        raise ValueError(f"Provided path ({root}) should be a directory, not a file")
    names = list(model.peft_config) if selected is None else list(selected)
    if any(n not in model.peft_config for n in names):
        raise ValueError(
            f"You passed an invalid `selected_adapters` arguments, current supported adapter names are "
            f"{list(model.peft_config)} - got {names}."
        )
    files: dict[Path, Any] = {}
    for name in names if main or state != {} else ():  # others may be given an empty one
        tensors = gathered(adapter_tensors(model.graft, name, embeddings, state=state, prefix=PREFIX))
        kept = training.state(model.graft, name)
        if not main:
            continue
        if kept is not None:
            files[place(root, name) / store.STATE] = store.state_writer(*kept)
        config = saved_config(model.graft, name)
        if start is not None:
            tensors = subtract_start(model.graft, name, config, tensors, start)
        config.inference_mode = True
        mapping = None
        if config.task_type is None:
            base = model.get_base_model()
            mapping = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
        files |= store.writers(place(root, name), config, tensors, safe, mapping)
    if main:
        files |= card.writers(root, model.peft_config[names[0]] if names else None, _described(model))
        store.save(files)


def saved_config(graft: Graft, name: str) -> Any:
    """A copy of an adapter's config, with the ranks that its file has where its factors were padded to a larger one."""
    adapter = graft.require(name)
    config = adapter.config.copy()
    if any(m.padded for layer in adapter.layers for m in layer.methods[name]):
        config.r, config.rank_pattern = adapter.layout.config.r, dict(adapter.layout.config.rank_pattern)
    return config


def write_card(model: Any, root: Path) -> None:
    """Write the card, or bring the data of the one that is there up to date."""
    store.save(card.writers(root, model.active_peft_config, _described(model)))


def _described(model: Any) -> bool:
    """Whether the base model has a config, as transformers' models have."""
    return getattr(model.get_base_model(), "config", None) is not None
