"""Where adapters' tensors live: `layer.lora_A["default"].weight`, as optimisers and scripts expect to find them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from trimtab.layer.views import View

BLANK = {name: value for name, value in nn.Module().__dict__.items() if name != "training"}
FRESH = [(name, type(value)) for name, value in BLANK.items() if isinstance(value, dict | set)]


def _training(module: nn.Module) -> bool:
    mode: bool = module.__dict__["mode"][0]
    return mode


def _train(module: nn.Module, mode: bool) -> None:
    module.__dict__.setdefault("mode", [mode])[0] = mode


# Training or evaluation mode, one for all that a layer has of adapters: `mode` is a list of one that they share. To
# switch it costs the same however many adapters there are.
MODE: Any = property(_training, _train)


class Leaf(nn.Module):
    """Holds the tensors of one leaf of one adapter under their own names."""

    training = MODE

    def __init__(self, mode: list[bool]) -> None:
        # What nn.Module's own start leaves: that takes ten times as long, and adapters come with hundreds of these.
        own = self.__dict__
        own.update(BLANK)
        for name, kind in FRESH:
            own[name] = kind()
        own["mode"] = mode


class LinearLeaf(nn.Linear):
    """A leaf whose weight is a matrix: to other libraries a Linear layer like any other."""

    training = MODE

    def __init__(self, mode: list[bool], weight: Tensor) -> None:
        Leaf.__init__(self, mode)  # type: ignore[arg-type]
        self.__dict__["out_features"], self.__dict__["in_features"] = weight.shape
        self._parameters.update(weight=None, bias=None)  # in the order every Linear layer has them


class Group(nn.Module):
    """What stands between a layer and containers of it; it shows the settings of adapters as the layer does."""

    training = MODE

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.__dict__.update(layer=layer, mode=layer.leaves_mode)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            methods = getattr(self.__dict__.get("layer"), "__dict__", {}).get("methods", {})
            if not any(name in m.views for ms in methods.values() for m in ms):
                raise
        return View(self.layer, name)


class Leaves(nn.Module):
    """{adapter: leaf} of one name, like a ModuleDict or ParameterDict.

    Adapters that are parked (not in the module tree) are found here like the others: asking for one brings it back.

    Args:
        layer: the layer that the container belongs to, or None; it knows the adapters that are parked.
    """

    training = MODE

    def __init__(self, layer: Any = None) -> None:
        super().__init__()
        self.__dict__["layer"] = layer  # past nn.Module's setattr: a parent is no child
        if layer is not None:
            self.__dict__["mode"] = layer.leaves_mode

    @staticmethod
    def at(layer: nn.Module, path: str) -> Leaves:
        """The container at a path below a layer, made where it is missing."""
        *holders, name = path.split(".")
        within = layer
        for holder in holders:
            if holder not in within._modules:
                within._modules[holder] = Group(layer)
            within = within._modules[holder]  # type: ignore[assignment]
        leaves = within._modules.get(name)
        if leaves is None:
            leaves = within._modules[name] = Leaves(layer)
        return leaves  # type: ignore[return-value]

    def put(self, adapter: str, name: str, tensor: Tensor) -> tuple[dict[str, Any], str]:
        """Store a tensor under `adapter`, or under its `name` there; what is no Parameter becomes a buffer.

        Returns:
            Where it is registered, and its key there.
        """
        trained = type(tensor) is nn.Parameter or isinstance(tensor, nn.Parameter)  # whose own check is slow
        if not name:
            store: dict[str, Any] = self._parameters if trained else self._buffers
            store[adapter] = tensor
            return store, adapter
        leaf = self._modules.get(adapter)
        if leaf is None:
            mode = self.__dict__["mode"]
            leaf = LinearLeaf(mode, tensor) if name == "weight" and tensor.ndim == 2 else Leaf(mode)
            self._modules[adapter] = leaf
        if trained:
            leaf._parameters[name] = tensor  # type: ignore[assignment]
            return leaf._parameters, name
        leaf.register_buffer(name, tensor)
        return leaf._buffers, name

    @property
    def stores(self) -> tuple[dict[str, Any], ...]:
        """Where what adapters have is registered, by their names."""
        return self._modules, self._parameters, self._buffers

    def find(self, adapter: str) -> Any:
        """What is stored under `adapter` in the module tree, or None."""
        for store in self.stores:
            if adapter in store:
                return store[adapter]
        return None

    def remove(self, adapter: str) -> None:
        """Forget an adapter."""
        for store in self.stores:
            store.pop(adapter, None)

    def parked(self) -> list[str]:
        """The adapters that have something here and are not in the module tree."""
        return self.layer.parked(self) if self.layer is not None else []

    def __getitem__(self, adapter: str) -> Any:
        leaf = self.find(adapter)
        if leaf is None and adapter in self.parked():
            self.layer.bring(adapter)
            leaf = self.find(adapter)
        if leaf is None:
            raise KeyError(adapter)
        return leaf

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or name not in self.parked():
                raise
        return self[name]

    def __contains__(self, adapter: str) -> bool:
        return self.find(adapter) is not None or adapter in self.parked()

    def __iter__(self) -> Iterator[str]:
        return iter([*self._modules, *self._parameters, *self._buffers, *self.parked()])

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


CONTAINERS, LEAVES = (Group, Leaves), frozenset({Leaf, LinearLeaf})


def _apart(module: nn.Module) -> Iterable[Any]:
    """The modules inside that may have a mode of their own: a container of leaves alone has none."""
    inside = module._modules.values()
    return () if isinstance(module, CONTAINERS) and LEAVES.issuperset(map(type, inside)) else inside


def strangers(modules: Iterable[Any]) -> list[nn.Module]:
    """What others have put among the containers of a layer (not inside leaves): it has a mode of its own."""
    found, pending = [], list(modules)
    for module in pending:  # it grows
        if isinstance(module, CONTAINERS):
            pending += _apart(module)
        elif type(module) not in LEAVES and module is not None:
            found.append(module)
    return found


def in_training(module: nn.Module) -> bool:
    """Whether a module or one inside is in training mode."""
    pending = [module]
    for each in pending:  # it grows
        if each.training:
            return True
        if each._modules:
            pending += [inside for inside in _apart(each) if inside is not None]
    return False
