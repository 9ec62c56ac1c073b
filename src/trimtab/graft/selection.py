"""Which modules of a model an adapter changes: its config held against the model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from trimtab.core.method import BIASED, INPUT_EMBEDDING, Method
from trimtab.core.report import warn
from trimtab.core.site import site_class
from trimtab.core.targets import (
    CONDENSE_FROM,
    Target,
    condense,
    inside,
    matches,
    nearest,
    select,
    select_parameters,
    unused_patterns,
)
from trimtab.errors import ConfigError, NoMatchingPeftModuleError
from trimtab.files.experts import fused, rewrite
from trimtab.graft.base import Base
from trimtab.methods import COMPANIONS, config_class, default_targets, method_class

TIED = (
    "Model has `tie_word_embeddings=True` and a tied layer is part of the adapter, but `ensure_weight_tying` is not "
    "set to True. This can lead to complications, for example when merging the adapter: {} will then have a weight of "
    "its own."
)


FOREIGN = "foreign"  # the kind of a target whose layer a user's class makes
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
Pick = Callable[[Any, list[Target]], list[Target]]


def choose(base: Base, config: Any, method: type[Method], strict: bool, pick: Pick | None = None) -> list[Target]:
    """The modules the config adapts; completes its `target_modules` as it will be saved.

    Args:
        pick: given the config and the targets it selects, says which others stand for them.
    """
    if not hasattr(config, "target_modules"):
        raise ConfigError(f"{type(config).__name__} does not adapt layers.")
    by_default(base, config, method)
    kinds = {n: kind(m, method.kinds) for n, m in base.modules.items()}
    if base.foreign or config.custom_modules:
        kinds |= dict.fromkeys((n for n in base.modules if is_foreign(base, config, n)), FOREIGN)
    linear = linears(base)
    if done := rewrite(config, base.model, base.modules, linear):
        warn(done)
    if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        config.target_modules = {n for n in linear if not inside(config.modules_to_save, n)}
    own = method.chosen(config, kinds)
    if own is not None:
        return [Target(name, kinds[name], name) for name in own]
    targets = without_parts(base, select(kinds, config, strict=strict))
    if getattr(config, "target_parameters", None):
        names = [f"{n}.{p}" for n, m in base.modules.items() for p, v in m._parameters.items() if v is not None]
        targets += select_parameters(names, config.target_parameters, strict)
        if not targets and pick is None:
            raise NoMatchingPeftModuleError(
                "No `target_modules` passed but also no `target_parameters` found. Please check the values for "
                f"these arguments.{nearest(config.target_parameters, names)}"
            )
    if pick is not None:
        targets = pick(config, targets)
    for target in targets:
        if target.kind not in (*method.kinds, FOREIGN):
            module = base.modules[target.module]
            raise ConfigError(
                f"Target module {module} is not supported. Currently, only the following modules are supported: those "
                f"of the kinds {', '.join(sorted(method.kinds))} ({method.__name__} at '{target.name}')."
            )
    note(base, config, targets)
    return targets


def is_foreign(base: Base, config: Any, path: str) -> bool:
    """Whether a user's class makes the layer at a path, or has made it already."""
    if path in base.foreign:
        return config.custom_modules is not None
    return maker(config, base.modules[path]) is not None and not base.layers_at(path)


def maker(config: Any, module: nn.Module) -> Any:
    """The class that a config has registered for modules of this type, or None."""
    return next((made for kind, made in (config.custom_modules or {}).items() if isinstance(module, kind)), None)


def by_default(base: Base, config: Any, method: type[Method]) -> None:
    """Complete what the config leaves open by what the method adapts in models of this type."""
    model_type = base.model_type
    named = bool(getattr(config, "target_parameters", None))
    default = default_targets(config, model_type)
    if config.target_modules is None and named and (default is None or fused(base.model, base.modules)):
        config.target_modules = set()
    if config.target_modules is None:
        if default == INPUT_EMBEDDING:
            default = [input_embedding(base)]
        if default == BIASED:
            biased = [n for n, m in base.modules.items() if m._parameters.get("bias") is not None]
            default = [n for n in biased if kind(base.modules[n]) in method.kinds]
        if default is None and not set(config.modules_to_save or ()) - set(config.__dict__.get("heads", ())):
            raise ConfigError(
                "Please specify `target_modules` or `target_parameters`in `peft_config`: there is no default for "
                f"models of type {model_type!r}."
            )
        config.target_modules = default if isinstance(default, str) else set(default or ())
    for field_name, table in getattr(method, "defaults", {}).items():
        if getattr(config, field_name) is None:
            if model_type not in table:
                raise ConfigError(
                    f"Please specify `{field_name}` in `peft_config`: "
                    f"there is no default for models of type {model_type!r}."
                )
            setattr(config, field_name, set(table[model_type]))


def note(base: Base, config: Any, targets: list[Target]) -> None:
    """Write into the config what is saved with it, and say which of its patterns fit nothing."""
    if isinstance(config.target_modules, set) and len(config.target_modules) >= CONDENSE_FROM:
        wanted = config.target_modules
        short = condense(wanted, (n for n in base.modules if matches(wanted, n) is None))
        if len(short) < len(config.target_modules):
            config.target_modules = short
    if flipped := [site_class(base.modules[t.name]).flipped for t in targets if t.kind == "linear"]:  # type: ignore[union-attr]
        if getattr(config, "fan_in_fan_out", False) and not any(flipped):
            warn("`fan_in_fan_out` is True, but the weights of the layers adapted lie (out, in): it is False here.")
        if hasattr(config, "fan_in_fan_out"):
            config.fan_in_fan_out = flipped[-1]  # how PEFT notes it
    names = [t.name for t in targets]
    if (ensured := getattr(config, "ensure_weight_tying", None)) is not None:
        tied = [name for name in names if any(not _repeats(config, name, n) for n in base.tied(name))]
        whole = set(config.modules_to_save or ())
        if ensured and not tied and not any(base.tied(name) for name in base.modules if matches(whole, name)):
            warn(
                "You have requested `ensure_weight_tying`, but no tied modules were found in the model's targets, nor "
                "among `modules_to_save`."
            )
        elif tied and not ensured:
            warn(TIED.format(tied))
    for field_name in config.patterns:
        if unused := unused_patterns(getattr(config, field_name, {}) or {}, names):
            warn(f"`{field_name}` keys {unused} fit none of the adapted modules.{nearest(unused, base.modules)}")


def _repeats(config: Any, name: str, other: str) -> bool:
    """Whether two modules share a weight because `layer_replication` repeats the layer they are in, as was asked."""
    return bool(getattr(config, "layer_replication", None)) and NUMBER.sub("", name) == NUMBER.sub("", other)


def without_parts(base: Base, targets: list[Target]) -> list[Target]:
    """Without the layers that are adapted along with the one they are part of."""
    found = {t.name: site_class(base.modules[t.name]) for t in targets}
    part = lambda path: (whole := found.get(path.rpartition(".")[0])) and path.rpartition(".")[2] in whole.parts
    return [t for t in targets if not part(t.name)]


def companions(base: Base, config: Any) -> dict[str, tuple[type[Method], Any, str]]:
    """Module path -> (method, its config, prefix of its leaves) of what the adapter trains beside its own change."""
    found: dict[str, tuple[type[Method], Any, str]] = {}
    for field_name, (peft_type, argument, prefix) in COMPANIONS.items():
        wanted = getattr(config, field_name, None) or {}
        if not isinstance(wanted, dict):
            wanted = {input_embedding(base): wanted}
        named: dict[str, list[Any]] = {}
        for key, value in wanted.items():
            paths = [n for n in base.modules if matches({key}, n)]
            if not paths:
                raise NoMatchingPeftModuleError(
                    f"Target modules {{'{key}'}} not found in the base model, which `{field_name}` names. Please check "
                    f"the target modules and try again.{nearest([key], base.modules)}"
                )
            named |= {path: list(value) for path in paths}
        for path, value, tied in _groups(base, config, field_name, named):
            own = config_class(peft_type)(**{argument: value})  # type: ignore[arg-type]
            found |= dict.fromkeys([path, *tied], (method_class(own), own, prefix))
    return found


def _groups(
    base: Base, config: Any, field_name: str, named: dict[str, list[Any]]
) -> Iterator[tuple[str, list[Any], list[str]]]:
    """(module, what is wanted there, the modules tied to it that follow it), as PEFT has it: embeddings lead.

    A head that is tied follows its embedding, unless it is named alone or for something else: then it goes its own way.
    """
    leads = [n for n in named if kind(base.modules[n]) == "embedding"]
    for path in leads:
        tied = base.tied(path)
        apart = {n: named[n] for n in tied if named.get(n, named[path]) != named[path]}
        if apart and getattr(config, "ensure_weight_tying", False):
            raise ConfigError(
                "Cannot ensure weight tying when different token indices are specified for tied layers: "
                f"`{field_name}` has { {path: named[path], **apart} }. Please use the same indices for all of them, or "
                "set ensure_weight_tying=False."
            )
        yield path, named[path], [n for n in tied if n not in apart]
    followed = {n for path in leads for n in base.tied(path) if named.get(n) == named[path]}
    yield from ((path, value, []) for path, value in named.items() if path not in {*leads, *followed})


def input_embedding(base: Base) -> str:
    """The path of the module that looks up the model's tokens."""
    if base.input_embedding is None:
        raise ConfigError(
            f"{type(base.model).__name__} has no get_input_embeddings(), which would tell its embedding: name it "
            "(`target_modules`, or {module: indices} for `trainable_token_indices`)."
        )
    return base.input_embedding


def kind(module: nn.Module, able: frozenset[str] = frozenset()) -> str | None:
    """The kind of site a module is; whole blocks are one only to methods that are `able` to adapt them."""
    cls = site_class(module)
    return cls.kind if cls and (cls.weighs or cls.kind in able) else None


def linears(base: Base) -> list[str]:
    """The paths of the layers that "all-linear" means: all but the head."""
    head = base.head
    return [n for n, m in base.modules.items() if kind(m) == "linear" and n != head and callable_linear(m)]


def callable_linear(module: nn.Module) -> bool:
    """Whether a Linear is one that "all-linear" means: it is called, and gives its product (routers give more)."""
    cls: Any = site_class(module)
    return not cls.reads and "router" not in type(module).__name__.lower()
