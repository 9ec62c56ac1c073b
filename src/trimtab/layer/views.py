"""Attributes of a layer's methods under PEFT's names: `layer.scaling["default"]`."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any

from trimtab.core.method import Method


class View(MutableMapping[str, Any]):
    """An attribute of a layer's methods as {adapter: value}, as PEFT's layers keep it; writing writes through."""

    def __init__(self, layer: Any, attribute: str) -> None:
        self.layer, self.attribute = layer, attribute

    def _method(self, adapter: str) -> Method:
        if adapter not in self.layer.methods and adapter in self.layer.adapters:
            self.layer.bring(adapter)
        for method in self.layer.methods.get(adapter, ()):
            if self.attribute in method.views:
                return method
        raise KeyError(adapter)

    def __getitem__(self, adapter: str) -> Any:
        return getattr(self._method(adapter), self.attribute)

    def __setitem__(self, adapter: str, value: Any) -> None:
        setattr(self._method(adapter), self.attribute, value)

    def __delitem__(self, adapter: str) -> None:
        raise TypeError("an adapter's settings go with the adapter: call delete_adapter()")

    def __iter__(self) -> Iterator[str]:
        here = self.layer.methods
        return (a for a in self.layer.adapters if a not in here or any(self.attribute in m.views for m in here[a]))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return repr(dict(self))
