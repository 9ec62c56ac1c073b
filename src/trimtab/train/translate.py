"""Other tools' training files as settings of ours: recognised by a key, translated line by line, refused by name.

What each tool's keys mean here is in `trimtab.train.tools`, one table a tool.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from trimtab.errors import ConfigError

__all__ = ["Cannot", "Line", "Skip", "Tool", "Translation", "translate"]


class Cannot(ValueError):
    """A setting that cannot be honoured; the message says why.

    Args:
        instead: a setting of ours that decides the matter where it is given as well.
    """

    def __init__(self, why: str, instead: str = "") -> None:
        super().__init__(why)
        self.instead = instead


@dataclass(frozen=True)
class Skip:
    """A setting that needs no counterpart, and why."""

    why: str


# What becomes of a key: the same under our name, settings by a function of its value, nothing, or a refusal.
Rule = str | Skip | Cannot | Callable[[Any], dict[str, Any]]


@dataclass(frozen=True)
class Tool:
    """How one tool's files are read.

    Attributes:
        knows: whether a file is one of this tool's.
        rules: its keys.
        defaults: what holds there where a file says nothing, and differs from what would hold here.
        keys: those that are understood together, and `together`: what follows from them.
        notes: differences that no setting removes.
    """

    name: str
    knows: Callable[[Mapping[str, Any]], bool]
    rules: Mapping[str, Rule]
    defaults: Mapping[str, Any]
    together: Callable[[Mapping[str, Any]], dict[str, Any]]
    keys: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Line:
    """One line of the translation, for people."""

    theirs: str
    ours: str
    note: str = ""


@dataclass
class Translation:
    """Settings of ours, and how they came about."""

    tool: str
    settings: dict[str, Any] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)
    notes: tuple[str, ...] = ()


def translate(tool: Tool, content: Mapping[str, Any], given: Mapping[str, Any] | None = None) -> Translation:
    """A tool's file as settings of ours.

    Args:
        given: settings that come on top, as flags: they decide what the file leaves open.

    Raises:
        ConfigError: everything in it that cannot be honoured.
    """
    left, given = dict(content), dict(given or {})
    found = Translation(tool.name, notes=tool.notes)
    faults: list[str] = []

    def take(theirs: str, make: Callable[[], dict[str, Any]]) -> None:
        try:
            settings = make()
        except Cannot as e:
            if not e.instead or e.instead not in given:
                faults.append(f"{theirs}: {e}" + (f" (or give --{e.instead.replace('_', '-')})" if e.instead else ""))
            return
        found.settings |= settings
        ours = ", ".join(f"{k}: {_short(v)}" for k, v in settings.items())
        found.lines.append(Line(theirs, ours, "" if settings else "so it is here, too"))

    used = {key: left.pop(key) for key in tool.keys if key in left}
    take(", ".join(f"{k}: {_short(v)}" for k, v in used.items()), lambda: tool.together(content))
    for key, value in left.items():
        rule, said = tool.rules.get(key), f"{key}: {_short(value)}"
        if isinstance(rule, str):
            take(said, lambda rule=rule, value=value: {rule: value} if value is not None else {})  # type: ignore[misc]
        elif isinstance(rule, Skip):
            found.lines.append(Line(said, "", rule.why))
        elif value in (None, "", [], {}) or (isinstance(rule, Cannot | None) and value in (False, "no", "none")):
            found.lines.append(Line(said, "", "off"))
        elif isinstance(rule, Cannot):
            take(said, lambda rule=rule: _refuse(rule))  # type: ignore[misc]
        elif rule is None:
            faults.append(f"{said}: this setting of {tool.name} is not known here")
        else:
            take(said, lambda rule=rule, value=value: rule(value))  # type: ignore[misc]
    if faults:
        head = f"This is a file of {tool.name}, and not all of it can be honoured:"
        raise ConfigError("\n  ".join([head, *faults]))
    for name, value in tool.defaults.items():
        if name not in found.settings and name not in given:
            found.settings[name] = value
            found.lines.append(Line("", f"{name}: {_short(value)}", f"{tool.name}'s default"))
    return found


def _refuse(rule: Cannot) -> dict[str, Any]:
    raise rule


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
