"""What a model knows of one adapter: its config, what it has where, and its numbers while it is not in use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.method import Leaf, Method
from trimtab.core.model_method import ModelMethod
from trimtab.core.targets import Target
from trimtab.layer.adapted import AdaptedLayer
from trimtab.layer.biases import TrainedBiases
from trimtab.layer.copies import SavedModule
from trimtab.layer.leaves import Leaves

Kind = tuple[torch.dtype, torch.device]
Numbers = dict[Kind, Tensor | list[Tensor]]  # in one piece; a list where some were moved elsewhere than others


@dataclass(eq=False)
class Place:
    """One method of an adapter at one layer.

    Attributes:
        method: the formula at its site, without an adapter's tensors: adapters get twins of it.
        leaves: the tensors it has there; none where another layer keeps them.
        home: the place that keeps them.
        follows: its config is the adapter's own object, not one resolved for the site.
        borrowed: leaves whose tensors are those of another place: that place.
    """

    layer: AdaptedLayer
    method: Method
    leaves: dict[str, Leaf]
    kind: Kind
    home: int
    follows: bool
    borrowed: dict[str, int] = field(default_factory=dict)


@dataclass(eq=False)
class Layout:
    """Where adapters of one config have which tensors: shared by all of them.

    Attributes:
        config: complete, as it is saved.
        shared: the tensors that an adapter keeps once, and their format.
        foreign: the paths of the targets at which a user's class makes the layer.
        stores: where its adapters are registered, by their names, once one was parked.
    """

    config: Any
    targets: list[Target]
    places: list[Place] = field(default_factory=list)
    shared: dict[str, Leaf] = field(default_factory=dict)
    shared_kind: Kind = (torch.float32, torch.device("cpu"))
    foreign: list[str] = field(default_factory=list)
    stores: list[dict[str, Any]] = field(default_factory=list, init=False)

    @property
    def layers(self) -> list[AdaptedLayer]:
        """The layers it is at, each once."""
        return list(dict.fromkeys(place.layer for place in self.places))

    def spans(self) -> Iterator[tuple[int, str, Leaf, Kind]]:
        """Every tensor: (its place, or -1 for what an adapter keeps once; leaf; declaration; format)."""
        for i, place in enumerate(self.places):
            for name, leaf in place.leaves.items():
                yield i, name, leaf, (leaf.dtype or place.kind[0], place.kind[1])
        for name, leaf in self.shared.items():
            yield -1, name, leaf, (leaf.dtype or self.shared_kind[0], self.shared_kind[1])

    def buffers(self, device: torch.device | None = None) -> list[Tensor]:
        """New tensors for all spans. Each has memory of its own: what shares some is saved once by other libraries."""
        return [torch.empty(leaf.shape, dtype=k[0], device=device or k[1]) for _, _, leaf, k in self.spans()]

    def cut(self, numbers: Numbers) -> list[Tensor]:
        """The tensors of all spans out of an adapter's numbers, each in memory of its own."""
        at: dict[Kind, int] = dict.fromkeys(numbers, 0)
        tensors = []
        for _, _, leaf, kind in self.spans():
            flat, size = numbers[kind], _numel(leaf.shape)
            if isinstance(flat, list):
                tensors.append(flat[at[kind]])
                at[kind] += 1
                continue
            tensors.append(flat[at[kind] : at[kind] + size].view(leaf.shape).clone())
            at[kind] += size
        return tensors

    def packed(self, tensors: Sequence[Tensor]) -> Numbers:
        """The tensors of all spans in one piece for each format."""
        groups: dict[Kind, list[Tensor]] = {}
        for (_, _, _, kind), tensor in zip(self.spans(), tensors, strict=True):
            groups.setdefault(kind, []).append(tensor.detach())
        return {kind: _piece(group) for kind, group in groups.items()}


def _numel(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


def _piece(tensors: list[Tensor]) -> Tensor | list[Tensor]:
    first = tensors[0]
    if any(t.dtype != first.dtype or t.device != first.device for t in tensors):
        return tensors
    return torch.cat([t.reshape(-1) for t in tensors])


@dataclass(eq=False)
class Adapter:
    """What the model knows of one adapter.

    Attributes:
        aside: what it has in each of its layout's stores, while it is parked as it is.
        flat: its numbers, while it is parked as data.
        settings: what was set on its methods by hand, while it is data: (place, attribute) -> value.
        t: optimiser steps that its method was told of.
        told: hooks told it of a step.
        by_hand: the caller tells it of steps.
        foreign: the layers that a user's class made for it, by path.
        undo: its state before the first step that hooks told it of, until the next.
        trained: where its trained tensors at layers are registered, once that was asked; None while it is data.
    """

    name: str
    config: Any
    method: type[Method]
    layout: Layout
    prompt: ModelMethod | None = None
    saved: list[SavedModule] = field(default_factory=list)
    foreign: dict[str, Any] = field(default_factory=dict)
    biases: TrainedBiases | None = None
    trainable: bool = False
    aside: list[Any] | None = None
    flat: Numbers | None = None
    settings: dict[tuple[int, str], Any] = field(default_factory=dict)
    t: int = 0
    told: bool = False
    by_hand: bool = False
    undo: Any = None
    trained: list[tuple[dict[str, Any], str]] | None = None

    @property
    def parked(self) -> bool:
        """Whether its tensors are out of the module tree."""
        return self.aside is not None or self.flat is not None

    @property
    def layers(self) -> list[AdaptedLayer]:
        """The layers it adapts."""
        return self.layout.layers

    @property
    def targets(self) -> list[Target]:
        """What its config selected."""
        return self.layout.targets

    @property
    def parts(self) -> list[Any]:
        """All that the adapter has in the module tree of the base."""
        return [*self.layers, *self.beside]

    @property
    def beside(self) -> list[Any]:
        """What it has there beside the layers it adapts: copies, and layers that a user's class made."""
        return [*self.saved, *self.foreign.values()]

    @property
    def methods(self) -> list[Method]:
        """The adapter's own method at each of its sites; it must not be parked."""
        return [m for layer in self.layers for m in layer.methods[self.name] if isinstance(m, self.method)]

    @property
    def formulas(self) -> list[Any]:
        """What its method's class methods take: the methods at its sites, or the one of the model."""
        return self.methods if self.prompt is None else [self.prompt]


@torch.no_grad()
def install(
    adapter: Adapter,
    tensors: Sequence[Tensor],
    commons: Mapping[str, Leaves],
    kept: Mapping[int, Callable[[], Any]] = MappingProxyType({}),
) -> None:
    """Put an adapter's tensors and methods into the module tree.

    Args:
        kept: by place in the layout, what gives a parameter that the adapter had and that somebody may still hold.
    """
    layout, made = adapter.layout, []
    for place in layout.places:
        options = adapter.config if place.follows else place.method.options
        made.append(place.method.twin(adapter.name, options))
    held: list[dict[str, Tensor]] = [{} for _ in made]
    for n, ((i, name, leaf, _), tensor) in enumerate(zip(layout.spans(), tensors, strict=True)):
        value = again(own, tensor) if n in kept and (own := kept[n]()) is not None else stored(tensor, leaf)
        if i < 0:
            container, _, rest = name.partition(".")
            commons[container].put(adapter.name, rest, value)
        else:
            held[i][name] = value
    for place, method, own in zip(layout.places, made, held, strict=True):
        lent = {leaf: held[i][leaf] for leaf, i in place.borrowed.items()}
        place.layer.attach(adapter.name, method, own | lent)
        home = layout.places[place.home]
        method.home, method.commons = home.layer, commons
        if home is not place:
            method.places = made[place.home].places
    for (i, attribute), value in adapter.settings.items():
        setattr(made[i], attribute, value)


def again(own: nn.Parameter, tensor: Tensor) -> nn.Parameter:
    """A parameter that was parked, with the numbers it has now: whoever holds it may have changed it since."""
    if (own.dtype, own.device, own.shape) != (tensor.dtype, tensor.device, tensor.shape):  # the model was moved
        own.data = tensor
    own.requires_grad_(False)
    return own


def stored(tensor: Tensor, leaf: Leaf) -> Tensor:
    """A tensor as it is registered: what is trained, and frozen factors, are parameters; the rest are buffers."""
    if leaf.buffer or not tensor.is_floating_point():
        return tensor
    return nn.Parameter(tensor, requires_grad=False)


def common(commons: Mapping[str, Leaves], name: str, adapter: str) -> Tensor:
    """A tensor that an adapter keeps once; "v.0" is the tensor "0" of the adapter in the container "v"."""
    container, _, rest = name.partition(".")
    found = commons[container].find(adapter)
    tensor: Tensor = getattr(found, rest) if rest else found
    return tensor


def methods_of(adapter: Adapter) -> list[Method]:
    """An adapter's methods in the module tree, in the order of its layout's places."""
    seen: dict[AdaptedLayer, int] = {}
    methods = []
    for place in adapter.layout.places:
        at = seen.get(place.layer, 0)
        methods.append(place.layer.methods[adapter.name][at])
        seen[place.layer] = at + 1
    return methods


def require_gradients(adapter: Adapter, commons: Mapping[str, Leaves], wanted: bool) -> None:
    """Make all that an adapter trains require gradients, or not; it must be in the module tree."""
    if adapter.trained is None:
        kept = [m for x in adapter.layers for m in x.methods.get(adapter.name, ()) if m.home is x]
        adapter.trained = [method.place_of(leaf) for method in kept for leaf in method.trained]
    for holder, key in adapter.trained:
        if (tensor := holder.get(key)) is not None:  # others may have deleted the adapter at a layer
            tensor.requires_grad = wanted  # quicker than requires_grad_(), and there are hundreds
    for part in adapter.beside:
        part.set_requires_grad(adapter.name, wanted)
    for parameter in adapter.biases.trained() if adapter.biases else ():
        parameter.requires_grad_(wanted)
    if adapter.prompt is not None:
        for key, parameter in adapter.prompt.named_parameters():
            parameter.requires_grad_(wanted and key not in adapter.prompt.frozen)
    for key, leaf in adapter.layout.shared.items():
        tensor = common(commons, key, adapter.name)
        if leaf.train and isinstance(tensor, nn.Parameter):
            tensor.requires_grad_(wanted)


@torch.no_grad()
def complete(adapter: Adapter) -> None:
    """When a file's values have come in: those that several layers share are one again, and the rest follows."""
    methods = methods_of(adapter)
    for method, place in zip(methods, adapter.layout.places, strict=True):
        for leaf, i in place.borrowed.items():
            holder, key = method.place_of(leaf)
            holder[key] = methods[i].tensor(leaf)
    for method in methods:
        method.follow(method.options)


def tensors_of(adapter: Adapter, commons: Mapping[str, Leaves]) -> list[Tensor]:
    """An adapter's tensors in the module tree, in the order of its layout."""
    methods = methods_of(adapter)
    return [
        common(commons, name, adapter.name) if i < 0 else methods[i].tensor(name)
        for i, name, _, _ in adapter.layout.spans()
    ]


def relay(adapter: Adapter, config: Any) -> None:
    """Give an adapter a layout of its own, of the methods and tensors that it has now."""
    places = []
    for place, method in zip(adapter.layout.places, methods_of(adapter), strict=True):
        leaves = {k: replace(leaf, shape=tuple(method.tensor(k).shape)) for k, leaf in place.leaves.items()}
        follows = method.options is adapter.config
        places.append(replace(place, method=method.twin("", method.options), leaves=leaves, follows=follows))
    adapter.layout = replace(adapter.layout, config=config, places=places)
