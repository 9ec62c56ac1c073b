"""Mixture-of-experts models whose experts transformers 5 keeps in a few parameters instead of one Linear each.

Configs and files that name the former Linears are read as what they mean today. Which Linears are in which parameter is
read off transformers' own table of conversions.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.config import match_pattern
from trimtab.core.targets import inside, layer_index, matches
from trimtab.errors import AdapterFileError, ConfigError
from trimtab.files.codec import PREFIX
from trimtab.files.conversion import Names, borrowed

ROUTERS = ("gate", "router")  # what stands beside the experts and chooses among them


@dataclass
class Stack:
    """The experts of one layer.

    Attributes:
        merged: parameter -> the former Linears of an expert whose rows it holds, in their order.
    """

    path: str
    module: nn.Module
    merged: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def parameters(self) -> list[str]:
        """The parameters that hold a matrix for each expert."""
        return [n for n, p in self.module._parameters.items() if p is not None and p.ndim == 3]

    def former(self, linear: str, expert: int = 0) -> str:
        """The path that a Linear of an expert had."""
        return f"{self.path}.{expert}.{linear}"


def stacks(names: Names) -> list[Stack]:
    """The model's stacks of experts, with what each parameter was."""
    found = [
        Stack(path, module)
        for path, module in names.modules.items()
        if path.endswith("experts") and _last(path) == "experts"
    ]
    found = [stack for stack in found if stack.parameters]
    for transform in names.transforms if found else ():
        sources = [pattern.replace("\\", "") for pattern in transform.source_patterns]
        linears = [source.split(".")[-2] for source in sources if "experts.*." in source]
        steps = [type(step).__name__ for step in getattr(transform, "operations", ())]
        if not linears or steps not in (["MergeModulelist"], ["MergeModulelist", "Concatenate"]):
            continue
        for stack in found:
            keys = {transform.rename_source_key(f"{stack.former(linear)}.weight")[0] for linear in linears}
            parameter = keys.pop().removeprefix(f"{stack.path}.")
            if not keys and parameter in stack.parameters:
                stack.merged[parameter] = tuple(linears)
    return found


def fused(model: nn.Module, modules: Mapping[str, Any]) -> bool:
    """Whether a model has experts two of whose Linears are one parameter: those PEFT gives no default targets."""
    return any(len(linears) > 1 for stack in stacks(Names(model, modules)) for linears in stack.merged.values())


# ---------------------------------------------------------------------- configs
def rewrite(config: Any, model: nn.Module, modules: Mapping[str, Any], linear: Collection[str]) -> str:
    """Make a config that names former modules, or "all-linear", name today's modules and parameters, in place.

    Args:
        config: one that has `target_modules`.
        modules: the model's modules by path, without adapters.
        linear: what "all-linear" stands for among them.

    Returns:
        What was done and what is left out, in a sentence or more, or "".

    Raises:
        ConfigError: one half of a fused projection is named without the other.
    """
    names = Names(model, modules)
    said = names.update(config)
    found = stacks(names) if config.target_modules else []
    return " ".join(filter(None, [said, Rewriting(config, names, found, linear).run() if found else ""]))


class Rewriting:
    """One config on its way to today's names of experts, in a model that has some.

    Names that fit layers of today as well as former ones of experts are read as PEFT reads them: as experts alone in
    the models that transformers converts as others, as today's layers alone in the rest. A file knows better: what it
    has tensors of is meant.
    """

    def __init__(self, config: Any, names: Names, found: list[Stack], linear: Collection[str]) -> None:
        self.config, self.names, self.found, self.linear = config, names, found, linear
        wanted = config.target_modules
        self.every = isinstance(wanted, str) and wanted.lower() == "all-linear"
        self.able = hasattr(config, "target_parameters") and "rank_pattern" in config.patterns  # parts have own ranks
        self.held: Collection[str] | None = config.__dict__.get("held")  # the modules that a file has tensors of
        self.borrowed = borrowed(names.model)
        self.standing = set() if self.every else {matches(wanted, path) for path in names.modules} - {None}
        self.forms = {  # the former paths of a Linear: under today's names of what is around it, and under theirs
            (stack.path, linear): {stack.former(linear), *names.before(stack.former(linear))}
            for stack in found
            for linears in stack.merged.values()
            for linear in linears
        }

    def run(self) -> str:
        """Change the config; returns what is to be said."""
        config, said = self.config, []
        chosen = self.chosen() if self.able else {}
        routers = self.routers() if self.able and not isinstance(config.target_modules, str) else {}
        named = {*routers.values(), *self.named(chosen)}
        meant = self.every or self.speaks_of_experts()
        gone, left = self.clear(set(routers), bool(chosen))
        if named:
            self.share_ranks(chosen)
            config.target_parameters = set(config.target_parameters or ()) | named
            said.append(
                f"The experts of this model are parameters: `target_parameters` has {sorted(named)} for {gone}; "
                "one that holds two projections has the ranks of both."
            )
        if left:
            said.append(
                f"Other layers of such names, {left}, are left out, as in PEFT, which could not read them back; to "
                "adapt them, name their weights in `target_parameters`."
            )
        if self.every:
            said.append("The routers are left alone.")
        if meant and (out := self.left_out(chosen)):
            how = "to adapt them, name them in `target_parameters`" if self.able else "this method adapts layers only"
            said.append(f"The experts' parameters {out} are left out: {how}.")
        return " ".join(said)

    def left_out(self, chosen: Mapping[str, list[Stack]]) -> list[str]:
        """The parameters of experts that are not adapted, and of which no file says that they are not."""
        entries = getattr(self.config, "target_parameters", None)
        return sorted(
            {
                parameter
                for stack in self.found
                for parameter in stack.parameters
                if stack not in chosen.get(parameter, ()) and (self.held is None or stack.path in self.held)
                if matches(entries, f"{stack.path}.{parameter}") is None
            }
        )

    def chosen(self) -> dict[str, list[Stack]]:
        """Parameter -> the stacks whose former Linears the config selects."""
        wanted = self.config.target_modules
        if self.held is None and not self.every and not self.borrowed:
            wanted = () if isinstance(wanted, str) and self.standing else wanted
            wanted = wanted if isinstance(wanted, str) else set(wanted) - self.standing
        chosen: dict[str, list[Stack]] = {}
        for stack in self.found if self.held is None else [s for s in self.found if s.path in self.held]:
            for parameter, linears in stack.merged.items():
                if matches(self.config.target_parameters, f"{stack.path}.{parameter}") is not None:
                    continue  # the config speaks of today's parameters already
                hits = [
                    linear for linear in linears if self.selects(_any_expert(wanted), self.forms[stack.path, linear])
                ]
                if hits and len(hits) < len(linears):
                    other = next(linear for linear in linears if linear not in hits)
                    raise ConfigError(
                        f"`target_modules` names '{hits[0]}' without '{other}': in this model both are one parameter, "
                        f"{parameter}."
                    )
                if hits:
                    chosen.setdefault(parameter, []).append(stack)
        return chosen

    def selects(self, wanted: Any, forms: set[str]) -> bool:
        """Whether the config, with these `target_modules`, selects a Linear of that former path."""
        config = self.config
        if not self.every and not any(matches(wanted, form) for form in forms):
            return False
        if any(matches(config.exclude_modules, form) or inside(config.modules_to_save, form) for form in forms):
            return False
        layers = config.layers_to_transform
        indices = {layers} if isinstance(layers, int) else set(layers or ())
        return not indices or any(layer_index(form, config.layers_pattern) in indices for form in forms)

    def speaks_of_experts(self) -> bool:
        """Whether the config names former Linears, or something that is nothing today."""
        wanted = _any_expert(self.config.target_modules)
        former = any(matches(wanted, form) for forms in self.forms.values() for form in forms)
        return former or (not isinstance(wanted, str) and len(self.standing) < len(wanted))

    def routers(self) -> dict[str, str]:
        """Entry of `target_modules` that names routers -> the parameter they are."""
        found = {}
        for path, module in self.names.modules.items():
            own = module._parameters.get("weight")
            if _routes(path, self.names.modules) and not isinstance(module, nn.Linear) and own is not None:
                for form in (path, *self.names.before(path)):
                    if (entry := matches(self.config.target_modules, form)) is not None:
                        found[entry] = f"{_last(path)}.weight"
        return found

    def clear(self, routers: set[str], changed: bool) -> tuple[list[str], list[str]]:
        """Leave in `target_modules` what layers of today are meant by; (what goes, layers of today that go with it)."""
        config, wanted, modules = self.config, self.config.target_modules, self.names.modules
        formers = {linear for _, linear in self.forms}
        if not (changed or routers or self.every):
            return [], []
        if self.every:
            paths = {p for p in self.linear if not _routes(p, modules) and not inside(config.modules_to_save, p)}
        else:
            paths = {path for path in modules if matches(wanted, path) not in (None, *routers)}
        if self.held is not None:
            left = {path for path in paths if path not in self.held and _last(path) in formers}
        else:
            left = {path for path in paths if changed and self.borrowed and _last(path) in formers}
        rest = paths - left
        if self.every or isinstance(wanted, str):
            config.target_modules = rest
            return sorted(formers) if self.every else [wanted], [] if self.held else _endings(left)
        kept = {matches(wanted, path) for path in rest}
        unknown = {e for e in wanted if e not in self.standing and _last(e) not in formers}
        config.target_modules = ({e for e in wanted if e in kept} | unknown) - routers
        return sorted(set(wanted) - config.target_modules) or sorted(formers), [] if self.held else _endings(left)

    def named(self, chosen: Mapping[str, list[Stack]]) -> set[str]:
        """The entries of `target_parameters`: a name alone where it stands for every stack that has it."""
        named = set()
        for parameter, some in chosen.items():
            whole = len(some) == sum(parameter in stack.parameters for stack in self.found)
            named |= {parameter} if whole else {f"{stack.path}.{parameter}" for stack in some}
        return named

    # ------------------------------------------------------------------ ranks
    def share_ranks(self, chosen: Mapping[str, list[Stack]]) -> None:
        """Give each parameter the sum of the ranks of the Linears it holds, at the scale they have."""
        config = self.config
        new: dict[str, dict[str, float]] = {"rank_pattern": {}, "alpha_pattern": {}}
        for parameter, some in chosen.items():
            each = {stack.path: self.rank(stack, parameter) for stack in some}
            alike = parameter in self.named({parameter: some}) and len(set(each.values())) == 1
            for path, (r, alpha) in each.items():
                key = rf".*\.{parameter}" if alike else re.escape(f"{path}.{parameter}")
                if (r, alpha) != (config.r, config.lora_alpha):
                    new["rank_pattern"][key], new["alpha_pattern"][key] = r, alpha
        formers = {form for forms in self.forms.values() for form in forms}
        today = {*self.names.modules, *(f"{stack.path}.{p}" for stack in self.found for p in stack.parameters)}
        fits = lambda key, paths: any(match_pattern([key], path) for path in paths)
        for name, entries in new.items():
            old = {k: v for k, v in (getattr(config, name) or {}).items() if fits(k, today) or not fits(k, formers)}
            setattr(config, name, {**entries, **old})

    def rank(self, stack: Stack, parameter: str) -> tuple[int, float]:
        """(rank, alpha) of a parameter: its rows are those of one Linear after another, each with its own pair."""
        config, linears = self.config, stack.merged[parameter]
        pairs: list[tuple[int, float]] = []
        for linear in linears:
            r, alpha = config.r, config.lora_alpha
            for form in self.forms[stack.path, linear]:
                r = config.rank_pattern.get(match_pattern(config.rank_pattern, form), r)
                alpha = config.alpha_pattern.get(match_pattern(config.alpha_pattern, form), alpha)
            pairs.append((r, alpha))
        total, root = sum(r for r, _ in pairs), 0.5 if config.use_rslora else 1.0
        if len({alpha / r**root for r, alpha in pairs}) > 1:
            raise ConfigError(
                f"`rank_pattern` and `alpha_pattern` give {list(linears)} different scales: in this model they are one "
                f"parameter, {parameter}, and have one."
            )
        r, alpha = pairs[0]
        alpha = alpha * (total / r) ** root
        return total, int(alpha) if alpha == int(alpha) else alpha


def _any_expert(wanted: Any) -> Any:
    """Names of one expert's layers as those of the first: whichever is named, its stack is one parameter."""
    if isinstance(wanted, str):
        return wanted
    return {re.sub(r"(^|\.)experts\.\d+\.", r"\1experts.0.", name) for name in wanted}


def _routes(path: str, modules: Mapping[str, Any]) -> bool:
    """Whether a module is, or is part of, one that chooses among experts beside it."""
    parts = path.split(".")
    return any(p in ROUTERS and ".".join([*parts[:i], "experts"]) in modules for i, p in enumerate(parts))


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _endings(paths: Collection[str]) -> list[str]:
    """Paths without what comes before their last two names."""
    return sorted({".".join(path.split(".")[-2:]) for path in paths})


def note_held(config: Any, tensors: Mapping[str, Tensor], names: Names) -> None:
    """Note in a config the modules that a file has tensors of, where names in it may mean experts or other layers."""
    if getattr(config, "target_modules", None) and hasattr(config, "target_parameters") and stacks(names):
        config.__dict__["held"] = frozenset(names.split(key)[0] for key in tensors)


# ---------------------------------------------------------------------- files
def fuse(tensors: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    """The tensors of a file with those of former Linears as the factors of today's parameters.

    The pair of a fused projection is (A_gate over A_up, B_gate and B_up on a diagonal), of both ranks together.

    Raises:
        AdapterFileError: the experts of one layer have pairs of different shapes.
    """
    if not any(re.search(r"\.experts\.\d+\.", key) for key in tensors):
        return dict(tensors)
    found = {stack.path: stack for stack in stacks(names)}
    out: dict[str, Tensor] = {}
    pairs: dict[str, dict[tuple[str, str, int], Tensor]] = {path: {} for path in found}  # (linear, A or B, expert)
    for key, tensor in tensors.items():
        new = names.today(key)
        hit = re.fullmatch(
            rf"{re.escape(PREFIX)}(.*\.experts|experts)\.(\d+)\.([^.]+)\.lora_([AB])(?:\.[^.]+)?\.weight", new
        )
        stack = found.get(hit[1]) if hit else None
        if hit and stack and any(hit[3] in linears for linears in stack.merged.values()):
            pairs[stack.path][hit[3], hit[4], int(hit[2])] = tensor
        else:
            out[key] = tensor
    for path, own in pairs.items():
        out |= _stacked(found[path], own) if own else {}
    return out


def _stacked(stack: Stack, pairs: dict[tuple[str, str, int], Tensor]) -> dict[str, Tensor]:
    """The factors of a stack's parameters; the first parameter's stand innermost, as PEFT nests them."""
    linears = {linear for linear, _, _ in pairs}
    held = [p for p in stack.parameters if linears & set(stack.merged.get(p, ()))]
    out: dict[str, Tensor] = {}
    for depth, parameter in enumerate(reversed(held)):
        count = len(stack.module._parameters[parameter])  # type: ignore[arg-type]
        try:
            each = [_pair(stack.merged[parameter], pairs, expert) for expert in range(count)]
            A, B = torch.cat([a for a, _ in each]), torch.stack([b for _, b in each], -1).flatten(1)
        except (RuntimeError, LookupError) as error:
            raise AdapterFileError(
                f"The tensors of the experts of '{stack.path}' cannot be stacked: {parameter} holds "
                f"{list(stack.merged[parameter])} of every expert, each with a pair of one shape ({error})."
            ) from error
        place = f"{PREFIX}{stack.path}{'.base_layer' * depth}"
        out |= {f"{place}.lora_A.weight": A, f"{place}.lora_B.weight": B}
    return out


def _pair(linears: tuple[str, ...], pairs: Mapping[tuple[str, str, int], Tensor], expert: int) -> tuple[Tensor, Tensor]:
    """(A, B) of a parameter for one expert; where a file has no pair for it, it was not adapted: zeros."""
    if alone := [n for n in linears if ((n, "A", expert) in pairs) != ((n, "B", expert) in pairs)]:
        raise LookupError(f"expert {expert} has one factor of {alone}, but not the other")
    shapes = {(linear, factor): tensor for (linear, factor, _), tensor in pairs.items()}
    get = lambda linear, factor: pairs.get((linear, factor, expert), torch.zeros_like(shapes[linear, factor]))
    return torch.cat([get(n, "A") for n in linears]), torch.block_diag(*(get(n, "B") for n in linears))
