"""Write docs/commands.md: every verb of `trimtab` with its options, read off the commands themselves.

python tools/make_commands.py          # writes the page
python tools/make_commands.py --check  # fails if it is not current
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trimtab.cli.help import document, options_of
from trimtab.cli.verbs import VERBS, function_of
from trimtab.train.config import FIELDS, SHOWN

PAGE = Path(__file__).resolve().parent.parent / "docs" / "commands.md"
HEAD = """# Commands

Written by `tools/make_commands.py` from the commands themselves; `trimtab VERB --help` says the same.

"""


def page() -> str:
    """The whole page."""
    table = "| verb | what it does |\n|---|---|\n"
    shown = {name: verb for name, verb in VERBS.items() if not verb.hidden}
    for name, verb in shown.items():
        table += f"| [{name}](#trimtab-{name.replace(' ', '-')}) | {cell(verb.line)} |\n"
    return HEAD + table + "".join(section(name, function_of(name)) for name in shown)


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
    options = list(options_of(function))
    train = FIELDS.keys() <= {option.parameter for option in options}
    shared = {*FIELDS, *SHOWN} if train and function.__name__ != "train" else ()
    for option in options:
        if option.parameter not in shared:
            names = ", ".join(f"`{n}`" for n in option.names)
            note = cell(option.text) + (f" (`{option.default}`)" if option.default else "")
            found.setdefault(option.panel, []).append(f"| {names} | {cell(option.value)} | {note} |\n")
    return found


def cell(text: str) -> str:
    """Text as it may stand in a table."""
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    text = page()
    if "--check" not in sys.argv:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
        sys.exit("docs/commands.md is not current: run python tools/make_commands.py")
