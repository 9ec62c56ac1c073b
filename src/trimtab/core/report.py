"""Warnings that point at the caller's line, not at ours."""

from __future__ import annotations

import sys
import warnings

from trimtab.errors import PeftWarning


def warn(message: str, category: type[Warning] = PeftWarning) -> None:
    """Warn at the first frame outside trimtab."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__", "")).startswith("trimtab."):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
