"""Where adapters' tensors live: `layer.lora_A["default"].weight`, as optimisers and scripts expect to find them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class Leaf(nn.Module):
    """Holds the tensors of one leaf of one adapter under their own names."""


class LinearLeaf(nn.Linear):
    """A leaf whose weight is a matrix: to other libraries a Linear layer like any other."""

    def __init__(self, weight: Tensor) -> None:
        nn.Module.__init__(self)
        # Past nn.Module's own setattr, which costs more than all the rest where hundreds are made.
        self.__dict__["out_features"], self.__dict__["in_features"] = weight.shape
        self._parameters.update(weight=None, bias=None)  # in the order every Linear layer has them


class Leaves(nn.Module):
    """{adapter: leaf} of one name, like a ModuleDict or ParameterDict.

    Parked adapters are found here like the others, but `parameters()`, `state_dict()` and `train()` do not visit them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.parked: dict[str, Any] = {}

    @staticmethod
    def at(layer: nn.Module, path: str) -> Leaves:
        """The container at a path below a layer, made where it is missing."""
        *holders, name = path.split(".")
        for holder in holders:
            if holder not in layer._modules:
                layer._modules[holder] = nn.Module()
            layer = layer._modules[holder]  # type: ignore[assignment]
        leaves = layer._modules.get(name)
        if leaves is None:
            leaves = layer._modules[name] = Leaves()
        return leaves  # type: ignore[return-value]

    def put(self, adapter: str, name: str, tensor: Tensor) -> None:
        """Store a tensor under `adapter`, or under its `name` there; what is no Parameter becomes a buffer."""
        if not name:
            (self._parameters if isinstance(tensor, nn.Parameter) else self._buffers)[adapter] = tensor  # type: ignore[index,assignment]
            return
        leaf = self.find(adapter)
        if leaf is None:
            leaf = LinearLeaf(tensor) if name == "weight" and tensor.ndim == 2 else Leaf()
            self._modules[adapter] = leaf
        if isinstance(tensor, nn.Parameter):
            leaf._parameters[name] = tensor
        else:
            leaf.register_buffer(name, tensor)

    def get(self, adapter: str, name: str) -> Tensor:
        """The tensor stored under `adapter` (and `name`)."""
        leaf = self[adapter]
        tensor: Tensor = getattr(leaf, name) if name else leaf
        return tensor

    def find(self, adapter: str) -> Any:
        """What is stored under `adapter`, or None."""
        for store in (self._modules, self._parameters, self._buffers, self.parked):
            if adapter in store:
                return store[adapter]
        return None

    def park(self, adapter: str) -> None:
        """Take an adapter out of the module tree, its objects unchanged."""
        for store in (self._modules, self._parameters, self._buffers):
            if adapter in store:
                self.parked[adapter] = store.pop(adapter)  # type: ignore[attr-defined]

    def unpark(self, adapter: str) -> None:
        """Put an adapter back into the module tree."""
        if adapter in self.parked:
            leaf = self.parked.pop(adapter)
            if isinstance(leaf, nn.Module):
                self._modules[adapter] = leaf
            else:
                self.put(adapter, "", leaf)

    def remove(self, adapter: str) -> None:
        """Forget an adapter."""
        for store in (self._modules, self._parameters, self._buffers, self.parked):
            store.pop(adapter, None)  # type: ignore[attr-defined]

    def __getitem__(self, adapter: str) -> Any:
        leaf = self.find(adapter)
        if leaf is None:
            raise KeyError(adapter)
        return leaf

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            parked = self.__dict__.get("parked", {})
            if name in parked:
                return parked[name]
            raise

    def __contains__(self, adapter: str) -> bool:
        return self.find(adapter) is not None

    def __iter__(self) -> Iterator[str]:
        return iter([*self._modules, *self._parameters, *self._buffers, *self.parked])

    def __len__(self) -> int:
        return len(list(iter(self)))

    def keys(self) -> list[str]:
        """The adapters' names."""
        return list(self)

    def items(self) -> list[tuple[str, Any]]:
        """(adapter, leaf) pairs."""
        return [(name, self[name]) for name in self]

    def values(self) -> list[Any]:
        """The leaves."""
        return [self[name] for name in self]

    def _apply(self, fn: Any, recurse: bool = True) -> Leaves:
        super()._apply(fn, recurse)
        for leaf in self.parked.values():
            if isinstance(leaf, nn.Module):
                leaf._apply(fn)
            else:
                with torch.no_grad():
                    leaf.data = fn(leaf.data)
        return self
