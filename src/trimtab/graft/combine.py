"""A new adapter out of others: which can be combined, at which ranks, under which config."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from trimtab.core.combining import Recipe
from trimtab.core.method import leaf_alias
from trimtab.errors import AdapterNameError
from trimtab.files.codec import copy_keys, leaf_keys
from trimtab.graft.adapters import Adapter
from trimtab.graft.graft import Graft

FILTERS = ("exclude_modules", "layers_to_transform", "layers_pattern")  # what else decides which layers are adapted


@torch.no_grad()
def combine(graft: Graft, names: Sequence[str], weights: Sequence[float], new: str, recipe: Recipe) -> tuple[Any, Any]:
    """The adapter `new` that combines adapters: its config, and what `Graft.add` asks for its tensors.

    An adapter has no part in the layers it leaves alone. A module that one of them trains whole (`modules_to_save`) is
    copied, whatever the weight.
    """
    names, weights = list(names), [float(w) for w in weights]
    if new in graft.adapters:
        raise AdapterNameError(f"Adapter with name '{new}' already exists: delete it, or choose another name.")
    if not names or len(names) != len(weights):
        raise ValueError(f"Every adapter needs one weight, but there are {len(names)} and {len(weights)}.")
    if unknown := [name for name in names if name not in graft.adapters]:
        raise AdapterNameError(f"Adapter {unknown[0]} does not exist. Known: {list(graft.adapters)}.")
    adapters = {name: graft.adapters[name] for name in names}
    graft.residents.bring(names)
    _check(adapters)
    layers = {layer.path: layer.methods for a in adapters.values() for layer in a.layers}
    terms = list(zip(names, weights, strict=True))
    here = {path: layers[path] for path in graft.base.modules if path in layers}  # in the model's order
    parts = {path: [(methods[n][0], w) for n, w in terms if n in methods] for path, methods in here.items()}
    ranks = _ranks(parts, recipe)
    config = _config(list(adapters.values()), ranks, recipe)
    tensors = {}
    for path, part in parts.items():
        methods, own = [m for m, _ in part], [w for _, w in part]
        templates = {leaf_alias(leaf): t for m in methods for leaf, t in m.templates.items()}
        for alias, value in (
            type(methods[0])
            .combine(  # type: ignore[misc]
                methods, own, recipe, ranks[path]
            )
            .items()
        ):
            tensors[leaf_keys(path, templates[alias], new)[1]] = value
    for name, adapter in adapters.items():
        for wrapper in adapter.saved:
            for key, value in wrapper.modules_to_save[name].state_dict().items():
                tensors[copy_keys(wrapper.name, key, new)[1]] = value
    return config, lambda slots: {s.on_disk(): tensors[s.disk] for s in slots if not s.optional}


def _check(adapters: Mapping[str, Adapter]) -> None:
    """Raise one ValueError that lists all that stands against combining these adapters."""
    faults = []
    for name, adapter in adapters.items():
        kinds = {adapter.method, *(type(m) for layer in adapter.layers for m in layer.methods[name])}
        if other := sorted(kind.__name__ for kind in kinds if kind.combine is None):
            faults.append(f"'{name}' is made of {', '.join(other)}, which cannot be combined")
        if getattr(adapter.config, "target_parameters", None):
            faults.append(f"'{name}' adapts parameters by name (`target_parameters`)")
        if adapter.biases is not None:
            faults.append(f"'{name}' trains the base's biases, which only one adapter of a model can")
        if any(name in layer.originals.takers.values() for layer in adapter.layers):
            faults.append(f"'{name}' changed the base's weights: save it with path_initial_model_for_weight_conversion")
    saved = [wrapper.name for adapter in adapters.values() for wrapper in adapter.saved]
    if shared := sorted({path for path in saved if saved.count(path) > 1}):
        faults.append(
            "Cannot add weighted adapters if they target the same module with modules_to_save, but found "
            f"{len(shared)} such instance(s): {shared}"
        )
    wanted = [getattr(a.config, "target_modules", None) for a in adapters.values()]
    if len({isinstance(w, str) for w in wanted if w}) > 1:
        faults.append("all should follow the same target modules type, but some are a string and some a list")
    if faults:
        raise ValueError(f"Adapters {list(adapters)} cannot be combined: {'; '.join(faults)}.")


def _ranks(parts: Mapping[str, list[tuple[Any, float]]], recipe: Recipe) -> dict[str, int]:
    """The rank of the result at each layer."""
    given = {path: [m.r for m, _ in part] for path, part in parts.items()}
    if recipe.form == "delta":
        rank = recipe.rank or max((r for rs in given.values() for r in rs), default=0)
        sites = {path: part[0][0].site for path, part in parts.items()}
        return {path: min(rank, site.fan_out, site.fan_in) for path, site in sites.items()}
    unequal = [f"{path} {rs}" for path, rs in given.items() if len(set(rs)) > 1]
    if unequal and recipe.form == "factors":
        raise ValueError(
            "All adapters must have the same r value when using combination_type linear, ties, dare_ties or "
            f"dare_linear. They differ at {', '.join(unequal[:5])}: use 'cat' or a type that ends in 'svd'."
        )
    return {path: sum(rs) if recipe.form == "stack" else rs[0] for path, rs in given.items()}


def _config(adapters: Sequence[Adapter], ranks: Mapping[str, int], recipe: Recipe) -> Any:
    """The first adapter's config with the union of the targets, and rank and alpha such that each scale is 1."""
    configs = [a.config for a in adapters]
    config = configs[0].copy()
    config.r = config.lora_alpha = max(ranks.values(), default=config.r)
    # "^" keeps a path from fitting the end of a longer one.
    config.rank_pattern = {f"^{re.escape(path)}": r for path, r in ranks.items() if r != config.r}
    config.alpha_pattern = dict(config.rank_pattern)
    config.use_rslora, config.lora_bias = False, any(c.lora_bias for c in configs)
    config.modules_to_save = list(dict.fromkeys(m for c in configs for m in c.modules_to_save or ())) or None
    if adapters[0].method.mutates(config):
        config.init_lora_weights = True
    targets = [c.target_modules for c in configs if c.target_modules]
    if any(getattr(c, f) != getattr(config, f) for c in configs for f in FILTERS):
        config.target_modules = set(ranks)
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    elif targets and isinstance(targets[0], str):
        config.target_modules = targets[0] if len(set(targets)) == 1 else "|".join(f"({t})" for t in targets)
    else:
        config.target_modules = set().union(*targets)
    return config
