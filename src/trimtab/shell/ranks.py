"""AdaLoRA's layers cut down to the triplets that a rank pattern keeps: smaller tensors, the same outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import ConfigError
from trimtab.files.codec import PREFIX
from trimtab.graft.adapters import relay
from trimtab.graft.graft import Graft

Pattern = Mapping[str, Sequence[bool] | Tensor]


def resize(graft: Graft, rank_pattern: Pattern, name: str) -> None:
    """Leave an adapter the triplets of a pattern; see `Tuner.resize_modules_by_rank_pattern`."""
    adapter = graft.require(name)
    graft.residents.bring([name])
    methods: dict[str, Any] = {m.key: m for m in adapter.methods if hasattr(m, "shrink")}
    pattern, faults = _read(rank_pattern, name), []
    for key, left in pattern.items():
        if key not in methods:
            faults.append(f"{key} is no tensor of adapter '{name}'")
        elif (r := len(methods[key].lora_E)) not in (len(left), sum(left)):
            faults.append(f"{key} has {r} triplets, the pattern {len(left)}")
    if faults:
        raise ConfigError(f"The rank pattern does not fit the model: {'; '.join(faults)}.")
    for key, left in pattern.items():
        if sum(left) < len(methods[key].lora_E):  # else it was cut before
            methods[key].shrink(left)
            methods[key].layer.changed()
    adapter.config.rank_pattern = {**(adapter.config.rank_pattern or {}), **pattern}
    adapter.undo = None  # the state before a step has tensors of the old sizes
    relay(adapter, adapter.config.copy())


def resize_state(rank_pattern: Pattern, state_dict: dict[str, Any], name: str) -> dict[str, Any]:
    """Cut a state dict in place; see `Tuner.resize_state_dict_by_rank_pattern`."""
    for key, left in _read(rank_pattern, name).items():
        keep = torch.tensor(left)
        for leaf in ("lora_A", "lora_B", "lora_E"):
            full = f"{PREFIX}{key.removesuffix('lora_E')}{leaf}.{name}"
            tensor = state_dict[full]
            axis = 1 if leaf == "lora_B" else 0
            if tensor.shape[axis] == len(left):  # else it was cut before
                state_dict[full] = tensor.index_select(axis, keep.nonzero()[:, 0].to(tensor.device))
    return state_dict


def _read(rank_pattern: Pattern, name: str) -> dict[str, list[bool]]:
    """{a layer's lora_E: which of its triplets stay}, whether or not the keys end with the adapter's name."""
    found: dict[str, list[bool]] = {}
    for key, value in rank_pattern.items():
        left = value.tolist() if isinstance(value, Tensor) else value
        if not isinstance(left, list | tuple) or not all(isinstance(each, bool) for each in left):
            raise TypeError(f"Unexpected type of the rank pattern at {key}: {left!r}, not a list of True and False.")
        found[key.removeprefix(PREFIX).removesuffix(f".{name}")] = list(left)
    return found
