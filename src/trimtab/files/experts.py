"""Mixture-of-experts models whose experts transformers 5 keeps in two parameters instead of one Linear each.

Configs and files that name the former Linears are read as what they mean today, as PEFT reads them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import ConfigError

FUSED, DOWN = "gate_up_proj", "down_proj"


@dataclass(frozen=True)
class Former:
    """What the Linears of one expert were called."""

    gate: str
    up: str
    down: str
    block: str = "mlp"

    @property
    def names(self) -> dict[str, str]:
        """Former name -> the parameter it is in today."""
        return {self.gate: FUSED, self.up: FUSED, self.down: DOWN}


# model_type: the names PEFT 0.21 rewrites.
FORMER = {
    "mixtral": Former("w1", "w3", "w2", "block_sparse_moe"),
    "qwen3_moe": Former("gate_proj", "up_proj", "down_proj"),
}


def rewrite(config: Any, model_type: str | None, modules: Iterable[str], linear: Iterable[str]) -> str:
    """Make a config that names former Linears, or "all-linear", name today's parameters, in place.

    Args:
        config: one that has `target_modules` and `target_parameters`.
        modules: the paths of the model's modules today.
        linear: what "all-linear" stands for among them.

    Returns:
        What was done, in a sentence, or "".

    Raises:
        ConfigError: one half of the fused gate and up projection is named without the other.
    """
    former, wanted = FORMER.get(str(model_type)), config.target_modules
    if former is None or not hasattr(config, "target_parameters"):
        return ""
    modules = list(modules)
    if isinstance(wanted, str):
        if wanted.lower() == "all-linear":
            found, rest = set(former.names), set(linear)
        else:
            experts = {f"{m}.0.{n}": n for m in modules if m.endswith(".experts") for n in former.names}
            experts |= {k.replace(".mlp.", f".{former.block}."): n for k, n in experts.items()}
            found = {n for path, n in experts.items() if re.fullmatch(wanted, path)}
            rest = {m for m in modules if re.fullmatch(wanted, m)}
    else:
        found = {n for w in wanted or () for n in former.names if w.rpartition(".")[2] == n}
        rest = {w for w in wanted or () if w.rpartition(".")[2] not in found}
    gates = {w for w in rest if w.rpartition(".")[2] == "gate"} if not isinstance(wanted, str) else set()
    if not found and not gates:
        return ""
    missing = {former.gate, former.up} - found
    if len(missing) == 1:
        other = ({former.gate, former.up} & found).pop()
        raise ConfigError(
            f"`target_modules` names '{other}' without '{missing.pop()}': in this model both are one parameter, {FUSED}"
        )
    parameters = {former.names[n] for n in found} | ({"gate.weight"} if gates else set())
    config.target_modules = rest - gates
    config.target_parameters = set(config.target_parameters or ()) | parameters
    if FUSED in parameters:  # two pairs in one
        config.rank_pattern = {**config.rank_pattern, rf".*\.{FUSED}": 2 * config.r}
        config.alpha_pattern = {**config.alpha_pattern, rf".*\.{FUSED}": 2 * config.lora_alpha}
    return (
        f"The experts of this model are parameters: `target_parameters` is {sorted(parameters)} in place of "
        f"{sorted(found | gates)}, with rank and alpha doubled for the two projections in {FUSED}."
        + (" The routers are left alone." if isinstance(wanted, str) and wanted.lower() == "all-linear" else "")
    )


def fuse(tensors: Mapping[str, Tensor], model_type: str | None) -> dict[str, Tensor]:
    """The tensors of a LoRA file with those of former Linears as the factors of today's parameters.

    The pair of the fused projection is (A_gate over A_up, B_gate and B_up on a diagonal), of twice the rank.
    """
    former = FORMER.get(str(model_type))
    if former is None:
        return dict(tensors)
    names = "|".join(former.names)
    pattern = re.compile(rf"(.*)\.(?:{former.block}|mlp)\.experts\.(\d+)\.({names})\.lora_([AB])\.weight")
    found: dict[str, dict[int, dict[str, Tensor]]] = {}
    out: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if match := pattern.fullmatch(key):
            path, expert, name, factor = match.groups()
            found.setdefault(f"{path}.mlp.experts", {}).setdefault(int(expert), {})[f"{name}.{factor}"] = tensor
        else:
            out[key.replace(f".{former.block}.", ".mlp.")] = tensor
    for path, experts in found.items():
        each = [experts[i] for i in sorted(experts)]
        names_here = {k.partition(".")[0] for k in each[0]}
        both = {former.gate, former.up} <= names_here
        if both:
            A = torch.cat([torch.cat([e[f"{former.gate}.A"], e[f"{former.up}.A"]]) for e in each])
            B = torch.stack([torch.block_diag(e[f"{former.gate}.B"], e[f"{former.up}.B"]) for e in each], -1).flatten(1)
            inner = f"{path}.base_layer" if former.down in names_here else path
            out |= {f"{inner}.lora_A.weight": A, f"{inner}.lora_B.weight": B}
        if former.down in names_here:
            A = torch.cat([e[f"{former.down}.A"] for e in each])
            B = torch.stack([e[f"{former.down}.B"] for e in each], -1).flatten(1)
            out |= {f"{path}.lora_A.weight": A, f"{path}.lora_B.weight": B}
    return out
