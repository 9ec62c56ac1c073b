"""What other libraries have already concluded about `peft`: clear what they cache, refuse what they have frozen."""

from __future__ import annotations

import ast
import importlib.util
import sys
from types import ModuleType

from trimtab.errors import PeftError

WAY_OUT = "Make `import trimtab.as_peft` the first import of the program, or run `python -m trimtab.as_peft script.py`."
LIBRARIES = ("transformers", "accelerate", "diffusers", "trl", "sentence_transformers", "optimum")


class TooLateError(PeftError, ImportError):
    """`import trimtab.as_peft` came after something that already knows another answer for `peft`."""


def refuse_if_too_late() -> None:
    """Raise when the real peft is imported, or a library has already decided that there is none.

    Raises:
        TooLateError: it names the module and the way out.
    """
    real = sys.modules.get("peft")
    if getattr(real, "__trimtab__", False):
        return
    if real is not None:
        raise TooLateError(f"The real peft ({getattr(real, '__file__', None)}) is imported already. {WAY_OUT}")
    for name, module in _loaded():
        if _frozen(module):
            raise TooLateError(f"'{name}' is imported already and has noted that peft is not available. {WAY_OUT}")


def reset_caches() -> None:
    """Make libraries that remember whether packages are there ask again."""
    for _, module in _loaded():
        for name, value in list(vars(module).items()):
            if ("peft" in name or "package" in name) and callable(getattr(value, "cache_clear", None)):
                value.cache_clear()


def _loaded() -> list[tuple[str, ModuleType]]:
    return [
        (n, m) for n, m in list(sys.modules.items()) if n.partition(".")[0] in LIBRARIES and isinstance(m, ModuleType)
    ]


def _frozen(module: ModuleType) -> bool:
    """Whether a module was imported as if there were no peft: a false flag, or names it would have imported from it."""
    names = vars(module)
    if names.get("_peft_available") is False:
        return True
    if "is_peft_available" not in names:
        return False
    return any(name not in names for name in _imports_from_peft(module))


def _imports_from_peft(module: ModuleType) -> list[str]:
    """The names that a module imports from peft, when there is one, as it is imported itself."""
    spec = getattr(module, "__spec__", None) or importlib.util.spec_from_loader(module.__name__, None)
    source = getattr(spec.loader, "get_source", lambda _: None)(module.__name__) if spec else None
    if not source or "peft" not in source:
        return []
    found: list[str] = []
    for block in ast.parse(source).body:
        if not isinstance(block, ast.If | ast.Try) or "TYPE_CHECKING" in ast.dump(getattr(block, "test", block)):
            continue
        for node in ast.walk(block):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "peft" and not node.level:
                found += [alias.asname or alias.name for alias in node.names]
    return found
