"""A run's settings on the command line: an option for each field, other tools' files, a method's own fields."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from trimtab.errors import ConfigError
from trimtab.train.config import FIELDS, SHOWN, TYPES
from trimtab.train.values import describe

CONFIGS = (".yaml", ".yml", ".toml")  # what is no rows, then


def options(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for each field of `TrainConfig`, after its own parameters."""
    own = [p for p in inspect.signature(function, eval_str=True).parameters.values() if p.kind is not p.VAR_KEYWORD]
    made = [_parameter(name) for name in FIELDS]
    at = list(FIELDS).index("method") + 1
    made[at:at] = [_option(name, text, "TEXT", FIELDS["method"].metadata["section"]) for name, text in SHOWN.items()]
    function.__signature__ = inspect.Signature([*own, *made])  # type: ignore[attr-defined]
    function.__annotations__ = {p.name: p.annotation for p in (*own, *made)} | {"return": None}
    return function


def _parameter(name: str) -> inspect.Parameter:
    """One field as an option."""
    field = FIELDS[name]
    default = field.default_factory() if callable(field.default_factory) else field.default
    text = str(field.metadata["help"])
    if default not in (None, [], False):
        text = f"{text[:-1]} ({default})."
    return _option(name, text, _metavar(TYPES[name]), field.metadata["section"])


def _option(name: str, text: str, metavar: str, section: str) -> inspect.Parameter:
    """An option whose value stays text: a file's and a command line's are then read by the same rules."""
    more: dict[str, Any] = {"metavar": metavar} if metavar else {"is_flag": True}
    kind: Any = str if metavar else bool
    info = typer.Option(f"--{name.replace('_', '-')}", help=text, rich_help_panel=section, show_default=False, **more)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, info]
    )


def _metavar(hint: Any) -> str:
    """What stands for the value in the help; nothing for a switch."""
    said = describe(hint)
    words = {"a whole number": "INT", "a number": "NUMBER", "text": "TEXT", "a list": "A,B", "true or false": ""}
    choice = said.removeprefix("one of ").replace(", ", "|")
    return words[said] if choice == said else choice if len(choice) < 24 else "NAME"


def given_by(context: typer.Context, config: Path | None, flags: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a command line says, as mappings for `read_run`: the config file, then the flags over it."""
    extra, files = rest(context.args)
    named = {k: v for k, v in flags.items() if v is not None}
    for path in files:
        if Path(path).suffix in CONFIGS:
            if config is not None:
                raise ConfigError(f"There are two config files, {config} and {path}: give one.")
            config = Path(path)
        elif named.setdefault("data", path) != path:
            raise ConfigError(f"There are two files of rows, {named['data']} and {path}: give one.")
    given = {**extra, **named}
    return [_content(config, given), given] if config is not None else [given]


def _content(path: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a config file, ours or another tool's."""
    from trimtab.train.config import read_file
    from trimtab.train.names import ALIASES
    from trimtab.train.tools import recognise
    from trimtab.train.translate import translate

    content = read_file(path)
    tool = recognise(content)
    if tool is None:
        return content
    translation = translate(tool, content, {ALIASES.get(name, (name,))[0]: value for name, value in given.items()})
    from trimtab.train.report import console_for, show_translation

    show_translation(console_for(), translation, path)
    return translation.settings


def rest(arguments: list[str]) -> tuple[dict[str, Any], list[str]]:
    """(options that are no field of a run, plain words) of what a command line has left over."""
    found: dict[str, Any] = {}
    words: list[str] = []
    left = list(arguments)
    while left:
        word = left.pop(0)
        if not word.startswith("--"):
            words.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if name.startswith("no_") and name[3:] in FIELDS and not equals:
            name, value = name[3:], "false"
        elif not equals:
            value = left.pop(0) if left and not left[0].startswith("--") else "true"
        found[name] = value
    return found, words
