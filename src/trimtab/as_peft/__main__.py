"""`python -m trimtab.as_peft script.py args...` (or `-m module args...`): run a script with trimtab in peft's place."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import trimtab.as_peft  # noqa: F401  (it answers for peft from here on)


def main() -> None:
    """Run the script or module that the command line names, as Python itself would."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help") or arguments == ["-m"]:
        sys.exit(
            "usage: python -m trimtab.as_peft script.py [args...]\n       python -m trimtab.as_peft -m module [args...]"
        )
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        return
    script = Path(arguments[0])
    if not script.exists():
        sys.exit(f"python -m trimtab.as_peft: can't open '{script}': no such file")
    sys.argv = arguments
    sys.path[0] = str(script.resolve().parent)
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
