"""Writes a benchmark's table into docs/benchmarks.md, between the markers of its section."""

from __future__ import annotations

import datetime
import platform
import re
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"


def machine() -> str:
    """A line that says what was measured on."""
    import torch

    model = next(
        (x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")),
        platform.processor(),
    )
    return f"{model}, {torch.get_num_threads()} threads, torch {torch.__version__}, {datetime.date.today()}"


def table(head: list[str], rows: list[list[object]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(c) for c in line) + " |" for line in lines)


def write(section: str, title: str, text: str) -> None:
    """Put `text` under `title` in the page, in place of what the section held."""
    script = f"bench/{section.partition('-')[0]}.py"
    block = f"<!-- {section} -->\n## {title}\n\n{text}\n\n`{script}`; {machine()}.\n<!-- /{section} -->"
    page = (
        PAGE.read_text(encoding="utf-8") if PAGE.exists() else "# Benchmarks\n\nEach table is written by its script.\n"
    )
    pattern = re.compile(rf"<!-- {section} -->.*?<!-- /{section} -->", re.DOTALL)
    page = pattern.sub(lambda _: block, page) if pattern.search(page) else f"{page.rstrip()}\n\n{block}\n"
    PAGE.write_text(page, encoding="utf-8")
    print(f"\n{title}\n\n{text}\n")
