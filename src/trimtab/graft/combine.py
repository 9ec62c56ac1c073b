"""A new adapter out of others: which can be combined, at which ranks, under which config.

Adapters of a method that says how its tensors add up (LoRA's factors, IA3's scales) become one of that method. All
others, and those of different methods, are added up by their deltas dW = W' - W, and become a LoRA of a given rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.core.combining import Recipe, split
from trimtab.core.families import LowRank, names_at
from trimtab.core.method import Method, leaf_alias
from trimtab.core.targets import matches
from trimtab.errors import AdapterNameError
from trimtab.files.codec import copy_keys
from trimtab.graft.adapters import Adapter
from trimtab.graft.graft import Graft
from trimtab.methods import PLAIN, config_class, method_class

FILTERS = ("exclude_modules", "layers_to_transform", "layers_pattern")  # what else decides which layers are adapted
KINDS = ("linear", "embedding", "conv", "attention")  # kinds of layers at which deltas can be added up
ALONG = ("base_model_name_or_path", "revision", "auto_mapping", "fan_in_fan_out")  # of the first adapter's config

Parts = Mapping[str, list[tuple[tuple[Any, ...], float]]]  # path -> (an adapter's methods there, its weight)
Values = dict[str, dict[str, Tensor]]  # path -> {alias: tensor}


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
    own = _own(adapters)
    _check(adapters, own, recipe)
    layers = {layer.path: layer.methods for a in adapters.values() for layer in a.layers}
    terms = list(zip(names, weights, strict=True))
    here = {path: layers[path] for path in graft.base.modules if path in layers}  # in the model's order
    parts = {path: [(methods[n], w) for n, w in terms if n in methods] for path, methods in here.items()}
    config, values = _by_method(own, adapters, parts, recipe) if own else _by_deltas(adapters, parts, recipe)
    copies = {
        copy_keys(wrapper.name, key, new)[1]: value
        for name, adapter in adapters.items()
        for wrapper in adapter.saved
        for key, value in wrapper.modules_to_save[name].state_dict().items()
    }

    def value(slot: Any) -> Tensor:
        if slot.method is None:
            return copies[slot.disk]  # type: ignore[no-any-return]
        # What only other layers' adapters have (a bias of B) does nothing here.
        own = values[slot.method.layer.path].get(leaf_alias(slot.leaf))
        return torch.zeros_like(slot.get()) if own is None else own

    return config, lambda slots: {slot.on_disk(): value(slot) for slot in slots if not slot.optional}


def _own(adapters: Mapping[str, Adapter]) -> type[Method] | None:
    """The method whose own way of combining all adapters have in common, or None."""
    kinds = {type(m) for name, a in adapters.items() for layer in a.layers for m in layer.methods[name]}
    ways = {kind.combine for kind in kinds}
    return next(iter(adapters.values())).method if len(ways) == 1 and None not in ways else None


def _check(adapters: Mapping[str, Adapter], own: type[Method] | None, recipe: Recipe) -> None:
    """Raise one ValueError that lists all that stands against combining these adapters."""
    faults = []
    for name, adapter in adapters.items():
        methods = [m for layer in adapter.layers for m in layer.methods[name]]
        if own is None:
            faults += _unfit(name, adapter, methods, recipe)
        if getattr(adapter.config, "target_parameters", None):
            faults.append(f"'{name}' adapts parameters by name (`target_parameters`)")
        if adapter.foreign:
            faults.append(f"'{name}' has layers of a class of its own, at {list(adapter.foreign)}")
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
    if own and len({isinstance(w, str) for w in wanted if w}) > 1:
        faults.append("all should follow the same target modules type, but some are a string and some a list")
    if faults:
        raise ValueError(f"Adapters {list(adapters)} cannot be combined: {'; '.join(faults)}.")


def _unfit(name: str, adapter: Adapter, methods: Sequence[Any], recipe: Recipe) -> list[str]:
    """What stands against adding an adapter up by its deltas."""
    made = f"'{name}' is made of {', '.join(sorted({type(m).__name__ for m in methods} or {adapter.method.__name__}))}"
    if not methods or not all(m.mergeable for m in methods):
        return [f"{made}, which cannot be combined: it is no change of weights"]
    faults = []
    if other := [m.site for m in methods if m.site.kind not in KINDS or m.site.groups > 1]:
        faults.append(f"'{name}' changes '{other[0].name}', as no LoRA can in one pair")
    if recipe.form != "delta":
        faults.append(f"{made}: here only deltas add up, so use 'svd' or a type that ends in '_svd'")
    elif recipe.rank is None and not all(isinstance(m, LowRank) for m in methods):
        faults.append(f"{made}, whose deltas have no rank of their own: `svd_rank` is needed")
    return faults


# ---------------------------------------------------------------------- as an adapter of the same method
def _by_method(own: type[Method], adapters: Mapping[str, Adapter], parts: Parts, recipe: Recipe) -> tuple[Any, Values]:
    """The config and the tensors of a combination by the method's own rule."""
    single = {path: [(methods[0], w) for methods, w in part] for path, part in parts.items()}
    ranks = _ranks(single, recipe) if issubclass(own, LowRank) else dict.fromkeys(parts, 0)
    configs = [a.config for a in adapters.values()]
    config = configs[0].copy()
    config.modules_to_save = _saved(configs)
    targets = [c.target_modules for c in configs if c.target_modules]
    if any(getattr(c, f, None) != getattr(config, f, None) for c in configs for f in FILTERS):
        config.target_modules = set(ranks)
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    elif targets and isinstance(targets[0], str):
        config.target_modules = targets[0] if len(set(targets)) == 1 else "|".join(f"({t})" for t in targets)
    else:
        config.target_modules = set().union(*targets)
    own.combined_config(own, config, configs, ranks)  # type: ignore[misc]
    rule: Callable[..., dict[str, Tensor]] = own.combine  # type: ignore[assignment]
    values = {
        path: rule([m for m, _ in part], [w for _, w in part], recipe, ranks[path]) for path, part in single.items()
    }
    return config, values


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


def _saved(configs: Sequence[Any]) -> list[str] | None:
    """The modules that any of them trains whole."""
    return list(dict.fromkeys(m for c in configs for m in getattr(c, "modules_to_save", None) or ())) or None


# ---------------------------------------------------------------------- by deltas
def _by_deltas(adapters: Mapping[str, Adapter], parts: Parts, recipe: Recipe) -> tuple[Any, Values]:
    """The config and the tensors of a LoRA that stands for the merged deltas; changes of biases are its own biases."""
    sites = {path: part[0][0][0].site for path, part in parts.items()}
    wanted = recipe.rank or max(m.r for part in parts.values() for methods, _ in part for m in methods)
    ranks = {path: min(wanted, site.fan_out, site.fan_in) for path, site in sites.items()}
    values, biases = {}, {}
    for path, part in parts.items():
        values[path], biases[path] = _summed(sites[path], part, recipe, ranks[path])
    biased = any(bias is not None for bias in biases.values())
    configs = [a.config for a in adapters.values()]
    config: Any = config_class(PLAIN)(task_type=configs[0].task_type)
    for field in (*ALONG, *FILTERS, "target_modules"):
        if hasattr(config, field) and getattr(configs[0], field, None):
            setattr(config, field, getattr(configs[0], field))
    alike = all(getattr(c, f, None) == getattr(config, f) for c in configs for f in (*FILTERS, "target_modules"))
    if not alike or any(matches(config.target_modules, path) is None for path in parts):
        config.target_modules = set(parts)
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    config.modules_to_save, config.lora_bias = _saved(configs), biased
    LowRank.settle(method_class(config), config, [config], ranks)
    for path, bias in biases.items() if biased else ():
        if sites[path].kind == "embedding":
            raise ValueError(
                f"Adapters {list(adapters)} cannot be combined: they change biases, and '{path}' has none."
            )
        if bias is not None:
            values[path]["lora_B_bias"] = bias
    return config, values


def _summed(
    site: Any, part: list[tuple[tuple[Any, ...], float]], recipe: Recipe, rank: int
) -> tuple[dict[str, Tensor], Tensor | None]:
    """The pair for one layer, by alias, and what comes to its bias (out,), or None."""
    W, b = site.matrix().detach().double(), site.bias()  # a small dW must not drown in the rounding of W
    deltas, biases = [], []
    for methods, weight in part:
        adapted, shifted = W, b
        for method in methods:
            adapted, shifted = method.weight(adapted), method.bias(shifted)
        deltas.append((adapted - W).float())
        if shifted is not b and shifted is not None:
            biases.append((shifted if b is None else shifted - b, weight))
    A, B = split(recipe.merge(deltas, [w for _, w in part]), rank, recipe.clamp, recipe.driver)
    name_A, name_B = names_at(site)
    pair = {name_A: A.reshape(site.down(rank)), name_B: B.reshape(site.up(rank))}
    return pair, recipe.merge(*map(list, zip(*biases, strict=True))) if biases else None
