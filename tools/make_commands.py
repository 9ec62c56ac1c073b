"""Write docs/commands.md: every verb of `trimtab` with its options, read off the commands themselves.

python tools/make_commands.py          # writes the page
python tools/make_commands.py --check  # fails if it is not current
"""

from __future__ import annotations

import inspect
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from typer.models import ArgumentInfo, OptionInfo

from trimtab.train.config import FIELDS, SHOWN

PAGE = Path(__file__).resolve().parent.parent / "docs" / "commands.md"
HEAD = """# Commands

Written by `tools/make_commands.py` from the commands themselves; `trimtab VERB --help` says the same.

"""


def page() -> str:
    """The whole page."""
    from trimtab.cli import app

    verbs = commands(app)
    table = "| verb | what it does |\n|---|---|\n"
    for name, verb in verbs.items():
        table += f"| [{name}](#trimtab-{name.replace(' ', '-')}) | {cell(document(verb)[0])} |\n"
    return HEAD + table + "".join(section(name, verb) for name, verb in verbs.items())


def commands(app: Any, before: str = "") -> dict[str, Callable[..., Any]]:
    """{what is typed: the function} of every command that is not hidden, those of groups included."""
    shown = [info for info in app.registered_commands if not info.hidden]
    found = {before + (info.name or info.callback.__name__): info.callback for info in shown}
    for group in app.registered_groups:
        found |= commands(group.typer_instance, f"{before}{group.typer_instance.info.name} ")
    return found


def document(function: Callable[..., Any]) -> tuple[str, list[str], str]:
    """(first line, paragraphs, example) of a command's docstring."""
    text = inspect.cleandoc(function.__doc__ or "")
    body, _, example = text.partition("Example:")
    first, *paragraphs = [" ".join(part.split()) for part in body.strip().split("\n\n")]
    return first, paragraphs, inspect.cleandoc(example)


def section(name: str, function: Callable[..., Any]) -> str:
    """One verb."""
    first, paragraphs, example = document(function)
    blocks = [f"\n## trimtab {name}\n", *[f"{p}\n" for p in (first, *paragraphs) if p]]
    if example:
        blocks.append(f"```\n{example}\n```\n")
    blocks += [f"| {panel} | | |\n|---|---|---|\n" + "".join(rows) for panel, rows in panels(function).items()]
    return "\n".join(blocks)


def panels(function: Callable[..., Any]) -> dict[str, list[str]]:
    """{section: the rows of its table}."""
    found: dict[str, list[str]] = {}
    parameters = inspect.signature(function, eval_str=True).parameters
    shared = {*FIELDS, *SHOWN} if function.__name__ != "train" and FIELDS.keys() <= parameters.keys() else ()
    for parameter in parameters.values():
        kind, *more = typing.get_args(parameter.annotation) or (parameter.annotation,)
        info = next((m for m in more if isinstance(m, OptionInfo | ArgumentInfo)), None)
        if info is None or info.hidden or parameter.name in shared:
            continue
        argument = isinstance(info, ArgumentInfo)
        first = (info.default,) if isinstance(info.default, str) and info.default.startswith("-") else ()
        usual = parameter.name.upper() if argument else f"--{parameter.name.replace('_', '-')}"
        names = [*first, *(info.param_decls or ())] or [usual]
        panel = info.rich_help_panel or ("arguments" if argument else "options")
        value = "" if argument or bool in (kind, *typing.get_args(kind)) else info.metavar or called(kind)
        note = cell(info.help or "") + default(parameter.default, info)
        row = f"| {', '.join(f'`{n}`' for n in names)} | {cell(value)} | {note} |\n"
        found.setdefault(panel, []).append(row)
    return found


def called(kind: Any) -> str:
    """What stands for an option's value."""
    names = {str: "TEXT", int: "INT", float: "NUMBER", Path: "PATH"}
    return next((names[k] for k in (kind, *typing.get_args(kind)) if k in names), "TEXT")


def default(value: Any, info: OptionInfo | ArgumentInfo) -> str:
    """The default, where there is one worth showing that the help does not name."""
    hidden = value in (None, False, "", inspect.Parameter.empty) or not info.show_default
    return "" if hidden or "default" in (info.help or "").lower() else f" (`{value}`)"


def cell(text: str) -> str:
    """Text as it may stand in a table."""
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    text = page()
    if "--check" not in sys.argv:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
        sys.exit("docs/commands.md is not current: run python tools/make_commands.py")
