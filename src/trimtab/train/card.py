"""The part of an adapter's README.md that tells of its training, written into the card that is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.files.card import NAME

BEGIN, END = "<!-- training: written by trimtab -->", "<!-- end of training -->"

SECTION = """{begin}
## Training

{facts}

{scores}
The whole configuration, with the versions of everything, is in `trimtab.json`.
{end}
"""


def write_card(folder: Path, facts: Mapping[str, str], scores: Sequence[tuple[int, Mapping[str, float]]]) -> None:
    """Put the run's section into `folder/README.md`, in place of an earlier one.

    Args:
        facts: what is listed: {"Base model": ..., "Rows": ...}.
        scores: (step, scores) of each evaluation; the first and the last, or the best, are shown.
    """
    path = folder / NAME
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    head, _, rest = text.partition(BEGIN)
    tail = rest.partition(END)[2]
    listed = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    section = SECTION.format(begin=BEGIN, end=END, facts=listed, scores=_table(scores))
    path.write_text(f"{head.rstrip()}\n\n{section}{tail.lstrip()}", encoding="utf-8")


def _table(scores: Sequence[tuple[int, Mapping[str, float]]]) -> str:
    if not scores:
        return ""
    shown: list[tuple[int, Mapping[str, Any]]] = [scores[0], *([scores[-1]] if len(scores) > 1 else [])]
    names = list(shown[0][1])
    lines = ["| held-out rows | " + " | ".join(f"step {step}" for step, _ in shown) + " |"]
    lines += ["|---" * (len(shown) + 1) + "|"]
    lines += [
        f"| {name.replace('_', ' ')} | " + " | ".join(f"{s[name]:.4f}" for _, s in shown) + " |" for name in names
    ]
    return "\n".join(lines) + "\n"
