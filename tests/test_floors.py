"""The house's rules, read off the source: floors, one file a method, hooks abstract or final, shapes in comments."""

from __future__ import annotations

import ast
import inspect
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import trimtab
from tests.contract.cases import CASES, Case, toy
from tests.models import SITES
from trimtab import get_peft_model
from trimtab.core import families
from trimtab.core.method import Method
from trimtab.core.model_method import Mixture, ModelMethod, PromptMethod
from trimtab.methods import METHODS, load

ROOT = Path(trimtab.__file__).parent
FILES = sorted(p.relative_to(ROOT) for p in ROOT.rglob("*.py"))

FLOORS = {
    "errors": 0,
    "formats": 1,
    "core": 2,
    "methods": 3, "init": 3,
    "files": 4,
    "layer": 5,
    "graft": 6,
    "shell": 7,
    "rank": 8, "train": 8, "serve": 8, "export": 8,
    "cli": 9, "as_peft": 9,
}  # fmt: skip
EXEMPT = {"__init__.py", "__main__.py"}  # the public names, imported lazily
# Beside each other on a floor: what a package may import of its own floor.
NEIGHBOURS = {"methods": {"init"}, "rank": {"train"}, "as_peft": set(), "cli": set()}


def tree(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """(module, line) of every import in a file, also those inside functions and by `import_module("...")`."""
    package = ["trimtab", *path.parent.parts]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            yield module, node.lineno
            if module == "trimtab":
                yield from ((f"trimtab.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == "import_module":
            first = node.args[0]
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield first.value, node.lineno


def package_of(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", [p for p in FILES if str(p) not in EXEMPT], ids=str)
def test_a_floor_imports_only_from_the_floors_below(path: Path) -> None:
    here = package_of(path)
    assert here in FLOORS, f"{path} stands on no floor: say which in FLOORS"
    for module, line in imports(path):
        if not module.startswith("trimtab."):
            assert module != "trimtab" or FLOORS[here] >= FLOORS["train"], f"{path}:{line} imports the public names"
            continue
        there = module.split(".")[1]
        if there not in FLOORS:
            assert FLOORS[here] >= FLOORS["train"], f"{path}:{line} imports a public name, '{module}'"
            continue
        fine = there == here or FLOORS[there] < FLOORS[here] or there in NEIGHBOURS.get(here, set())
        assert fine, f"{path}:{line} imports {module} from floor {FLOORS[there]}, and stands on {FLOORS[here]}"


def edges() -> dict[str, set[str]]:
    """File -> the files of trimtab it imports, wherever in it: at the top, inside functions, under TYPE_CHECKING."""
    modules = {".".join(["trimtab", *p.with_suffix("").parts]).removesuffix(".__init__"): p for p in FILES}
    found: dict[str, set[str]] = {}
    for name, path in modules.items():
        wanted = {module for module, _ in imports(path)}
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ImportFrom) and node.module in modules:
                parts = {f"{node.module}.{alias.name}" for alias in node.names}
                if parts <= set(modules):  # `from package import module` needs the module, not the package's names
                    wanted = wanted - {node.module} | parts
        found[name] = {module for module in wanted if module in modules and module not in (name, "trimtab")}
    return found


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """The sets of files that import each other, directly or by way of others."""
    reach = {name: set(there) for name, there in graph.items()}
    for middle in graph:
        for name in graph:
            if middle in reach[name]:
                reach[name] |= reach[middle]
    return [{m for m in reach[n] if n in reach[m]} for n in graph if n in reach[n]]


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})[0] == {"a", "b", "c"}
    assert not circles({"a": {"b", "c"}, "b": {"c"}, "c": set()})
    assert "trimtab.core.method" in edges()["trimtab.layer.adapted"]


def test_no_file_imports_itself_by_way_of_others() -> None:
    """Imports for the type checker alone count: who needs another's name leans on it."""
    assert not circles(edges())


LONGEST_FILE, LONGEST_FUNCTION = 400, 60


@pytest.mark.parametrize("path", FILES, ids=str)
def test_files_and_functions_stay_readable(path: Path) -> None:
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    assert len(lines) <= LONGEST_FILE
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            start = node.body[0].lineno if ast.get_docstring(node) is None else node.body[0].end_lineno or node.lineno
            assert (node.end_lineno or start) - start < LONGEST_FUNCTION, f"{path}:{node.lineno} {node.name}"


def test_every_floor_exists_or_is_planned() -> None:
    assert {package_of(p) for p in FILES if str(p) not in EXEMPT} <= set(FLOORS)
    assert {"formats", "core", "methods", "init", "files", "layer", "graft", "shell"} <= {package_of(p) for p in FILES}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_nothing_imports_peft(path: Path) -> None:
    for module, line in imports(path):
        assert module.split(".")[0] != "peft", f"{path}:{line}"


@pytest.mark.parametrize("path", [p for p in FILES if package_of(p) in ("core", "errors", "formats")], ids=str)
def test_the_ground_floor_knows_no_transformers(path: Path) -> None:
    for module, line in imports(path):
        assert module.split(".")[0] != "transformers", f"{path}:{line}"


def test_nothing_imports_as_peft() -> None:
    for path in FILES:
        if package_of(path) != "as_peft":
            for module, line in imports(path):
                assert not module.startswith("trimtab.as_peft"), f"{path}:{line}"


METHOD_FILES = sorted({file for file, _, _ in METHODS.values()})


@pytest.mark.parametrize("path", [p for p in FILES if package_of(p) == "methods"], ids=str)
def test_no_method_imports_another(path: Path) -> None:
    """But for the fields of its config, where PEFT's file of one method has all those of another."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trimtab.methods."):
            names = [alias.name for alias in node.names]
            assert all(name.endswith("Config") for name in names), f"{path}:{node.lineno} imports {names}"
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}:{node.lineno}: say whole names"
        if isinstance(node, ast.Import):
            assert not [a for a in node.names if a.name.startswith("trimtab.methods")], f"{path}:{node.lineno}"


@pytest.mark.parametrize("path", [p for p in FILES if package_of(p) == "init" and p.name != "__init__.py"], ids=str)
def test_no_start_imports_another(path: Path) -> None:
    for module, line in imports(path):
        assert not module.startswith("trimtab.init"), f"{path}:{line}"


# Where methods are named outside methods/ and init/: the codec's tables, and these, with the reason.
NAMED_BY = {
    Path("files/codec.py"): "PEFT's key names",
    Path("core/config.py"): "PEFT's enumeration of types",
    Path("__init__.py"): "the public names",
}


@pytest.mark.parametrize(
    "path",
    [
        p
        for p in FILES
        if package_of(p) in ("core", "files", "formats", "layer", "graft", "shell") and p not in NAMED_BY
    ],
    ids=str,
)
def test_nothing_else_imports_a_methods_file(path: Path) -> None:
    """The machinery knows methods by the registry only, never a method's own file."""
    for module, line in imports(path):
        parts = module.split(".")
        assert parts[:2] != ["trimtab", "methods"] or len(parts) == 2, f"{path}:{line} imports {module}"


# Where a method's name is a string outside methods/, init/ and the alias, with the reason. It may only shrink.
SAID_BY = {
    Path("core/config.py"): "PEFT's enumeration of types",
    Path("core/extras.py"): "an extra of the package is called after the method that needs it",
    Path("export/rules.py"): "most programs read LoRA and nothing else",
    Path("rank/adapter_file.py"): "ranks are of LoRA's files",
    Path("rank/convert.py"): "what is converted becomes a LoRA",
    Path("rank/suggest.py"): "ranks are of LoRA",
    Path("rank/survey.py"): "ranks are of LoRA's files",
    Path("train/config.py"): "the method that is trained unless told otherwise",
    Path("train/null.py"): "random adapters are LoRA's",
    Path("train/optimizers.py"): "LoRA+, LoRA-FA and the like are of LoRA",
    Path("train/tools/llama_factory.py"): "what another program's files call it",
    Path("train/tools/trl.py"): "what another program's files call it",
}


def names_said(path: Path) -> list[tuple[int, str]]:
    """(line, name) of every method's name in a file: as a string, a variable, an attribute; docstrings do not count."""
    names = {*METHODS, *(t.lower() for t in METHODS), *(m for _, m, _ in METHODS.values())}
    said = []
    for node in ast.walk(tree(path)):
        word = getattr(node, {ast.Constant: "value", ast.Name: "id", ast.Attribute: "attr"}.get(type(node), ""), None)
        if isinstance(word, str) and word in names:
            said.append((node.lineno, word))  # type: ignore[attr-defined]
    return said


@pytest.mark.parametrize("path", [p for p in FILES if package_of(p) not in ("methods", "init", "as_peft")], ids=str)
def test_no_method_is_named_outside_its_file(path: Path) -> None:
    said = names_said(path)
    assert bool(said) == (path in SAID_BY), said
    plain = {"LORA", "lora"} if FLOORS[package_of(path) if str(path) not in EXEMPT else "cli"] >= FLOORS["rank"] else ()
    assert path not in SAID_BY or not plain or {word for _, word in said} <= set(plain), said


LONGEST_MEDIAN = 110  # of the lines of methods' files


def test_a_method_is_a_short_file() -> None:
    files = [p for p in FILES if package_of(p) == "methods" and p.name != "__init__.py"]
    lines = sorted(len((ROOT / p).read_text(encoding="utf-8").splitlines()) for p in files)
    assert len(lines) > len(METHOD_FILES)  # those of variants, too
    assert lines[len(lines) // 2] <= LONGEST_MEDIAN, lines


# ---------------------------------------------------------------------- methods: abstract or final
HOOKS = tuple(
    "share start_shared leaves setup reset weight bias before after through rows mixed extras".split()
    + "build around prompt restore".split()
)


def method_classes() -> list[type]:
    """Every method class: the registry's and their variants."""
    found = []
    for peft_type in METHODS:
        file, method, _ = METHODS[peft_type]
        found.append(load(file, method))
        found += [load(*variant.split(":")) for variant in load(file, "__dict__").get("VARIANTS", {}).values()]
    return found


CLASSES = method_classes()


def kinds() -> set[str]:
    """Every kind of site that a class in core/ stands for."""
    found = set()
    for path in FILES:
        if package_of(path) == "core":
            for node in ast.walk(tree(path)):
                if (
                    isinstance(node, ast.Assign)
                    and getattr(node.targets[0], "id", "") == "kind"
                    and isinstance(node.value, ast.Constant)
                ):
                    found.add(node.value.value)
    return found


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_hooks_are_overridden_at_most_once(cls: type) -> None:
    root = next(r for r in (PromptMethod, Mixture, ModelMethod, Method) if issubclass(cls, r))
    for hook in HOOKS:
        owners = [c.__name__ for c in cls.__mro__ if hook in vars(c) and c is not root and issubclass(c, root)]
        assert len(owners) <= 1, f"`{hook}` is overridden by {owners}"


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_no_hook_calls_super(cls: type) -> None:
    for node in ast.walk(ast.parse(inspect.getsource(cls))):
        assert not (isinstance(node, ast.Call) and getattr(node.func, "id", "") == "super"), (
            f"{cls.__name__}:{node.lineno}"
        )


def test_families_give_helpers_and_no_hooks() -> None:
    given = [c for c in vars(families).values() if isinstance(c, type) and issubclass(c, Method) and c is not Method]
    assert given
    for family in given:
        assert not [hook for hook in HOOKS if hook in vars(family)], family.__name__


@pytest.mark.parametrize("cls", [c for c in CLASSES if not issubclass(c, ModelMethod)], ids=lambda c: c.__name__)
def test_a_method_defines_what_it_promises(cls: Any) -> None:
    overrides = {hook for hook in HOOKS if getattr(cls, hook, None) is not getattr(Method, hook, None)}
    definition = "weight" if cls.around is None else "around"  # a block that is surrounded has no weight
    assert {"leaves", "reset", definition} <= overrides, "the formula by its weight is the definition"
    assert not cls.fused or overrides & {"before", "after", "through"}, "fused, but with no cheap spelling"
    assert cls.kinds <= kinds(), cls.kinds


@pytest.mark.parametrize("file", METHOD_FILES)
def test_a_method_names_its_paper_or_its_idea(file: str) -> None:
    doc = load(file, "__doc__")
    assert "W'" in doc or "arxiv.org" in doc or "https://" in doc


# ---------------------------------------------------------------------- shapes (law 9)
def shapes_said(function: Any) -> list[str]:
    """The shapes in the comments of a function's lines that declare a tensor."""
    said = []
    for line in inspect.getsource(function).splitlines():
        shapes = groups(line.partition("#")[2].strip())
        assert shapes or not re.search(r"\bLeaf\(", line), f"no shape beside: {line.strip()}"
        said += shapes
    return said


def groups(comment: str) -> list[str]:
    """The outermost parentheses of a comment that starts with one: "(r, in) or (1,)" -> "r, in", "1,"."""
    found, depth, start = [], 0, 0
    for i, letter in enumerate(comment if comment.startswith("(") else ""):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if letter == "(" and depth == 1:
            start = i + 1
        elif letter == ")" and depth == 0:
            found.append(comment[start:i])
    return found


def builders(cls: Any) -> list[Any]:
    """The functions that declare a method's tensors: `leaves`, `share`, and the family's helper that it calls."""
    makes = [cls.leaves, cls.share]
    source = inspect.getsource(cls.leaves)
    for family in cls.__mro__[1:]:
        if family is not Method and issubclass(family, Method):
            makes += [getattr(family, n) for n in vars(family) if f"cls.{n}(" in source]
    return makes


def symbols(method: Any) -> dict[str, int]:
    """What the symbols of the comments stand for at a real site."""
    site = method.site
    table = {name: v for name, v in vars(method.options).items() if isinstance(v, int) and not isinstance(v, bool)}
    table |= {name: v for name, v in vars(method).items() if isinstance(v, int) and not isinstance(v, bool)}
    table["tokens"] = len(getattr(method.options, "token_indices", ()))
    table["dim"] = site.fan_out if site.kind == "embedding" else site.fan_in
    table["r"] = getattr(method, "r", getattr(method.options, "init_r", table.get("r", 0)))
    return table | {"out": site.fan_out, "into": site.fan_in}


def agrees(said: str, shape: tuple[int, ...], table: dict[str, int]) -> bool:
    """Whether a comment such as "r, in / 2" says this shape; "..." is any rest, an unknown letter any number."""
    text = re.sub(r"\bin\b", "into", said).replace("·", "*").replace("/", "//")
    parts = [re.sub(r"(\w) \(", r"\1 * (", part).strip() for part in text.split(",") if part.strip()]
    if parts and parts[-1] == "...":
        parts, shape = parts[:-1], shape[: len(parts) - 1]
    if len(parts) != len(shape):
        return False
    return all(
        (part.isidentifier() and part not in table) or eval(part, {}, table) == n for part, n in zip(parts, shape)
    )


def test_the_comments_are_really_read() -> None:
    assert groups("(n, b (b - 1) / 2) or (1,), as it comes") == ["n, b (b - 1) / 2", "1,"]
    assert groups("no shape (r, in)") == []
    assert agrees("r, in", (2, 6), {"r": 2, "into": 6})
    assert not agrees("r, in", (6, 2), {"r": 2, "into": 6})
    assert not agrees("r, in", (2,), {"r": 2, "into": 6})
    assert agrees("n, b (b - 1) / 2", (3, 6), {"b": 4})
    assert not agrees("n, b (b - 1) / 2", (3, 5), {"b": 4})
    assert agrees("out,", (7,), {"out": 7})


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_tensors_have_the_shapes_their_comments_say(case: Case) -> None:
    model = get_peft_model(toy(), case.config())
    looked = 0
    for name in SITES:
        layer = model.graft.layers.get(name)
        for method in layer.methods["default"] if layer is not None else ():
            table = symbols(method)
            said = [shape for make in builders(type(method)) for shape in shapes_said(make)]
            for leaf, template in method.templates.items() if method.home is layer else ():
                shape = tuple(method.tensor(leaf).shape)
                assert shape == method.declared[leaf].shape
                matrix = (shape[0], math.prod(shape[1:])) if len(shape) > 2 else shape
                fits = [s for s in said if agrees(s, shape, table) or agrees(s, matrix, table)]
                assert fits, f"{type(method).__name__} at {name}: '{template}' is {shape}, the comments say {said}"
                looked += 1
    assert looked


def test_every_layer_method_is_looked_at() -> None:
    seen = {case.method for case in CASES}
    seen.add(load("arrow", "Arrow"))  # does nothing by itself: it has tests of its own
    assert {c for c in CLASSES if "model" not in c.kinds and c.around is None} <= seen
