"""The import system's side: `peft` and its modules, and the metadata of a distribution of that name."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import Any

from trimtab.as_peft.names import find, is_module, is_package, names_of
from trimtab.core.config import FORMAT_VERSION

DIFFERENCES = "docs/differences-names.txt"


class AliasModule(ModuleType):
    """One of peft's modules: names are looked up in the tables when they are first used."""

    __trimtab__ = True

    def __getattr__(self, name: str) -> Any:
        path = self.__name__
        if name == "__all__":
            return names_of(path)
        if not name.startswith("__"):
            try:
                value = find(path, name)
            except KeyError:
                if not is_module(f"{path}.{name}"):
                    raise AttributeError(
                        f"module '{path}' has no attribute '{name}': trimtab, which stands in for peft here, lacks "
                        f"it (see {DIFFERENCES})"
                    ) from None
                value = importlib.import_module(f"{path}.{name}")
            self.__dict__[name] = value
            return value
        raise AttributeError(name)

    def __dir__(self) -> list[str]:
        return sorted({*self.__dict__, *names_of(self.__name__)})


class AliasLoader(Loader):
    """Makes the modules."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """An empty module."""
        return AliasModule(spec.name, "trimtab in the place of Hugging Face PEFT.")

    def exec_module(self, module: ModuleType) -> None:
        """Give it what every module has."""
        module.__file__ = str(Path(__file__).with_name("__init__.py"))
        if module.__name__ == "peft":
            module.__version__ = FORMAT_VERSION  # type: ignore[attr-defined]


class AliasDistribution(Distribution):
    """The metadata that libraries read a version from."""

    def read_text(self, filename: str) -> str | None:
        """A metadata file."""
        files = {
            "METADATA": f"Metadata-Version: 2.1\nName: peft\nVersion: {FORMAT_VERSION}\nSummary: answered by trimtab\n",
            "top_level.txt": "peft\n",
        }
        return files.get(filename)

    def locate_file(self, path: str | PathLike[str]) -> Any:
        """Where a file of the distribution would be."""
        return Path(__file__).parent / path


class AliasFinder(MetaPathFinder):
    """Answers for `peft` before any folder is searched."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of one of peft's modules.

        Raises:
            ModuleNotFoundError: a module of peft's that trimtab has nothing for; the real one is never looked up.
        """
        if fullname.partition(".")[0] != "peft":
            return None
        if not is_module(fullname):
            raise ModuleNotFoundError(
                f"No module named '{fullname}': trimtab, which stands in for peft here, lacks it (see {DIFFERENCES})",
                name=fullname,
            )
        spec = ModuleSpec(fullname, AliasLoader(), origin="trimtab.as_peft", is_package=is_package(fullname))
        if spec.submodule_search_locations is not None:  # scripts look there for a commit; modules are found here first
            spec.submodule_search_locations.append(str(Path(__file__).parent))
        return spec

    def find_distributions(self, context: Any = None) -> Iterable[Distribution]:
        """The distribution `peft`, where it or any is asked for."""
        name = getattr(context, "name", None)
        return [AliasDistribution()] if name is None or name.lower() == "peft" else []

    def invalidate_caches(self) -> None:
        """Nothing is cached."""


def install() -> None:
    """Put the finder in front of all others, once."""
    if not any(isinstance(finder, AliasFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, AliasFinder())
