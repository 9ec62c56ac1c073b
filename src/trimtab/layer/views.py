"""Attributes of a layer's methods under PEFT's names: `layer.scaling["default"]`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import fields
from functools import lru_cache
from typing import Any

from torch import nn

from trimtab.core.config import LayerConfig
from trimtab.core.method import Method

RATES = ("rank_dropout", "module_dropout")  # shown as numbers; other dropouts as the modules that PEFT's layers have
OF_MODEL = {"bias", *(f.name for f in fields(LayerConfig))}  # fields that say nothing of one layer


class View(MutableMapping[str, Any]):
    """An attribute of a layer's methods as {adapter: value}, as PEFT's layers keep it; writing writes through."""

    def __init__(self, layer: Any, attribute: str) -> None:
        self.layer, self.attribute = layer, attribute

    def _method(self, adapter: str) -> Method:
        if adapter not in self.layer.methods and adapter in self.layer.adapters:
            self.layer.bring(adapter)
        for method in self.layer.methods.get(adapter, ()):
            if self._has(method):
                return method
        raise KeyError(adapter)

    def _has(self, method: Method) -> bool:
        return self.attribute in method.views

    def __getitem__(self, adapter: str) -> Any:
        return getattr(self._method(adapter), self.attribute)

    def __setitem__(self, adapter: str, value: Any) -> None:
        setattr(self._method(adapter), self.attribute, value)

    def __delitem__(self, adapter: str) -> None:
        raise TypeError("an adapter's settings go with the adapter: call delete_adapter()")

    def __iter__(self) -> Iterator[str]:
        here = self.layer.methods
        return (a for a in self.layer.adapters if a not in here or any(map(self._has, here[a])))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return repr(dict(self))


class Setting(View):
    """A field of the adapters' configs as it holds at a layer: `layer.use_dora["default"]`, `layer.lora_dropout`."""

    def _has(self, method: Method) -> bool:
        return shows(method).get(self.attribute) is Setting

    def __getitem__(self, adapter: str) -> Any:
        method = self._method(adapter)
        if self.attribute.endswith("_dropout") and self.attribute not in RATES:
            return Drop(method, self.attribute) if _rate(method, self.attribute) else nn.Identity()
        return getattr(method.options, self.attribute)

    def __setitem__(self, adapter: str, value: Any) -> None:
        if isinstance(value, nn.Module):
            value = getattr(value, "p", 0.0)
        _set(self._method(adapter), self.attribute, value)


class Drop(nn.Dropout):
    """The dropout of an adapter at a layer; writing its `p` writes through."""

    def __init__(self, method: Method, attribute: str) -> None:
        nn.Module.__init__(self)
        self.inplace, self.method, self.attribute = False, method, attribute

    @property
    def p(self) -> float:  # type: ignore[override]
        """The probability that an entry is dropped."""
        return _rate(self.method, self.attribute)

    @p.setter
    def p(self, value: float) -> None:
        _set(self.method, self.attribute, value)


def listed(method: type[Method]) -> tuple[str, ...]:
    """The names that PEFT's layers of a method list as their settings: a dropout by its field in the config."""
    own = tuple(name for name in method.views if name != "dropout" or "lora_dropout" not in method.settings)
    return own + tuple(name for name in method.settings if name not in own)


def shows(method: Method) -> Mapping[str, Callable[[Any, str], Any]]:
    """{attribute: what makes it, of a layer and its name} of a layer that has such a method."""
    kinds: Any = type(method), type(method.options)
    return _shows(*kinds)


@lru_cache(256)
def _shows(method: Any, config: Any) -> Mapping[str, Callable[[Any, str], Any]]:
    settings = frozenset(getattr(config, "__dataclass_fields__", ())) - OF_MODEL
    vacant = dict.fromkeys(method.elsewhere, _nothing)
    return {**vacant, **dict.fromkeys(settings, Setting), **dict.fromkeys(method.views, View)}


def _nothing(layer: Any, name: str) -> nn.ModuleDict:
    return nn.ModuleDict()


def _rate(method: Any, name: str) -> float:
    return float(method.dropout if "dropout" in method.views else getattr(method.options, name))


def _set(method: Any, name: str, value: Any) -> None:
    if name.endswith("_dropout") and "dropout" in method.views:
        method.dropout = value
    method.options = method.options.shallow()  # other layers have it, too
    setattr(method.options, name, value)
