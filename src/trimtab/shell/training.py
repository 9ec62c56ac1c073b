"""The state of training beside an adapter's file, of methods that act on steps (AdaLoRA): what they keep, and when."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.core.config import PeftConfig
from trimtab.core.report import warn
from trimtab.errors import PeftError
from trimtab.files.codec import Slot, gathered
from trimtab.graft import steps
from trimtab.graft.adapters import Adapter
from trimtab.graft.graft import Graft
from trimtab.graft.staging import OWN_FIELDS


def state(graft: Graft, name: str) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """(all tensors of an adapter in the shapes they have in training, facts), or None where its file has everything."""
    adapter = graft.require(name)
    method: Any = adapter.method
    if not adapter.t or not steps.acts(method) or adapter.prompt is not None:
        return None
    slots = [s for s in graft.slots(adapter) if s.method is not None]
    if not any(s.state for s in slots):
        return None
    tensors = gathered({s.on_disk(): s.get() for s in slots})
    return tensors, {"step": str(adapter.t), "config": json.dumps(adapter.layout.config.to_json())}


def reached(graft: Graft) -> dict[str, dict[str, Any]]:
    """How far adapters that act on steps are: {adapter: {"step": ..., "config": the fields that training changes}}."""
    return {
        name: {"step": a.t, "config": {k: v for k, v in a.config.to_json().items() if k.endswith("_pattern")}}
        for name, a in graft.adapters.items()
        if a.t and steps.acts(a.method)
    }


def go_on(graft: Graft, progress: Mapping[str, Mapping[str, Any]]) -> None:
    """Take adapters to where `reached` saw them; their tensors are put back by others."""
    for name, kept in progress.items():
        adapter = graft.require(name)
        adapter.config.__dict__.update(kept["config"])
        adapter.t, adapter.told = kept["step"], False


class Training:
    """What was kept of an adapter in training.

    Args:
        kept: its tensors and facts.
        config: the config in the folder; it is set to what the adapter was built with, so that the tensors fit.
    """

    def __init__(self, kept: tuple[dict[str, Tensor], dict[str, str]], config: Any) -> None:
        self.tensors, facts = kept
        self.step = 0
        self.now: dict[str, Any] = {}  # fields that training has changed
        try:
            built = PeftConfig.from_dict(json.loads(facts["config"]))
            self.step = int(facts["step"])
        except (KeyError, ValueError, TypeError, PeftError):
            return  # another program's
        for field in config.to_dict().keys() - set(OWN_FIELDS):
            then, now = getattr(built, field, None), getattr(config, field)
            if field.endswith("_pattern") and then != now:
                self.now[field] = now
                setattr(config, field, then)

    @torch.no_grad()
    def resume(self, adapter: Adapter, slots: Sequence[Slot], file: Mapping[str, Tensor]) -> None:
        """Give the adapter the state it was saved in; says so where state and file are of different saves."""
        own = [slot for slot in slots if slot.method is not None]
        held: list[Any] = [self.tensors.get(slot.on_disk()) for slot in own]
        before = dict(adapter.config.__dict__)
        fits = self.step > 0 and all(h is not None and h.shape == s.get().shape for h, s in zip(held, own, strict=True))
        if fits:
            adapter.config.__dict__.update(self.now)
            fits = all(_same(s.packed(h), file[s.on_disk()]) for h, s in zip(held, own) if s.on_disk() in file)
        if not fits:
            adapter.config.__dict__.update(before)
            warn("The state of training beside the adapter is not of the same save: training starts without it.")
            return
        for slot, value in zip(own, held, strict=True):
            tensor = slot.get()
            tensor.copy_(value.to(tensor))
        adapter.t, adapter.told = self.step, False  # whoever tells it of the next step


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.to(b), b)
