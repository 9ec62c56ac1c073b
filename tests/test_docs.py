"""Every block in the documents runs: Python, and some pages' commands; one page shares its names and its folder."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from trimtab.cli import app

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
EITHER = re.compile(r"^```(python|sh)\n(.*?)^```", re.MULTILINE | re.DOTALL)
WITH_COMMANDS = {"train.md"}  # whose shell blocks are run, too: they hold nothing but `trimtab` lines
WITH_CODE = [p for p in PAGES if BLOCK.search(p.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda p: p.name)
def test_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for language, block in EITHER.findall(page.read_text(encoding="utf-8")):
        if language == "python":
            exec(compile(block, str(page), "exec"), names)
        elif page.name in WITH_COMMANDS:
            for line in block.splitlines():
                done = CliRunner().invoke(app, shlex.split(line.removeprefix("trimtab ")))
                assert done.exit_code == 0, f"{line}\n{done.output}{done.exception!r}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_the_session_in_the_readme_fits_in_twenty_lines():
    block = BLOCK.search((ROOT / "README.md").read_text(encoding="utf-8")).group(1)
    assert len([line for line in block.splitlines() if line.strip()]) <= 20


SOURCES = [
    p
    for folder in ("src", "docs", "tests", "bench")
    for p in sorted((ROOT / folder).rglob("*"))
    if p.suffix in (".py", ".md")
]
DATED = re.compile(r"\b((?:19|20)\d\d)[\],(\s]*https://arxiv\.org/abs/(\d\d)\d\d\.\d{4,5}\b")


def test_a_citation_has_the_year_of_its_arxiv_number():
    """A wrong number, or a wrong paper under a right one, mostly shows in its year."""
    dated = [(p.name, *found) for p in SOURCES for found in DATED.findall(p.read_text(encoding="utf-8"))]
    assert len(dated) > 100  # most come twice, in a method's file and in the table of methods
    assert not [row for row in dated if row[1] != f"20{row[2]}"]
