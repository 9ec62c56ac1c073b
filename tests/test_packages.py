"""What src/ imports is declared: as a dependency, or as an extra that an error of ours names where it is missing."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import trimtab
from trimtab.core.extras import EXTRAS, need
from trimtab.errors import MissingPackageError, PeftError

SOURCE = Path(trimtab.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NAMES = {"sklearn": "scikit-learn", "yaml": "pyyaml"}  # a module: its package, where the names differ
# Imported only when an object of theirs is already in the model: then they are there.
THEIRS = {"bitsandbytes", "deepspeed", "torchao"}
BEHIND = {"jinja2": "transformers needs it for chat templates and does not declare it"}


def declared(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w.-]+", r)[0].lower() for r in requirements}


DEPENDENCIES = declared(PROJECT["dependencies"])
OPTIONAL = {name: declared(r) for name, r in PROJECT["optional-dependencies"].items() if name != "test"}


def third_party(node: ast.AST) -> list[str]:
    """The packages outside trimtab and Python that a statement or an `import_module("...")` names."""
    modules: list[str] = []
    if isinstance(node, ast.Import):
        modules = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and not node.level:
        modules = [node.module or ""]
    elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
        modules = [a.value for a in node.args[:1] if isinstance(a, ast.Constant)]
    tops = (module.partition(".")[0] for module in modules)
    return [NAMES.get(top, top) for top in tops if top != "trimtab" and top not in sys.stdlib_module_names]


def imports(path: Path) -> Iterator[tuple[str, int, ast.AST]]:
    """(package, line, the innermost function or the file around it) of every import of another package."""

    def visit(node: ast.AST, around: ast.AST) -> Iterator[tuple[str, int, ast.AST]]:
        for child in ast.iter_child_nodes(node):
            yield from ((package, child.lineno, around) for package in third_party(child))
            inner = child if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) else around
            yield from visit(child, inner)

    tree = ast.parse(path.read_text(encoding="utf-8"))
    yield from visit(tree, tree)


def asked_for(around: ast.AST, line: int) -> set[str]:
    """The packages that `need("...", ...)` has asked for above a line of a function."""
    calls = [n for n in ast.walk(around) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "need"]
    return {a.value for c in calls if c.lineno < line for a in c.args[1:] if isinstance(a, ast.Constant)}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_every_import_is_declared(path: Path) -> None:
    for package, line, around in imports(path):
        where = f"{path}:{line} imports {package}"
        if package in EXTRAS:
            assert package in asked_for(around, line), f"{where} without a need(...) above it that names it"
        elif package in THEIRS:
            assert not isinstance(around, ast.Module), f"{where}, which only a quantised model has, with the file"
        else:
            assert package in DEPENDENCIES, f"{where}, which pyproject.toml does not declare"


def test_every_declared_package_is_used() -> None:
    used = {package for path in FILES for package, _, _ in imports(path)}
    assert used >= DEPENDENCIES - set(BEHIND)
    assert not used & set(BEHIND)


def test_the_extras_are_those_of_the_project() -> None:
    assert set(EXTRAS.values()) == set(OPTIONAL)
    for extra, packages in OPTIONAL.items():
        assert {p for p, e in EXTRAS.items() if e == extra} == packages


def test_the_test_sees_imports() -> None:
    code = (
        "import yaml\ndef f():\n    need('It', 'gguf')\n    from gguf import x\n    import_module('b.c')\nimport os\n"
    )
    tree = ast.parse(code)
    assert [p for n in ast.walk(tree) for p in third_party(n)] == ["pyyaml", "gguf", "b"]
    assert asked_for(tree.body[1], 4) == {"gguf"}
    assert not asked_for(tree.body[1], 3)


def test_need_names_all_that_is_missing_and_the_extra(monkeypatch) -> None:
    need("It", *EXTRAS)  # all are here
    for package in ("gguf", "accelerate"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        MissingPackageError, match=r"^A file needs gguf and accelerate, .*pip install 'trimtab\[demo\]'$"
    ):
        need("A file", "gguf", "accelerate", "matplotlib")
    assert issubclass(MissingPackageError, PeftError)
    assert issubclass(MissingPackageError, ImportError)


@pytest.mark.parametrize("package", sorted(OPTIONAL["demo"]))
def test_the_command_says_what_to_install_before_it_does_anything(package: str, tmp_path) -> None:
    (tmp_path / "any.gguf").write_bytes(b"GGUF")
    code = (
        f"import sys; sys.modules[{package!r}] = None; sys.argv = ['trimtab', 'demo', '--model', 'any.gguf']\n"
        "from trimtab.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stdout == ""
    assert re.fullmatch(rf"trimtab: .* needs {package}, .*pip install 'trimtab\[demo\]'\n", done.stderr), done.stderr
