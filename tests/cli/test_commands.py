"""docs/commands.md is what the commands say of themselves."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from trimtab.cli.help import document
from trimtab.cli.verbs import VERBS, function_of

ROOT = Path(__file__).resolve().parents[2]


def tool():
    spec = importlib.util.spec_from_file_location("make_commands", ROOT / "tools" / "make_commands.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_current_and_has_every_verb() -> None:
    text = tool().page()
    shown = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert shown == text, "run python tools/make_commands.py"
    for name, verb in VERBS.items():
        assert verb.hidden or f"\n## trimtab {name}\n" in text
    assert "| `--config`, `-c` | PATH |" in text
    assert text.count("`--learning-rate` |") == 1, "the options of train stand there only"


def test_a_verbs_line_is_the_first_of_its_docstring() -> None:
    for name, verb in VERBS.items():
        assert verb.hidden or verb.line == document(function_of(name))[0], name
