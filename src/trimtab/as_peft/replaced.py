"""Methods of peft's layer classes that other libraries replace: the layers that such a class stands for have theirs."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from trimtab.layer.adapted import AdaptedLayer
from trimtab.layer.face import OF_PARAMETERS


class Replaced:
    """A method of our one layer class that is another for the layers of some of peft's.

    Attributes:
        theirs: {peft's class: its method}, the last replaced last.
    """

    def __init__(self, name: str, own: Any) -> None:
        self.name, self.own, self.theirs = name, own, dict[type, Callable[..., Any]]()

    def __get__(self, layer: Any, owner: type) -> Any:
        """The bound method of a layer."""
        for cls, method in reversed(self.theirs.items()) if layer is not None else ():
            if isinstance(layer, cls):
                return MethodType(method, layer)
        if self.own is None:  # a layer finds it by itself, where it has it
            raise AttributeError(self.name)
        return self.own if layer is None else self.own.__get__(layer, owner)


def found(cls: type, name: str) -> Any:
    """What peft's class `cls` has under a name: what stands there for it, else what every layer of ours has.

    Raises:
        AttributeError: nothing.
    """
    there = AdaptedLayer.__dict__.get(name)
    if isinstance(there, Replaced):
        for other, method in reversed(there.theirs.items()):
            if other is cls or issubclass(cls, other):
                return method
    own = there.own if isinstance(there, Replaced) else getattr(AdaptedLayer, name, None)
    if own is None and name in OF_PARAMETERS and cls.__name__ == "ParamWrapper":
        return lambda layer, *args: AdaptedLayer.__getattr__(layer, name)(*args)
    if own is None:
        raise AttributeError(f"type object '{cls.__name__}' has no attribute '{name}'")
    return own


def replace(cls: type, name: str, method: Any) -> bool:
    """Give the layers of one of peft's classes another method; False where no layer has one of that name."""
    if name.startswith("__") or not callable(method):
        return False
    there = AdaptedLayer.__dict__.get(name)
    if not isinstance(there, Replaced):
        own = getattr(AdaptedLayer, name, None)
        if not (callable(own) or name in OF_PARAMETERS):
            return False
        there = Replaced(name, own)
        setattr(AdaptedLayer, name, there)
    there.theirs.pop(cls, None)
    if method is not there.own:
        there.theirs[cls] = method
    return True


def restore(cls: type, name: str) -> bool:
    """Take it back; False where there is none."""
    there = AdaptedLayer.__dict__.get(name)
    return isinstance(there, Replaced) and there.theirs.pop(cls, None) is not None
