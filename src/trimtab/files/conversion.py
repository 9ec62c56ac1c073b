"""What modules were called in earlier releases of transformers, as its own table of conversions has it."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from trimtab.core.targets import matches
from trimtab.files.codec import PREFIX, unwrapped
from trimtab.methods import known, prefix_of


def leaves() -> tuple[str, ...]:
    """What a segment starts with where a module's path is over."""
    return _leaves(tuple(known()))


@functools.cache
def _leaves(types: tuple[str, ...]) -> tuple[str, ...]:
    return (*map(prefix_of, types), "modules_to_save", "token_adapter", "base_layer")


def transforms(model: nn.Module) -> list[Any]:
    """The conversions of a model's checkpoints; none where it is not transformers', or that is older than the table."""
    try:
        from transformers import PreTrainedModel
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:
        return []
    model = model._modules.get("_orig_mod") or model
    return get_model_conversion_mapping(model) if isinstance(model, PreTrainedModel) else []


def borrowed(model: nn.Module) -> bool:
    """Whether transformers' table has a model's checkpoints converted as those of another type."""
    try:
        from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN as others
    except ImportError:
        return False
    return getattr(getattr(model, "config", None), "model_type", None) in others


class Names:
    """A model's module paths today, and what they were.

    Args:
        model: the model.
        modules: its modules by path, without adapters.
    """

    def __init__(self, model: nn.Module, modules: Mapping[str, Any]) -> None:
        self.model, self.modules = model, modules

    @functools.cached_property
    def transforms(self) -> list[Any]:
        """transformers' conversions for this model."""
        return transforms(self.model)

    @functools.cached_property
    def renamings(self) -> list[Any]:
        """Those that change names only."""
        return [t for t in self.transforms if not hasattr(t, "operations")]

    @functools.cached_property
    def undone(self) -> list[Any]:
        """The renamings turned round, the last one first; some cannot be."""
        found = []
        for renaming in reversed(self.renamings):
            with contextlib.suppress(ValueError, re.error):
                found.append(renaming.reverse_transform())
        return found

    def today(self, key: str) -> str:
        """A key of a file, with or without its prefix, by today's names."""
        start = PREFIX if key.startswith(PREFIX) else ""
        path, leaf = self.split(key)
        return start + ".".join(filter(None, [path, leaf]))

    def split(self, key: str) -> tuple[str, str]:
        """(the path of the module that a key of a file is of, by today's names; the rest of the key)."""
        parts = unwrapped(key.removeprefix(PREFIX)).split(".")
        end = next((i for i, part in enumerate(parts) if part.startswith(leaves())), len(parts) - 1)
        # Renamings speak of a module's own tensors.
        return self._renamed(".".join([*parts[:end], "weight"])).removesuffix(".weight"), ".".join(parts[end:])

    def _renamed(self, key: str) -> str:
        for renaming in self.renamings:
            key = renaming.rename_source_key(key)[0]
        return key

    def before(self, path: str) -> set[str]:
        """What a module's path was in earlier releases, if it was another: all that is now read as this one."""
        forms = {f"{path}.weight"}
        for undo in self.undone:
            forms |= {undo.rename_source_key(form)[0] for form in forms}
        return {f.removesuffix(".weight") for f in forms if self._renamed(f) == f"{path}.weight"} - {path}

    # ------------------------------------------------------------------ configs
    def update(self, config: Any) -> str:
        """Make fields of a config that name modules by former paths, and fit nothing now, name today's, in place."""
        done: list[str] = []
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            value = getattr(config, name, None)
            if isinstance(value, str):
                new: Any = self._expression(value)
            else:
                new = type(value)(self._each(value)) if value else value
            if new != value:
                setattr(config, name, new)
                done.append(f"`{name}`")
        for name in config.patterns:
            value = getattr(config, name, None)
            if isinstance(value, dict) and (new := dict(zip(self._each(value), value.values()))) != value:
                setattr(config, name, new)
                done.append(f"`{name}`")
        if not done:
            return ""
        return f"{' and '.join(done)} name modules as earlier releases of transformers did: read by today's names."

    def _each(self, names: Iterable[str]) -> list[str]:
        found = []
        for name in names:
            new = name
            if "." in name and not self._fits({name}):
                new = self._renamed(f"{name}.weight").removesuffix(".weight")
            found.append(new if new == name or self._fits({new}) else name)
        return found

    def _expression(self, wanted: str) -> Any:
        if wanted.lower() == "all-linear" or self._fits(wanted):
            return wanted
        found = {path for path in self.modules if any(re.fullmatch(wanted, old) for old in self.before(path))}
        return found or wanted

    def _fits(self, wanted: Any) -> bool:
        return any(matches(wanted, path) is not None for path in self.modules)
