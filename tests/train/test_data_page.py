"""The rows of docs/data.md become what the page shows."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from trimtab.train.data import prepare

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```jsonl\n(.*?)^```\n(?:```text\n(.*?)^```)?", PAGE, re.MULTILINE | re.DOTALL)
CALLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(("lines", "shown"), BLOCKS, ids=[lines[:40] for lines, _ in BLOCKS])
def test_each_row_becomes_what_the_page_shows(lines, shown, tokenizer_factory) -> None:
    tokenizer = tokenizer_factory(*([CALLS] if "tool_calls" in lines else []))
    for line in lines.splitlines():
        report = prepare([json.loads(line)], tokenizer).report
        assert report.used == 1
        assert report.notes == {}
        assert not shown or report.example == shown.rstrip("\n")


def test_the_page_shows_every_kind() -> None:
    from trimtab.train.kinds import WHOLE, kind_of

    kinds = {kind_of(json.loads(line)) for lines, _ in BLOCKS for line in lines.splitlines()}
    assert set(WHOLE.values()) | {"prompt and completion", "instruction and output"} <= kinds
