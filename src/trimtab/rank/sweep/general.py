"""Plain text of many kinds, written for this purpose: how much worse a model becomes on it is what it has forgotten.

About a thousand tokens: enough to see forgetting, and little beside the held-out rows. Losses on it compare models with
each other; they say nothing of a model alone.
"""

from __future__ import annotations

from pathlib import Path


def texts() -> list[str]:
    """The paragraphs, each a text of its own."""
    return Path(__file__).with_name("general.txt").read_text(encoding="utf-8").strip().split("\n\n")
