"""The tables of `trimtab.as_peft`, without that it takes the name of peft, which is the installed one's here."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import trimtab

PACKAGE = "trimtab.as_peft"

if PACKAGE not in sys.modules:
    package = ModuleType(PACKAGE)
    package.__path__ = [str(Path(trimtab.__file__).parent / "as_peft")]
    sys.modules[PACKAGE] = package

find = import_module(f"{PACKAGE}.names").find
