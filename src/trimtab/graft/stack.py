"""A stack of layers built anew from ranges of itself (`layer_replication`): what is repeated shares its weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from trimtab.errors import ConfigError
from trimtab.graft.base import Base

KEY = "_trimtab_stack"
INDEX = "layer_idx"  # how transformers' modules call their place in the stack, where they keep their cache


@dataclass(eq=False)
class Stack:
    """A stack that was rebuilt.

    Attributes:
        path: of the list of layers.
        ranges: what it was built from.
        before: the list that was there, the layers' indices and the config's values.
    """

    path: str
    ranges: list[tuple[int, int]]
    before: tuple[nn.Module, list[tuple[Any, int]], dict[str, Any]]


def replicate(base: Base, config: Any) -> None:
    """Rebuild the model's layers as the config says: layers that are repeated are new modules on the same weights."""
    ranges = [(int(s), int(e)) for s, e in getattr(config, "layer_replication", None) or ()]
    model, known = base.model, stack_of(base.model)
    if not ranges or (known is not None and known.ranges == ranges):
        return
    if known is not None or base.parts:
        raise ConfigError("`layer_replication` rebuilds the model: an adapter that has it must be the model's first.")
    if getattr(config, "ensure_weight_tying", False):
        raise ConfigError("`layer_replication` gives repeated layers adapters of their own: not ensure_weight_tying.")
    path, layers = _layers(base)
    order = _order(ranges, len(layers))
    indices = [(m, m.layer_idx) for m in _indexed(layers)]
    fields: dict[str, Any] = {"num_hidden_layers": len(order)}
    if types := getattr(model.config, "layer_types", None):
        fields["layer_types"] = [types[i] for i in order]
    new = nn.ModuleList(_laid(layers, order)).train(layers.training)
    values = {name: getattr(model.config, name) for name in fields}
    model.__dict__[KEY] = Stack(path, ranges, (layers, indices, values))
    _put(model, path, new)
    _configure(model, fields)
    base.read()


def restore(model: Any) -> None:
    """Put the layers back that were there."""
    stack = model.__dict__.pop(KEY, None)
    if stack is not None:
        layers, indices, values = stack.before
        for module, index in indices:
            module.layer_idx = index
        _put(model, stack.path, layers.train(model.get_submodule(stack.path).training))
        _configure(model, values)


def part(model: Any) -> None:
    """Give every layer weights of its own: the model is one of that many layers from now on."""
    stack = model.__dict__.pop(KEY, None)
    seen: set[int] = set()
    for module in model.get_submodule(stack.path).modules() if stack is not None else ():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if id(tensor) in seen:
                    held[name] = copy.deepcopy(tensor)
                seen.add(id(tensor))


def stack_of(model: nn.Module) -> Stack | None:
    """What was rebuilt in a model."""
    return model.__dict__.get(KEY)


def _layers(base: Base) -> tuple[str, nn.ModuleList]:
    """The model's stack: its one list of as many layers as the config says."""
    count = getattr(getattr(base.model, "config", None), "num_hidden_layers", None)
    found = [(n, m) for n, m in base.modules.items() if isinstance(m, nn.ModuleList) and len(m) == count]
    if len(found) != 1:
        raise ConfigError(
            f"Could not locate the layers attribute in the model: `layer_replication` needs one list of {count} layers "
            f"(`num_hidden_layers` of its config), and there are {len(found)}."
        )
    return found[0]


def _order(ranges: Sequence[tuple[int, int]], count: int) -> list[int]:
    """The layers of all ranges, one after the other."""
    if wrong := [r for r in ranges if not 0 <= r[0] < r[1] <= count]:
        raise ConfigError(f"`layer_replication`: {wrong} are no ranges (start, end) of {count} layers.")
    return [i for start, end in ranges for i in range(start, end)]


def _laid(layers: nn.ModuleList, order: Sequence[int]) -> list[nn.Module]:
    """The layers in that order; one that comes again is a copy with the same tensors."""
    laid: list[nn.Module] = []
    for at, i in enumerate(order):
        tensors = [*layers[i].parameters(), *layers[i].buffers()]
        layer = layers[i] if i not in order[:at] else copy.deepcopy(layers[i], {id(t): t for t in tensors})
        for module in _indexed(layer):
            module.layer_idx = at
        laid.append(layer)
    return laid


def _indexed(root: nn.Module) -> list[Any]:
    """The modules that know their place."""
    return [m for m in root.modules() if isinstance(getattr(m, INDEX, None), int)]


def _put(model: nn.Module, path: str, layers: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent)._modules[name] = layers


def _configure(model: Any, fields: dict[str, Any]) -> None:
    for name, value in fields.items():
        setattr(model.config, name, value)
