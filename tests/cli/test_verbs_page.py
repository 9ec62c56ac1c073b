"""docs/verbs.md from top to bottom: its Python, and every command, which ends as the page says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from typer.testing import CliRunner

from trimtab.cli import app

PAGE = Path(__file__).resolve().parents[2] / "docs" / "verbs.md"
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def test_every_block_of_the_page(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    verbs = set()
    for kind, block in BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        if kind == "python":
            exec(compile(block, str(PAGE), "exec"), names)
            continue
        for line in block.splitlines():
            command, _, remark = line.partition("  # ")
            program, verb, *args = shlex.split(command)
            assert program == "trimtab"
            verbs.add(verb)
            result = CliRunner().invoke(app, [verb, *args])
            assert result.exit_code == (1 if remark == "ends with 1" else 0), (
                line + result.output + repr(result.exception)
            )
    assert verbs == {"eval", "generate", "compare", "merge", "fuse", "combine", "inspect", "diff", "check"}
