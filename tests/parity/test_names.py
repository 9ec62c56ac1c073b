"""Every public name of the installed peft's modules is answered by `trimtab.as_peft`, or stands on a list.

The list may only shrink.

`python tests/parity/test_names.py` takes off the list what is answered by now; it never puts anything on it.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

from trimtab.methods import METHODS

ROOT = Path(__file__).resolve().parents[2]
LIST = ROOT / "docs" / "differences-names.txt"

# Run with the alias, in a process of its own: which of these names are not answered?
STAR = """
import trimtab.as_peft, json, sys
lacking = {}
for path, names in json.load(sys.stdin).items():
    found = {}
    try:
        exec(f"from {path} import *", found)
    except ModuleNotFoundError:  # a module that is on the list
        pass
    lacking[path] = sorted({*names} - found.keys())
print(json.dumps(lacking))
"""
ASK = """
import trimtab.as_peft, importlib, json, sys
missing = {}

def has(module, name):
    try:
        return hasattr(module, name)
    except ImportError:  # a method whose file is not there yet
        return False

for path, names in json.load(sys.stdin).items():
    try:
        module = importlib.import_module(path)
        lacking = [n for n in names if not has(module, n)]
    except ImportError:
        lacking = names
    if lacking:
        missing[path] = lacking
print(json.dumps(missing))
"""


@cache
def public_names() -> dict[str, list[str]]:
    """`names_here`, in a process where no other test has put anything in the place of packages that peft imports."""
    code = "import json\nfrom tests.parity.test_names import names_here\nprint(json.dumps(names_here()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def names_here() -> dict[str, list[str]]:
    """{module of the real peft: its public names}, without what it imports from other packages."""
    import peft

    names: dict[str, list[str]] = {}
    for path in ["peft", *(m.name for m in pkgutil.walk_packages(peft.__path__, "peft."))]:
        try:
            module = importlib.import_module(path)
        except ImportError:  # needs a package that is not installed
            continue
        own = [name for name in dir(module) if not name.startswith("_") and belongs(getattr(module, name))]
        if own:
            names[path] = own
    return names


def belongs(value: object) -> bool:
    """Whether an object is peft's own; plain values have no home, and are taken as its constants."""
    home = getattr(value, "__module__", None)
    return not isinstance(value, ModuleType) and (not isinstance(home, str) or home.partition(".")[0] == "peft")


@cache
def missing_names() -> dict[str, list[str]]:
    """{module: names that are not answered}."""
    return asked(ASK, public_names())


def asked(code: str, names: dict[str, list[str]]) -> dict[str, list[str]]:
    done = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(names), capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def listed() -> dict[str, list[str]]:
    """The list: a module, a colon, its names; a star stands for all it has."""
    rows = (line.split(":") for line in LIST.read_text().splitlines() if line and not line.startswith("#"))
    everything = public_names()
    return {path: everything[path] if names.strip() == "*" else names.split() for path, names in rows}


def pairs(names: dict[str, list[str]]) -> set[tuple[str, str]]:
    return {(path, name) for path, some in names.items() for name in some}


def test_every_public_name_is_answered_or_listed():
    names, missing = public_names(), missing_names()
    assert len(pairs(names)) > 2000
    assert sorted(pairs(missing) - pairs(listed())) == []


def test_a_star_brings_what_it_brings_from_peft():
    modules = {path: importlib.import_module(path) for path in public_names()}
    stars = {
        path: [name for name in module.__all__ if not name.startswith("_")]
        for path, module in modules.items()
        if hasattr(module, "__all__")
    }
    assert len(stars) > 20
    lacking = asked(STAR, stars)
    assert sorted(pairs(lacking) - pairs(listed())) == []


def test_the_types_are_those_of_the_installed_peft():
    """And the few methods that it does not have."""
    import peft

    import trimtab

    beyond = {"BITFIT", "BOTTLENECK", "DYLORA", "LOREFT"}
    ours, theirs = ({t.value for t in library.PeftType} for library in (trimtab, peft))
    assert ours == theirs | beyond
    assert ours == set(METHODS)
    assert beyond.isdisjoint(theirs)


def test_the_list_has_nothing_that_is_answered():
    stale = sorted(pairs(listed()) - pairs(missing_names()))
    assert stale == [], "run `python tests/parity/test_names.py` with the parity environment to take these off the list"


def write(names: set[tuple[str, str]]) -> None:
    head = "".join(line + "\n" for line in LIST.read_text().splitlines() if line.startswith("#"))
    paths = sorted({path for path, _ in names})
    everything = public_names()
    rows = {path: sorted(name for other, name in names if other == path) for path in paths}
    lines = [f"{path}: {'*' if some == sorted(everything[path]) else ' '.join(some)}\n" for path, some in rows.items()]
    LIST.write_text(head + "".join(lines))


if __name__ == "__main__":
    write(pairs(missing_names()) & pairs(listed()))
