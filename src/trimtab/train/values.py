"""A value from a file or a command line, read as the type of the field it is for."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Callable
from typing import Any

from trimtab.train.names import nearest

NO = object()  # what a reader returns for a value that is not of its type
NONE = type(None)


class Fault(ValueError):
    """One value that cannot be read; the message names the field."""


def types_of(cls: type) -> dict[str, Any]:
    """{field: its type} of a dataclass."""
    return typing.get_type_hints(cls)


def parse(name: str, value: Any, hint: Any, least: float | None = None) -> Any:
    """The value as the type `hint` (one of bool, int, float, str, Literal, list, dict, Any, and unions of them).

    Text is read as a file would have it: "1e-4" is a number, "q_proj,v_proj" a list, "none" nothing.

    Raises:
        Fault: it cannot be read so, or is below `least`.
    """
    kinds = members(hint)
    if value is None or (isinstance(value, str) and value.lower() in ("none", "null") and NONE in kinds):
        if NONE in kinds or Any in kinds:
            return None
        raise Fault(f"{name} needs a value: {describe(hint)}.")
    # A list of names before a name, a number before text: the most particular first.
    readers = (_reader(kind, alone=str not in kinds) for kind in sorted(kinds, key=_rank))
    found = next((v for read in readers if (v := read(value)) is not NO), NO)
    if found is NO:
        known = [str(c) for kind in kinds for c in typing.get_args(kind) if typing.get_origin(kind) is typing.Literal]
        meant = nearest(str(value), known)
        raise Fault(f"{name}: expected {describe(hint)}, not {value!r}{meant or '.'}")
    if least is not None and isinstance(found, int | float) and not isinstance(found, bool) and not found >= least:
        raise Fault(f"{name} must be at least {least:g}, not {found:g}.")
    return found


def members(hint: Any) -> list[Any]:
    """The types of a union, or the one type."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [m for part in typing.get_args(hint) for m in members(part)]
    return [hint]


def describe(hint: Any) -> str:
    """What a type is called in a message."""
    words = []
    for kind in members(hint):
        origin = typing.get_origin(kind) or kind
        if origin is typing.Literal:
            choices = typing.get_args(kind)
            words.append(("one of " if len(choices) > 1 else "") + ", ".join(map(str, choices)))
        elif kind is not NONE:
            words.append(_NAMES.get(origin, "a value"))
    return " or ".join(dict.fromkeys(words))


_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list",
          dict: "a mapping", tuple: "a list", set: "a list"}  # fmt: skip


def _rank(kind: Any) -> int:
    order = (bool, int, float, typing.Literal, dict, list)
    origin = typing.get_origin(kind) or kind
    return order.index(origin) if origin in order else len(order) + (kind is Any)


def _reader(kind: Any, alone: bool = True) -> Callable[[Any], Any]:
    """A function that reads a value as this type, or returns NO; `alone`: the field takes no plain text beside it."""
    origin, arguments = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin is typing.Literal:
        return lambda v: next((c for c in arguments if str(v) == str(c)), NO)
    if origin is list:
        return lambda v: _list(v, arguments[0] if arguments else Any, alone)
    table: dict[Any, Callable[[Any], Any]] = {
        bool: _bool, int: _int, float: _float, dict: _dict, str: _str, NONE: _none,
    }  # fmt: skip
    return table.get(origin, _flow)


def _none(value: Any) -> Any:
    return value if value is None else NO


def _str(value: Any) -> Any:
    return value if isinstance(value, str) else NO


def _bool(value: Any) -> Any:
    if isinstance(value, str):
        return {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}.get(value.lower(), NO)
    return value if isinstance(value, bool) else NO


def _int(value: Any) -> Any:
    number = _float(value)
    return int(number) if number is not NO and number == int(number) else NO


def _float(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return NO
    try:
        number = float(value)
    except ValueError:
        return NO
    return number if abs(number) < float("inf") else NO  # neither inf nor nan


def _dict(value: Any) -> Any:
    value = _flow(value)
    return value if isinstance(value, dict) else NO


def _list(value: Any, item: Any, alone: bool) -> Any:
    value = _flow(value)
    if isinstance(value, str):
        # One plain name where names or a pattern may stand is a list of it: no pattern of whole paths is one word.
        if not (alone or "," in value or (re.fullmatch(r"[A-Za-z_][\w.]*", value) and item is str)):
            return NO
        value = [] if value == "none" else [part.strip() for part in value.split(",") if part.strip()]
    if not isinstance(value, list | tuple | set):
        return NO
    read = [_reader(item)(v) for v in value]
    return NO if any(v is NO for v in read) else read


def _flow(value: Any) -> Any:
    """Text that is a YAML list or mapping, as such."""
    if isinstance(value, str) and value[:1] in ("[", "{"):
        import yaml

        try:
            return yaml.safe_load(value)
        except yaml.YAMLError:
            return value
    return value
