"""Adapters into one another: weighted sums, concatenation, SVD, TIES, DARE and magnitude pruning.

The merges below are pure functions of task tensors T_i (one an adapter, all of one shape) and weights w_i. They act on

    the factors   C_i = c_i·A_i and d_i·B_i with d = √|w·s|, c = sign(w)·d    linear, ties, dare_*, magnitude_prune
    the deltas    D_i = s_i·B_i·A_i, the result factored again by an SVD       svd, *_svd

where s is an adapter's scaling. Merging factors is cheap and, for more than one adapter, not the merge of the deltas:
(Σ d·B)(Σ c·A) has the products of each adapter's B with the others' A as well. `cat` stacks the factors, which is the
exact sum of the deltas, Σ w·s·B·A = [B_1 B_2 ...]·[w_1·s_1·A_1; w_2·s_2·A_2; ...], at the sum of the ranks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.core.families import wide
from trimtab.core.method import require_rank
from trimtab.errors import AdapterNameError
from trimtab.files.codec import copy_keys, leaf_keys
from trimtab.graft.adapters import Adapter
from trimtab.graft.graft import Graft

FILTERS = ("exclude_modules", "layers_to_transform", "layers_pattern")  # what else decides which layers are adapted


# ---------------------------------------------------------------------- task tensors
def trim(T: Tensor, density: float) -> Tensor:
    """The ⌊density·n⌋ of the n entries that are largest in magnitude; the others zero."""
    kept, flat = torch.zeros_like(T).flatten(), T.flatten()
    index = flat.abs().topk(int(density * T.numel())).indices
    return kept.index_copy(0, index, flat[index]).view_as(T)


def drop(T: Tensor, density: float) -> Tensor:
    """m∘T / density with m ~ Bernoulli(density), whose mean is T."""
    return torch.bernoulli(torch.full_like(T, density)) * T / density


def total(tasks: Sequence[Tensor], weights: Sequence[float], sign: str = "total") -> Tensor:
    """Σ w_i·T_i (task arithmetic, Ilharco et al. 2022, https://arxiv.org/abs/2212.04089)."""
    return torch.stack([w * t for w, t in zip(weights, tasks, strict=True)]).sum(0)


def agree(tasks: Sequence[Tensor], weights: Sequence[float], sign: str = "total") -> Tensor:
    """Elect a sign for each entry, then average the tasks that have it (TIES, section 3, steps 2 and 3).

    γ = sign(Σ_i T_i) ("total") or sign(Σ_i sign(T_i)) ("frequency"), + where it is 0;
    result = Σ_{i: sign(T_i) = γ} w_i·T_i / #{i: sign(T_i) = γ}, and 0 where no task has the sign.
    """
    T = torch.stack(list(tasks))  # (tasks, ...)
    up = (T.sign() if sign == "frequency" else T).sum(0) >= 0
    keep = torch.where(up, T > 0, T < 0)
    return total((T * keep).unbind(), weights) / keep.sum(0).clamp_min(1)


# TIES: Yadav et al. 2023, https://arxiv.org/abs/2306.01708.   DARE: Yu et al. 2023, https://arxiv.org/abs/2311.03099.
MERGES: dict[str, tuple[Any, Any]] = {  # how each task is pruned, how all are joined
    "linear": (None, total),
    "ties": (trim, agree),
    "dare_linear": (drop, total),
    "dare_ties": (drop, agree),
    "magnitude_prune": (trim, total),
}
TYPES: dict[str, tuple[str, str]] = {  # combination_type: (what is merged, the merge)
    "cat": ("stack", "linear"),
    "svd": ("delta", "linear"),
    **{name: ("factors", name) for name in MERGES},
    **{f"{name}_svd": ("delta", name) for name in MERGES if name != "linear"},
}


@dataclass
class Recipe:
    """How to combine; see `Tuner.add_weighted_adapter`. Raises ValueError for settings that cannot work."""

    type: str = "svd"
    rank: int | None = None
    clamp: float | None = None
    driver: str | None = None
    density: float | None = None
    sign: str = "total"

    def __post_init__(self) -> None:
        if self.type not in TYPES:
            raise ValueError(f"Invalid combination_type: {self.type}. Known: {', '.join(TYPES)}.")
        self.form, merge = TYPES[self.type]
        self.prune, self.join = MERGES[merge]
        if self.prune and (self.density is None or not 0 < self.density <= 1):
            raise ValueError(f"combination_type '{self.type}' needs a `density` in (0, 1], but got {self.density}.")
        if self.sign not in ("total", "frequency"):
            raise ValueError(f"`majority_sign_method` should be 'total' or 'frequency', not {self.sign!r}.")
        if self.rank is not None:
            require_rank(self.rank, "svd_rank")

    def merge(self, tasks: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """One tensor of several tasks."""
        pruned = [self.prune(T, self.density) for T in tasks] if self.prune else tasks
        return self.join(pruned, weights, self.sign)


# ---------------------------------------------------------------------- at one layer
def split(D: Tensor, rank: int, clamp: float | None = None, driver: str | None = None) -> tuple[Tensor, Tensor]:
    """D (out, in) ≈ B·A, A = Vᵀ (rank, in), B = U·S (out, rank); `clamp`: cut at ± that quantile of all entries."""
    U, S, A = torch.linalg.svd(D, full_matrices=False, driver=driver)
    A, B = A[:rank], U[:, :rank] * S[:rank]
    if clamp is not None:
        q = torch.quantile(torch.cat([B.flatten(), A.flatten()]), clamp)
        A, B = A.clamp(-q, q), B.clamp(-q, q)
    return A, B


def split_product(A: Tensor, B: Tensor, rank: int, driver: str | None = None) -> tuple[Tensor, Tensor]:
    """`split(B @ A)` for A (R, in), B (out, R) without forming the product: QR of each, then the SVD of (R, R)."""
    (Qb, Rb), (Qa, Ra) = torch.linalg.qr(B), torch.linalg.qr(A.T)
    a, b = split(Rb @ Ra.T, rank, driver=driver)
    return a @ Qa.T, Qb @ b


def combine_pairs(methods: Sequence[Any], weights: Sequence[float], recipe: Recipe, rank: int) -> dict[str, Tensor]:
    """The tensors, by alias, of one pair of `rank` and scale 1 for several at a layer; biases merge as deltas do."""
    As, Bs = zip(*[[wide(M.detach()).flatten(1) for M in m.factors] for m in methods], strict=True)
    scaled = [w * m.scaling for w, m in zip(weights, methods, strict=True)]
    site, (name_A, name_B) = methods[0].site, methods[0].names
    if recipe.form == "factors":
        roots = [abs(s) ** 0.5 for s in scaled]
        A = recipe.merge(As, [-d if s < 0 else d for d, s in zip(roots, scaled, strict=True)])
        B = recipe.merge(Bs, roots)
    else:
        A, B = torch.cat([s * A for s, A in zip(scaled, As, strict=True)]), torch.cat(Bs, 1)
    if recipe.form == "delta":
        # The clamp depends on the singular vectors' signs: only a dense SVD picks them as PEFT does.
        if recipe.type == "svd" and recipe.clamp is None and len(A) < min(site.fan_out, site.fan_in):
            A, B = split_product(A, B, rank, recipe.driver)
        else:
            D = recipe.merge([wide(m.delta().detach()) for m in methods], weights)
            A, B = split(D, rank, recipe.clamp, recipe.driver)
        A, B = F.pad(A, (0, 0, 0, rank - len(A))), F.pad(B, (0, rank - B.shape[1]))
    tensors = {name_A: A.reshape(site.down(rank)), name_B: B.reshape(site.up(rank))}
    if biased := [(m, w) for m, w in zip(methods, weights, strict=True) if m.biased]:
        tasks = [m.scaling * wide(m.lora_B_bias.detach()) for m, _ in biased]
        tensors["lora_B_bias"] = recipe.merge(tasks, [w for _, w in biased])
    return tensors


# The methods that can be combined, by class name; another one is one more row.
COMBINERS: dict[str, Callable[..., dict[str, Tensor]]] = {"Lora": combine_pairs}


# ---------------------------------------------------------------------- of a model
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
    adapters = {name: graft.require(name) for name in names}
    _check(adapters)
    layers = {layer.path: layer.methods for a in adapters.values() for layer in a.layers}
    terms = list(zip(names, weights, strict=True))
    here = {path: layers[path] for path in graft.modules if path in layers}  # in the model's order
    parts = {path: [(methods[n][0], w) for n, w in terms if n in methods] for path, methods in here.items()}
    ranks = _ranks(parts, recipe)
    config = _config(list(adapters.values()), ranks, recipe)
    tensors = {}
    for path, part in parts.items():
        methods, own = [m for m, _ in part], [w for _, w in part]
        templates = {alias: t for m in methods for alias, t in m._leaves.items()}
        for alias, value in COMBINERS[type(methods[0]).__name__](methods, own, recipe, ranks[path]).items():
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
        if other := sorted({kind.__name__ for kind in kinds} - set(COMBINERS)):
            faults.append(f"'{name}' is made of {', '.join(other)}; only {', '.join(COMBINERS)} can be combined")
        if getattr(adapter.config, "target_parameters", None):
            faults.append(f"'{name}' adapts parameters by name (`target_parameters`)")
        if adapter.biases is not None:
            faults.append(f"'{name}' trains the base's biases, which only one adapter of a model can")
        if any(layer.mutator == name for layer in adapter.layers):
            faults.append(f"'{name}' changed the base's weights: save it with path_initial_model_for_weight_conversion")
    saved = [wrapper.name for adapter in adapters.values() for wrapper in adapter.saved]
    if shared := sorted({path for path in saved if saved.count(path) > 1}):
        faults.append(f"several target the same module with modules_to_save: {shared}")
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
            f"All adapters must have the same r value when using combination_type '{recipe.type}': they differ at "
            f"{', '.join(unequal[:5])}. Use 'cat' or a type that ends in 'svd'."
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
