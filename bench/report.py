"""Writes a benchmark's table into docs/benchmarks.md, between the markers of its section.

A section belongs to a table and a kind of processor: what one processor measured is not written over by another.
"""

from __future__ import annotations

import datetime
import platform
import re
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"


FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")  # what decides how products are formed


def processor() -> tuple[str, list[str]]:
    """The processor's name and which of FLAGS it has."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    said = {key: next((x.split(":")[1] for x in lines if x.startswith(key)), "") for key in ("model name", "flags")}
    has = set(said["flags"].split())
    return said["model name"].strip() or platform.processor(), [flag for flag in FLAGS if flag in has]


def machine() -> str:
    """A line that says what was measured on."""
    import torch

    name, flags = processor()
    threads = f"{torch.get_num_threads()} threads, torch {torch.__version__}, {datetime.date.today()}"
    return f"{name} ({', '.join(flags)}), {threads}"


def short_name() -> str:
    """The processor's maker and family, as the page's sections name it: amd-epyc, amd-epyc-avx2 without AVX-512."""
    name, flags = processor()
    words = re.sub(r"\(.*?\)", "", name).lower().split()
    return "-".join([*words[:2], *(["avx2"] if "avx512f" not in flags else [])])


def table(head: list[str], rows: list[list[object]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(c) for c in line) + " |" for line in lines)


def write(section: str, title: str, text: str) -> None:
    """Put `text` under `title` in the page, in place of what the section held."""
    script = f"bench/{section.partition('-')[0]}.py"
    section = f"{section} {short_name()}"
    block = f"<!-- {section} -->\n## {title}\n\n{text}\n\n`{script}`; {machine()}.\n<!-- /{section} -->"
    page = (
        PAGE.read_text(encoding="utf-8") if PAGE.exists() else "# Benchmarks\n\nEach table is written by its script.\n"
    )
    pattern = re.compile(rf"<!-- {section} -->.*?<!-- /{section} -->", re.DOTALL)
    page = pattern.sub(lambda _: block, page) if pattern.search(page) else f"{page.rstrip()}\n\n{block}\n"
    PAGE.write_text(page, encoding="utf-8")
    print(f"\n{title}\n\n{text}\n")
