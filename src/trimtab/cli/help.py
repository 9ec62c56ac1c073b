"""What --help shows of a verb, read off its function: the command itself is not built for it, and no other verb seen.

`tools/make_commands.py` writes docs/commands.md from the same facts.
"""

from __future__ import annotations

import inspect
import os
import sys
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from typer.models import ArgumentInfo, OptionInfo

from trimtab.cli.verbs import GROUPS, VERBS, function_of, members

if TYPE_CHECKING:
    from rich.panel import Panel

Row = tuple[str, str, str, str]  # names, value, text, a note on it
VERSION: Row = ("--version", "", "Show it.", "")
HELP: Row = ("--help", "", "Show this message and exit.", "")
METAVAR = "[RUN.yaml | ROWS] [OPTIONS]"  # of verbs that take the settings of a run


class Option(NamedTuple):
    """An option or argument, as it is shown."""

    parameter: str
    panel: str
    names: list[str]
    value: str  # what stands for its value; "" for a switch
    text: str
    default: str  # where there is one worth showing that the text does not name
    required: bool


def document(function: Callable[..., Any]) -> tuple[str, list[str], str]:
    """(first line, paragraphs, example) of a command's docstring."""
    text = inspect.cleandoc(function.__doc__ or "")
    body, _, example = text.partition("Example:")
    first, *paragraphs = [" ".join(part.split()) for part in body.strip().split("\n\n")]
    return first, paragraphs, inspect.cleandoc(example)


def options_of(function: Callable[..., Any]) -> Iterator[Option]:
    """The options and arguments of a command that are not hidden."""
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        kind, *more = typing.get_args(parameter.annotation) or (parameter.annotation,)
        info = next((m for m in more if isinstance(m, OptionInfo | ArgumentInfo)), None)
        if info is None or info.hidden:
            continue
        argument = isinstance(info, ArgumentInfo)
        first = (info.default,) if isinstance(info.default, str) and info.default.startswith("-") else ()
        usual = parameter.name.upper() if argument else f"--{parameter.name.replace('_', '-')}"
        yield Option(
            parameter=parameter.name,
            panel=info.rich_help_panel or ("arguments" if argument else "options"),
            names=[*first, *(info.param_decls or ())] or [usual],
            value="" if argument or bool in (kind, *typing.get_args(kind)) else info.metavar or _called(kind),
            text=" ".join((info.help or "").split()),
            default=_default(parameter.default, info),
            required=parameter.default is parameter.empty,
        )


def _called(kind: Any) -> str:
    """What stands for an option's value."""
    names = {str: "TEXT", int: "INT", float: "NUMBER", Path: "PATH"}
    return next((names[k] for k in (kind, *typing.get_args(kind)) if k in names), "TEXT")


def _default(value: Any, info: OptionInfo | ArgumentInfo) -> str:
    hidden = value in (None, False, "", inspect.Parameter.empty) or not info.show_default
    return "" if hidden or "default" in (info.help or "").lower() else str(value)


def show(name: str) -> None:
    """Print the help of a verb or group."""
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 100
    console = Console(width=width, highlight=False)
    if name in GROUPS:
        usage, paragraphs, panels = _group(name)
    else:
        usage, paragraphs, panels = _verb(name)
    console.print()
    line = Text.assemble((" Usage: ", "yellow"), (f"{' '.join(['trimtab', *name.split()])} {usage}", "bold"))
    console.print(line, soft_wrap=True)
    for i, paragraph in enumerate(paragraphs):
        console.print(Padding(Text(paragraph, "dim" if i else ""), (1, 1, 0, 1)))
    console.print()
    for panel in panels:
        console.print(panel)


def _group(name: str) -> tuple[str, list[str], list[Panel]]:
    """(usage, paragraphs, panels) of a group."""
    options = [*([] if name else [VERSION]), HELP]
    verbs = [(verb, "", line, "") for verb, line in members(name).items()]
    return "COMMAND [OPTIONS]", [GROUPS[name]], [_panel("options", options), _panel("commands", verbs)]


def _verb(name: str) -> tuple[str, list[str], list[Panel]]:
    """(usage, paragraphs, panels) of a verb."""
    function = function_of(name)
    first, paragraphs, example = document(function)
    panels: dict[str, list[Row]] = {"arguments": [], "options": []}
    words = []
    for option in options_of(function):
        if option.panel == "arguments":
            words.append(option.names[0] if option.required else f"[{option.names[0]}]")
        note = " [required]" if option.required else f" [default: {option.default}]" if option.default else ""
        panels.setdefault(option.panel, []).append((", ".join(option.names), option.value, option.text, note))
    panels["options"].append(HELP)
    usage = METAVAR if VERBS[name].run else " ".join(["[OPTIONS]", *words])
    whole = [first, *paragraphs, *([f"Example: {example}"] if example else [])]
    return usage, whole, [_panel(title, rows) for title, rows in panels.items() if rows]


def _panel(title: str, rows: list[Row]) -> Panel:
    """Rows in a frame."""
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="bold cyan")
    table.add_column(style="bold yellow")
    table.add_column(ratio=1)
    for names, value, text, note in rows:
        table.add_row(Text(names), Text(value), Text.assemble(text, (note, "dim")))
    if not any(value for _, value, _, _ in rows):
        del table.columns[1]
    return Panel(table, title=title[0].upper() + title[1:], title_align="left", border_style="dim")
