"""Packages that trimtab does without until something needs them, and the error that says what to install."""

from __future__ import annotations

from importlib.util import find_spec

from trimtab.errors import MissingPackageError

EXTRAS = {
    "accelerate": "demo",
    "datasets": "data",
    "gguf": "demo",
    "matplotlib": "demo",
    "pyarrow": "data",
    "scikit-learn": "adamss",
    "trl": "trl",
}  # a package: the extra that brings it

MODULES = {"scikit-learn": "sklearn"}  # a package: its module, where the names differ


def need(what: str, *packages: str) -> None:
    """Raise unless all these packages are installed.

    Args:
        what: what needs them, as a sentence begins: "A loss plot".

    Raises:
        MissingPackageError: it names all that are missing and the command that installs them.
    """
    missing = [package for package in packages if find_spec(MODULES.get(package, package)) is None]
    if missing:
        extras = ",".join(sorted({EXTRAS[package] for package in missing}))
        listed = " and ".join(missing)
        raise MissingPackageError(f"{what} needs {listed}, not installed here: pip install 'trimtab[{extras}]'")
