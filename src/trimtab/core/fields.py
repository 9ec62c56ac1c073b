"""The types of a config's fields, read off its annotations: one place knows what each takes."""

from __future__ import annotations

import dataclasses
import enum
import functools
import os
import types
import typing
from collections.abc import Collection, Mapping
from importlib import import_module
from typing import Any, Literal, Union

from trimtab.errors import ConfigError

LARGEST = 1e10  # of a number that is a measure: what is beyond is damage, and would be infinite in half a formula
SCALARS: dict[Any, str] = {
    int: "a whole number",
    float: "a number (finite, to 1e10)",
    bool: "True or False",
    str: "a string",
    type(None): "None",
}
MANY: dict[Any, str] = {int: "whole numbers", float: "numbers (finite, to 1e10)", bool: "booleans", str: "strings"}
PLAIN = frozenset({bool, str, type(None)})  # of these every value is one of the type: numbers have bounds
LISTS = (list, tuple, set, frozenset)


class Misfit(Exception):
    """A value that is not of a type."""


def default_of(f: dataclasses.Field[Any]) -> Any:
    """The default value of a dataclass field."""
    if f.default_factory is not dataclasses.MISSING:
        return f.default_factory()
    return f.default


def check(config: Any) -> None:
    """Hold every field's value against its annotation, and write it in its plain form (numpy's numbers as numbers).

    Raises:
        ConfigError: names each field whose value is of another type, what it is and what the field takes.
    """
    kind: Any = type(config)
    faults = []
    for name, hint, whole in _taken(kind):
        value = getattr(config, name)
        if type(value) in whole:
            continue
        try:
            plain = fitted(value, hint)
        except Misfit as nested:
            wanted = str(nested) or described(hint)
            faults.append(f"`{name}` should be {wanted}, not {_shown(value)}{_advice(value, hint)}")
        else:
            if plain is not value:
                setattr(config, name, plain)
            if name.endswith("dropout") and isinstance(plain, int | float) and not 0 <= plain <= 1:
                faults.append(f"`{name}` should be a share from 0 to 1, not {_shown(value)}")
    if faults:
        raise ConfigError(f"{kind.__name__}: {'; '.join(faults)}.")


def nested(value: Any, place: str, said: str) -> Any:
    """What a field holds that is settings of a class of its own, `place` ("module:class"); a dict becomes one.

    Raises:
        ConfigError: it is neither, nor empty, or the class does not take the dict.
    """
    module, _, name = place.partition(":")
    if isinstance(value, dict):
        try:
            return getattr(import_module(module), name)(**value)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{said}: {error}") from error
    if value is None or value is False or (dataclasses.is_dataclass(value) and not isinstance(value, type)):
        return value
    raise ConfigError(f"{said} should be a {name} or a dict, not {_shown(value)}.")


def fitted(value: Any, hint: Any) -> Any:
    """The value as one of the type, itself where it is one already.

    Any collection does for a list, a whole float for an int, 0, 1 or None for a bool, an enum's value for the enum, a
    dict for a dataclass; a bool is no number. Raises `Misfit`.
    """
    if getattr(value, "shape", None) == () and hasattr(value, "item"):  # a numpy or torch scalar
        value = value.item()
    options = _options(hint)
    for convert in (False, True):  # first what it is, then what it can be read as: 1 is an int before it is a bool
        for option in options:
            try:
                return _as(value, option, convert)
            except Misfit as misfit:
                if str(misfit):
                    raise
    raise Misfit


def _as(value: Any, hint: Any, convert: bool) -> Any:
    origin: Any = typing.get_origin(hint) or hint
    args = typing.get_args(hint)
    if hint is Any:
        return value
    if origin is Literal:
        return _need(value, any(_equal(value, a) for a in args))
    if origin in SCALARS:
        return _scalar(value, origin, convert)
    if origin in LISTS:
        return _sequence(value, origin, args)
    if origin is dict:
        _need(value, isinstance(value, Mapping))
        key, item = args or (Any, Any)
        found = {fitted(k, key): fitted(v, item) for k, v in value.items()}
        return value if _same(value, found, dict) and list(found) == list(value) else found
    if isinstance(origin, type) and issubclass(origin, enum.Enum):
        return _need(value, isinstance(value, origin) or any(_equal(value, member.value) for member in origin))
    if convert and hasattr(origin, "__dataclass_fields__") and isinstance(value, Mapping):
        known = {f.name for f in dataclasses.fields(origin)}
        if unknown := sorted(str(k) for k in value if k not in known):
            raise Misfit(f"a dict with keys of {origin.__name__}, which has no {unknown}")
        return origin(**value)
    return _need(value, not isinstance(origin, type) or isinstance(value, origin))


def _scalar(value: Any, kind: Any, convert: bool) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float:
        return _need(value, number and abs(value) <= LARGEST)
    if kind is int:
        whole = number and -(2**63) <= value < 2**64 and (isinstance(value, int) or (convert and value.is_integer()))
        return int(_need(value, whole))
    if kind is bool and convert and (value is None or (number and value in (0, 1))):  # null, in files of old
        return bool(value)
    if kind is str and convert and isinstance(value, os.PathLike):
        return os.fspath(value)
    return _need(value, isinstance(value, kind))


def _sequence(value: Any, kind: Any, args: tuple[Any, ...]) -> Any:
    _need(value, isinstance(value, Collection) and not isinstance(value, str | bytes | bytearray | Mapping))
    if kind is tuple and args and args[-1] is not ...:
        _need(value, len(value) == len(args))
        found = [fitted(v, a) for v, a in zip(value, args)]
    else:
        found = [fitted(v, args[0] if args else Any) for v in value]
    plain = type(value) if isinstance(value, LISTS) else list
    return value if _same(value, found, LISTS) else plain(found)


def described(hint: Any, many: bool = False) -> str:
    """A type in words; with `many`, as what a list of it holds."""
    origin, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    if len(options := _options(hint)) > 1:
        parts = list(dict.fromkeys(described(a, many) for a in options))
        return " or ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))
    if origin is Literal:
        return f"one of {', '.join(map(repr, args))}"
    if origin in LISTS:
        inner = described(args[0], True) if args else "values"
        return (
            f"{'lists' if many else 'a list'} of {len(args)} {inner}"
            if origin is tuple and args
            else (f"{'lists' if many else 'a list'} of {inner}")
        )
    if origin is dict:
        inner = f" of {described(args[0], True)} to {described(args[1], True)}" if args else ""
        return f"{'dicts' if many else 'a dict'}{inner}"
    if hint is Any:
        return "values"
    if isinstance(origin, type) and issubclass(origin, enum.Enum):
        return f"one of {', '.join(repr(m.value) for m in origin)}"
    words = MANY if many and origin in MANY else SCALARS
    return words.get(origin, f"a {getattr(origin, '__name__', origin)}")


def _options(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself."""
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)


def _equal(value: Any, wanted: Any) -> bool:
    return isinstance(value, type(wanted)) and isinstance(value, bool) == isinstance(wanted, bool) and value == wanted


def _need(value: Any, fits: bool) -> Any:
    if not fits:
        raise Misfit
    return value


def _same(value: Any, found: Any, kind: Any) -> bool:
    """Whether reading a container changed nothing in it."""
    items = (value.values(), found.values()) if kind is dict else (value, found)
    return isinstance(value, kind) and all(a is b for a, b in zip(*items))


@functools.cache
def _taken(cls: Any) -> list[tuple[str, Any, frozenset[Any]]]:
    """Each field of a config's class: its name, its type, and those of that type's members of which any value does."""
    hints = typing.get_type_hints(cls)
    return [(f.name, hints[f.name], PLAIN & {*_options(hints[f.name])}) for f in dataclasses.fields(cls)]


def _shown(value: Any, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def _advice(value: Any, hint: Any) -> str:
    """What was probably meant by a string."""
    options = {typing.get_origin(a) or a for a in _options(hint)}
    if isinstance(value, str) and value and list in options:
        return f" (as a list: {[v.strip() for v in value.split(',')]})"
    if isinstance(value, str) and value.strip().lstrip("-").replace(".", "", 1).isdigit() and {int, float} & options:
        return " (without the quotes)"
    return ""
