"""Other tools' settings, one table a tool."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trimtab.train.tools.axolotl import AXOLOTL
from trimtab.train.tools.llama_factory import LLAMA_FACTORY
from trimtab.train.tools.trl import TRL
from trimtab.train.translate import Tool

TOOLS = (AXOLOTL, LLAMA_FACTORY, TRL)


def recognise(content: Mapping[str, Any]) -> Tool | None:
    """The tool a file was written for, or None where it is one of ours."""
    return next((tool for tool in TOOLS if tool.knows(content)), None)
