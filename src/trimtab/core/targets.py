"""Which modules a config selects: pure functions from names and kinds of layers to a table."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from trimtab.errors import ConfigError, NoMatchingPeftModuleError, PeftWarning

COMPILED = "_orig_mod."  # what compiling a module puts into the paths below it: names need not have it
CONDENSE_FROM = 20  # with as many names or more, the file lists the shortest endings that say the same


@dataclass(frozen=True)
class Target:
    """One row of the table: a module, its kind of site (None: no kind we know), and the entry that selected it.

    Where the entry names a parameter, `name` is its path and `param` the last segment of it.
    """

    name: str
    kind: str | None
    why: str
    param: str = ""

    @property
    def module(self) -> str:
        """The path of the module."""
        return self.name.removesuffix(f".{self.param}") if self.param else self.name


def matches(wanted: Any, name: str) -> str | None:
    """The entry of `wanted` that fits the module path `name`, or None.

    A string is a regular expression over the whole path; a collection holds exact paths or their last segments.
    """
    if wanted is None:
        return None
    if isinstance(wanted, str):
        return wanted if re.fullmatch(wanted, name) or re.fullmatch(wanted, name.replace(COMPILED, "")) else None
    segments = name.split(".")
    for start in range(len(segments)):
        ending = ".".join(segments[start:])
        if ending in wanted:
            return ending
    return matches(wanted, name.replace(COMPILED, "")) if COMPILED in name else None


def inside(names: Collection[str] | None, name: str) -> bool:
    """Whether `name` is one of the modules `names` (by path or ending), or lies under one."""
    if not names:
        return False
    segments = name.split(".")
    return any(matches(set(names), ".".join(segments[: i + 1])) for i in range(len(segments)))


def blocks(paths: Iterable[str]) -> dict[str, int]:
    """Of the paths of a model's modules, those of the blocks of its one stack, and their places in it.

    Of a diffusion model's two, the one whose blocks see text and image as one sequence.
    """
    paths = list(paths)
    for names in ("layers|h|blocks", "single_transformer_blocks", "transformer_blocks"):
        expression = re.compile(rf"(?:\D*\.)?(?:{names})\.(\d+)")
        found = ((path, expression.fullmatch(path)) for path in paths)
        if stack := {path: int(match.group(1)) for path, match in found if match}:
            return stack
    return {}


def layer_index(name: str, pattern: Collection[str] | str | None) -> int | None:
    """The index of the layer a module path lies in, or None where it lies in none."""
    patterns = [pattern] if isinstance(pattern, str) else list(pattern or ())
    expressions = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in patterns] or [r".*?\.[^.]*\.(\d+)\."]
    for expression in expressions:
        if found := re.match(expression, name):
            return int(found.group(1))
    return None


def idle(fields: Mapping[str, Any]) -> dict[str, str]:
    """Which of a config's fields that narrow down its layers cannot act beside its others, and why."""
    found: dict[str, str] = {}
    pattern, layers = fields.get("layers_pattern"), fields.get("layers_to_transform")
    if pattern and isinstance(pattern, str | list | tuple | set) and not layers and layers != 0:
        reason = "When `layers_pattern` is specified, `layers_to_transform` must also be specified. "
        found["layers_pattern"] = reason
    if isinstance(targets := fields.get("target_modules"), str) and targets != "all-linear":
        for name in ("layers_to_transform", "layers_pattern"):
            if fields.get(name) is not None:
                found[name] = f"`{name}` cannot be used when `target_modules` is a str."
    return found


def select(
    kinds: Mapping[str, str | None],
    config: Any,
    linear: Collection[str] = (),
    strict: bool = False,
) -> list[Target]:
    """The modules `config` adapts.

    Args:
        kinds: module path -> the kind of site it would be (None: not a layer that can be adapted), in model order.
        config: a `LayerConfig` whose `target_modules` is set.
        linear: what "all-linear" stands for.
        strict: entries that fit nothing are errors even when others fit.

    Raises:
        NoMatchingPeftModuleError: nothing fits, or with `strict` some entry fits nothing.
    """
    wanted = config.target_modules
    if isinstance(wanted, str) and wanted.lower() == "all-linear":
        wanted = set(linear)
    found: list[Target] = []
    used: set[str] = set()
    excluded: list[str] = []
    used_exclusions: set[str] = set()
    for name, kind in kinds.items():
        why = matches(wanted, name)
        exclusion = matches(config.exclude_modules, name)
        if exclusion is not None:
            used_exclusions.add(exclusion)
        if why is None:
            continue
        if exclusion is not None or inside(config.modules_to_save, name):
            excluded.append(name)
            used.add(why)
            continue
        if not _in_layers(config, name):
            continue
        used.add(why)
        found.append(Target(name, kind, why))
    _report(kinds, config, wanted, found, used, excluded, used_exclusions, strict)
    return found


def selects(config: Any, name: str) -> bool:
    """Whether a config whose `target_modules` is set selects the module `name`."""
    if matches(config.exclude_modules, name) is not None or inside(getattr(config, "modules_to_save", None), name):
        return False
    if matches(config.target_modules, name) is None:
        return False
    return _in_layers(config, name)


def _in_layers(config: Any, name: str) -> bool:
    """Whether `layers_to_transform` lets a module be adapted; one named by its whole path is meant, as in PEFT."""
    wanted, targets = config.layers_to_transform, config.target_modules
    indices = {wanted} if isinstance(wanted, int) else set(wanted or ())
    whole = not isinstance(targets, str) and name in (targets or ())
    return not indices or whole or layer_index(name, config.layers_pattern) in indices


def select_parameters(parameters: Iterable[str], wanted: Collection[str], strict: bool = False) -> list[Target]:
    """The parameters that `target_parameters` names, by path or ending, in model order.

    Raises:
        NoMatchingPeftModuleError: with `strict`, some entry fits nothing.
    """
    parameters = list(parameters)
    why = {n: matches(set(wanted), n) for n in parameters}
    found = [Target(n, "parameter", entry, n.rpartition(".")[2]) for n, entry in why.items() if entry]
    if missed := set(wanted) - {t.why for t in found}:
        message = f"`target_parameters` {sorted(missed)} fit no parameter of the model.{nearest(missed, parameters)}"
        if strict:
            raise NoMatchingPeftModuleError(message)
        warnings.warn(message, PeftWarning, stacklevel=4)
    return found


def _report(
    kinds: Mapping[str, str | None],
    config: Any,
    wanted: Any,
    found: list[Target],
    used: set[str],
    excluded: list[str],
    used_exclusions: set[str],
    strict: bool,
) -> None:
    """Speak up about entries that did nothing."""
    others = getattr(config, "target_parameters", None)  # something else that the config adapts
    if wanted and not found and not others:
        if excluded:
            every = all(matches(config.exclude_modules, name) for name in kinds if name)
            reason = (
                "All modules were excluded. This is likely unintended. Check"
                if every
                else "No modules were targeted for adaptation. This might be caused by a combination of mismatched "
                "target modules and excluded modules. Please check"
            )
            raise NoMatchingPeftModuleError(
                f"{reason} your `target_modules`, `exclude_modules` and `modules_to_save` configuration: "
                f"{sorted(excluded)[:5]} fit, but are excluded."
            )
        message = (
            f"Target modules {_show(wanted)} not found in the base model. "
            "Please check the target modules and try again."
        )
        if config.layers_to_transform is not None:
            message += (
                f" Note: You specified 'layers_to_transform': {config.layers_to_transform}. You should also specify "
                "'layers_pattern' if the index is not the first number of the module names."
            )
        raise NoMatchingPeftModuleError(message + (meant(wanted, kinds) or nearest(wanted, kinds)))
    missed = {wanted} - used if isinstance(wanted, str) else set(wanted or ()) - used
    if missed:
        how = meant(wanted if isinstance(wanted, str) else missed, kinds) or nearest(missed, kinds)
        message = (
            f"`target_modules` {sorted(missed)} fit no module of the model{'; the others do' if found else ''}.{how}"
        )
        if strict:
            raise NoMatchingPeftModuleError(message)
        warnings.warn(message, PeftWarning, stacklevel=5)
    if config.exclude_modules and not used_exclusions:
        warnings.warn(
            f"You have passed exclude_modules={_show(config.exclude_modules)} but no modules were excluded. "
            "Please check that exclude_modules was set correctly."
            + meant(config.exclude_modules, kinds, "exclude_modules"),
            PeftWarning,
            stacklevel=5,
        )


def meant(wanted: Any, names: Iterable[str], field: str = "target_modules") -> str:
    """A sentence on what entries that fit nothing were probably meant to be: spellings that fit; or ''."""
    paths = list(names)
    fit = lambda entries: bool(entries) and all(any(matches({e}, path) for path in paths) for e in entries)
    texts = [wanted] if isinstance(wanted, str) else sorted(wanted)
    said = []
    for text in texts:
        parts = [part for part in re.split(r"[,;|\s]+", text.strip("()[]'\" ")) if part]
        stem = text.removesuffix(".weight").removesuffix(".bias")
        if re.sub(r"[^a-z]", "", text.lower()) in ("alllinear", "linear", "alllinears", "all"):
            said.append(f'For every linear layer but the head write {field}="all-linear", which stands alone.')
        elif isinstance(wanted, str):
            example = next((path for path in paths if fit(parts) and matches(set(parts), path)), max(paths, key=len))
            said.append(
                f"A string is a regular expression over a module's whole path, such as '{example}'; for names write a "
                f"list, {field}={parts if fit(parts) else '[...]'}.{'' if fit(parts) else nearest(wanted, names)}"
            )
        elif len(parts) > 1 and fit(parts):
            said.append(f"'{text}' is one name here: write {parts}.")
        elif stem != text and fit([stem]):
            said.append(f"'{text}' is a parameter: name its module, '{stem}'.")
        elif _expression(text, paths):
            said.append(f"In a list '{text}' is a name, not a regular expression: that is given as a string alone.")
    return "".join(f" {sentence}" for sentence in dict.fromkeys(said))


def _expression(text: str, paths: list[str]) -> bool:
    """Whether a text fits whole paths as a regular expression."""
    try:
        return any(re.fullmatch(text, path) for path in paths)
    except re.error:
        return False


def condense(targets: Iterable[str], others: Iterable[str]) -> set[str]:
    """The shortest endings that fit all of `targets` and none of `others`."""
    taken = {".".join(s[i:]) for name in others for s in [name.split(".")] for i in range(len(s))}
    short = set()
    for name in targets:
        segments = name.split(".")
        endings = (".".join(segments[i:]) for i in range(len(segments) - 1, -1, -1))
        short.add(next((e for e in endings if e not in taken), name))
    return short


def nearest(wanted: Any, names: Iterable[str]) -> str:
    """A sentence that names the module endings most like the ones that fit nothing, or ''."""
    endings = dict.fromkeys(n.rsplit(".", 1)[-1] for n, kind in _pairs(names) if kind is not None)
    texts = [wanted] if isinstance(wanted, str) else sorted(wanted)
    close = [c for t in texts for c in difflib.get_close_matches(t.rsplit(".", 1)[-1], endings, n=2, cutoff=0.5)]
    known = ", ".join(repr(c) for c in dict.fromkeys(close))
    if known:
        return f" The nearest names in this model are {known}."
    shown = ", ".join(repr(e) for e in list(endings)[:8])
    return f" Layers of this model that can be adapted are named {shown}." if shown else ""


def unused_patterns(patterns: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """The keys of a rank or alpha pattern that fit none of the adapted modules."""
    names = list(names)
    return [k for k in patterns if not any(re.match(rf"(.*\.)?({k})$", n) for n in names)]


def require_list_or_int(value: Any, field: str) -> None:
    """Raise `ConfigError` unless `value` is None, an int or a list of ints."""
    if value is None or isinstance(value, int):
        return
    if not all(isinstance(v, int) for v in value):
        raise ConfigError(f"`{field}` should be an int or a list of ints, not {value!r}.")


def _pairs(names: Any) -> Iterable[tuple[str, Any]]:
    return names.items() if isinstance(names, Mapping) else ((n, "") for n in names)


def _show(wanted: Any) -> str:
    return repr(wanted) if isinstance(wanted, str) else str(set(wanted))
