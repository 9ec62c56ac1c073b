"""Loading an adapter's files into a model: read at one time, held against the model, and then taken as they are."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from trimtab.core.config import PeftConfig
from trimtab.core.io import reading
from trimtab.core.report import warn
from trimtab.errors import AdapterFileError, ConfigError, PeftError
from trimtab.files import experts, store
from trimtab.files.codec import PREFIX, Prompt, Slot, aligned, copies_held, fill, fit
from trimtab.files.conversion import Names
from trimtab.files.soundness import unsound
from trimtab.graft.adapters import Adapter, complete, relay
from trimtab.graft.graft import Graft, find_graft
from trimtab.shell import mixtures
from trimtab.shell.training import Training

SETTINGS = "runtime_config"  # of one run: the call's, whatever the config holds
SIZE = re.compile(r"(^|_)(r|rank|dim|size|num|tokens|layers|heads)(_|$)")  # in the names of fields


class Source:
    """An adapter's files, read whole at one time; called with the adapter's slots, it gives what they are filled with.

    Args:
        model_id: the adapter's folder or Hub id.
        model: the base model.
        adapter: the name the adapter has there.
        hub: where on the Hub to look.
        config: used in place of the one in the folder; with `config=None` and no `overrides`, none is read.
        overrides: fields of the config in the folder to set otherwise.
        strict: raise when the file does not fit the adapter key for key.
        trainable: training goes on: what the method kept in training is read, too, where it was saved.

    Attributes:
        config: the adapter's config, its names brought up to date where the file shows what they meant.
        result: as `torch.nn.Module.load_state_dict` has it: `missing_keys` (in the model's naming), `unexpected_keys`.
    """

    def __init__(
        self,
        model_id: str | os.PathLike[str],
        model: nn.Module,
        adapter: str,
        hub: Mapping[str, Any],
        config: PeftConfig | None = None,
        overrides: Mapping[str, Any] | None = None,
        device: str | None = None,
        key_mapping: Mapping[str, str] | None = None,
        strict: bool = True,
        ignore_mismatched: bool = False,
        trainable: bool = False,
    ) -> None:
        self.model_id, self.adapter, self.strict, self.ignore_mismatched = model_id, adapter, strict, ignore_mismatched
        self.result: Any = None
        self.trainable = trainable
        if (graft := find_graft(model)) is not None:
            graft.look()
        self.names = Names(model, dict(model.named_modules()) if graft is None else graft.base.modules)
        with reading(model_id, hub.get("subfolder")):
            if config is None and overrides is not None:
                config = PeftConfig.from_pretrained(model_id, **hub, **overrides)
            tensors = store.load_peft_weights(model_id, device, key_mapping=key_mapping, **hub)
            if config is not None:
                mixtures.prepare(model_id, config, tensors, overrides or {})
            kept = store.load_state(model_id, **hub) if trainable else None
        with self.blamed():
            self.tensors, self.config = experts.fuse(tensors, self.names), config
            self.training = Training(kept, config) if kept is not None and config is not None else None
        if config is not None:
            self._check_sizes(config)
            experts.note_held(config, self.tensors, self.names)
            if getattr(config, "modules_to_save", None):
                config.modules_to_save = copies_held(config.modules_to_save, model, self.tensors)  # type: ignore[attr-defined]

    def _check_sizes(self, config: PeftConfig) -> None:
        """Raise for sizes in the config beyond all that is in the file, before tensors of such a size are made."""
        largest = max((size for tensor in self.tensors.values() for size in tensor.shape), default=1)
        for f in dataclasses.fields(config):
            value = getattr(config, f.name)
            if SIZE.search(f.name) and isinstance(value, int) and value > 1000 * max(largest, 1):
                raise AdapterFileError(
                    f"The adapter in '{self.model_id}' is damaged: its config has `{f.name}={value}`, "
                    f"and its tensors have no more than {largest} rows or columns."
                )

    def __call__(self, slots: list[Slot]) -> dict[str, Tensor]:
        """Check the tensors against the adapter's slots; those that fit, by their keys on disk."""
        from torch.nn.modules.module import _IncompatibleKeys

        parts = [s.holder.method.unfinished for s in slots if isinstance(s.holder, Prompt)] if self.trainable else []
        if any(parts):
            raise AdapterFileError(f"The file holds the finished prompt, not {parts[0]}.")
        tensors = aligned(slots, self.tensors, self.adapter, PREFIX, self.names.today)
        found = fit(slots, tensors)
        if self.strict or (found.mismatched and not self.ignore_mismatched):
            found.raise_for_faults(f"'{self.model_id}'", self.ignore_mismatched)
        if wrong := unsound(slots, tensors):
            said = f"NaN, infinite or huge numbers are in {wrong[:5]}{' and more' if len(wrong) > 5 else ''}"
            if self.strict:
                raise AdapterFileError(f"The adapter in '{self.model_id}' is damaged: {said}. strict=False loads it.")
            warn(f"{said} of the adapter in '{self.model_id}'.")
        if found.missing:
            warn(f"Found missing adapter keys while loading the checkpoint: {found.missing}.")
        if found.unexpected:
            warn(f"Found unexpected keys while loading the checkpoint; they are left out: {found.unexpected}.")
        misfits = {key: None for key, _, _ in found.mismatched}
        lost = [*found.missing, *misfits]
        memory = {slot.on_disk(): slot.in_memory() for slot in slots} if lost else {}
        self.result = _IncompatibleKeys([memory[key] for key in lost], found.unexpected)
        return {key: tensor for key, tensor in tensors.items() if key not in misfits}

    def refill(self, graft: Graft) -> None:
        """Give an adapter that is there already the values of the file."""
        adapter = graft.require(self.adapter)
        slots = [*graft.slots(adapter), *graft.embeddings(adapter, reading=True)]
        with self.blamed():
            values = self(slots)
        if self.config is not None:
            adopt(adapter, self.config)
        fill(slots, values, checked=True)
        complete(adapter)
        self.resume(graft)

    def resume(self, graft: Graft) -> None:
        """Go on training where the adapter was saved, if its method keeps more in training than its file has."""
        if self.training is not None:
            adapter = graft.require(self.adapter)
            self.training.resume(adapter, graft.slots(adapter), self.tensors)

    @contextlib.contextmanager
    def blamed(self) -> Iterator[None]:
        """Name the adapter's folder in what goes wrong inside the block."""
        try:
            yield
        except (PeftError, NotImplementedError) as error:
            if str(self.model_id) in str(error):
                raise
            raise type(error)(f"The adapter in '{self.model_id}' cannot be loaded: {error}") from error
        except Exception as error:  # what no check foresaw in a damaged file; the cause is kept
            raise AdapterFileError(
                f"The adapter in '{self.model_id}' cannot be loaded: {type(error).__name__}: {error}"
            ) from error


def keep(graft: Graft, adapter: Adapter, config: Any) -> None:
    """Make the caller's config object the adapter's own."""
    old = adapter.config
    config.__dict__.update(old.__dict__)
    adapter.config = config
    graft.configs[adapter.name] = config
    if adapter.prompt is not None:
        adapter.prompt.options = config
    for layer in adapter.layers:
        for method in layer.methods[adapter.name]:
            if method.options is old:
                method.options = config


def adopt(adapter: Adapter, config: Any) -> None:
    """Read an adapter's tensors by another config of its method from now on: its scales, and what else it says.

    Raises:
        ConfigError: the config is another method's.
    """
    own = adapter.config
    if config.peft_type != own.peft_type:
        raise ConfigError(
            f"The file has an adapter of method {config.peft_type.value}, and '{adapter.name}' is one of "
            f"{own.peft_type.value}: load it under another name."
        )
    here = ("inference_mode", "base_model_name_or_path", "target_modules", "init_lora_weights", "modules_to_save")
    kept = {name: own.__dict__[name] for name in here if name in own.__dict__}
    if {**config.__dict__, **kept} == own.__dict__ or not adapter.layout.places:
        return
    own.__dict__.update({**config.copy().__dict__, **kept})
    own.__dict__.pop("heads", None)
    methods: list[Any] = adapter.methods
    for method in methods:
        method.options = own.resolve(method.site.name)
        method.setup(method.options)
    relay(adapter, own.copy())


def settle(config: Any, ephemeral_gpu_offload: bool) -> None:
    """Put what a call that loads an adapter asks for into the settings of the run, which no file has."""
    if SETTINGS in config.runtime:
        settings = getattr(config, SETTINGS)
        setattr(config, SETTINGS, dataclasses.replace(settings, ephemeral_gpu_offload=ephemeral_gpu_offload))
    elif ephemeral_gpu_offload:
        warn("Ephemeral GPU offloading is not supported for this model. Ignoring.", UserWarning)
