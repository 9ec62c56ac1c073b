"""Rank schedules, routers, wavelets and aLoRA's offsets as peft's programs call them, on trimtab's methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.layer.adapted import AdaptedLayer
from trimtab.methods.adalora import AVERAGES, AdaLora
from trimtab.methods.alora import invoked
from trimtab.methods.poly import LEAST, shares
from trimtab.methods.waveft import FAMILIES, filters_of, length_of
from trimtab.shell.arrow import GENERAL, TASK
from trimtab.shell.state import locate_graft

GKS_ADAPTER_PREFIX, TASK_ADAPTER_PREFIX = GENERAL, TASK
EPS = LEAST
WAVELET_REDUCTIONS = {name: (length_of(name) - 2,) * 2 for name in FAMILIES}

__all__ = [
    "EPS",
    "GKS_ADAPTER_PREFIX",
    "TASK_ADAPTER_PREFIX",
    "WAVELET_REDUCTIONS",
    "PolyRouter",
    "RankAllocator",
    "Router",
    "Wavelet",
    "WaveletDetailTuple2d",
    "WaveletTensorTuple",
    "calculate_alora_offsets",
    "check_loaded_lora_compatibility_arrow",
    "ensure_adapters_target_linear_layers_only",
    "get_alora_offsets_for_forward",
    "get_alora_offsets_for_generate",
    "get_router",
    "is_alora_relevant_in_batch",
    "minimal_wavelet",
    "wavelist",
    "waverec2d",
]


# ------------------------------------------------------------------ AdaLoRA
class RankAllocator:
    """The budget of an AdaLoRA adapter, for loops of one's own; `model.update_and_allocate(step)` does all of it."""

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str) -> None:
        self.model, self.peft_config, self.adapter_name = model, peft_config, adapter_name

    def _methods(self, model: nn.Module | None = None) -> Sequence[Any]:
        graft = locate_graft(self.model if model is None else model)[0]
        return [m for m in graft.require(self.adapter_name).formulas if isinstance(m, AdaLora)]

    def set_total_step(self, total_step: int) -> None:
        """Set how many steps the whole training has."""
        self.peft_config.total_step = total_step

    @torch.no_grad()
    def reset_ipt(self) -> None:
        """Forget the averages of sensitivity and uncertainty."""
        for method in self._methods():
            for average in AVERAGES:
                for name in "ABE":
                    method.tensor(f"{average}_{name}").zero_()

    def budget_schedule(self, step: int) -> tuple[int, bool]:
        """(How many triplets are left at a step, whether they are cut at it)."""
        return AdaLora.budget(self._methods(), self.peft_config, step)

    def update_ipt(self, model: nn.Module) -> None:
        """Take the gradients into the averages."""
        for method in self._methods(model):
            method.observe(self.peft_config.beta1, self.peft_config.beta2)

    def mask_to_budget(self, model: nn.Module, budget: int) -> dict[str, list[bool]]:
        """Leave the triplets of most importance; {layer's lora_E: which are left}."""
        methods = self._methods(model)
        own = methods[0].options
        own.rank_pattern = {m.key: [True] * len(m.lora_E) for m in methods}
        AdaLora.cut(methods, own, budget)
        self.peft_config.rank_pattern = own.rank_pattern
        return {f"base_model.model.{m.key}.{self.adapter_name}": own.rank_pattern[m.key] for m in methods}

    def update_and_allocate(
        self, model: nn.Module, global_step: int, force_mask: bool = False
    ) -> tuple[int, dict[str, list[bool]] | None]:
        """(The budget at a step, what is left of each layer where it was cut)."""
        end = self.peft_config.total_step - self.peft_config.tfinal
        if global_step < end:
            self.update_ipt(model)
        budget, due = self.budget_schedule(global_step)
        return budget, self.mask_to_budget(model, budget) if due or force_mask else None

    def mask_using_rank_pattern(self, model: nn.Module, rank_pattern: Mapping[str, list[bool]]) -> None:
        """Set to zero what a pattern leaves out."""
        methods = self._methods(model)
        own = methods[0].options
        bare = lambda key: key.removeprefix("base_model.model.").removesuffix(f".{self.adapter_name}")
        own.rank_pattern = {bare(key): left for key, left in rank_pattern.items()}
        AdaLora.mask(methods, own)


# ------------------------------------------------------------------ Poly
class Router(nn.Module):
    """A router among skills."""

    def reset(self) -> None:
        """Start anew."""
        raise NotImplementedError

    def forward(self, task_ids: Tensor, input_ids: Tensor) -> Tensor:
        """How much of each skill each row uses (rows, splits, skills)."""
        raise NotImplementedError


class PolyRouter(Router):
    """Poly's router by tasks; in training its choices are those of relaxed Bernoulli variables."""

    def __init__(self, poly_config: Any) -> None:
        super().__init__()
        self.poly_type, self.n_tasks = poly_config.poly_type, poly_config.n_tasks
        self.n_skills, self.n_splits = poly_config.n_skills, poly_config.n_splits
        self.module_logits = nn.Parameter(torch.empty(self.n_tasks, self.n_splits * self.n_skills))

    def reset(self) -> None:
        """Start near one half for all."""
        nn.init.uniform_(self.module_logits, -1e-3, 1e-3)

    def forward(self, task_ids: Tensor | None, input_ids: Tensor) -> Tensor:
        """How much of each skill each row uses (rows, splits, skills)."""
        if task_ids is None:
            raise ValueError("task_ids should not be None.")
        logits = self.module_logits[task_ids].unflatten(-1, (self.n_splits, self.n_skills))
        return shares(logits, torch.rand_like(logits) if self.training else None)


def get_router(poly_config: Any) -> nn.Module:
    """The router that a config asks for."""
    if poly_config.poly_type != "poly":
        raise ValueError(f"Unsupported poly_type: {poly_config.poly_type}. Currently, only 'poly' is supported.")
    return PolyRouter(poly_config)


# ------------------------------------------------------------------ wavelets
class Wavelet:
    """A wavelet by name: the filters that take apart (`dec_*`) and put together (`rec_*`), as lists."""

    def __init__(self, name: str) -> None:
        if name not in wavelist():
            raise ValueError(f"Unknown wavelet name '{name}'. Available wavelets: {wavelist()}")
        self.name = name
        low, high = filters_of("db1" if name == "haar" else name)
        self.rec_lo, self.rec_hi = low.tolist(), high.tolist()
        self.dec_lo, self.dec_hi = low.flip(0).tolist(), high.flip(0).tolist()
        self.dec_len = self.rec_len = len(low)

    @property
    def filter_bank(self) -> tuple[list[float], ...]:
        """(dec_lo, dec_hi, rec_lo, rec_hi)"""
        return self.dec_lo, self.dec_hi, self.rec_lo, self.rec_hi


minimal_wavelet = Wavelet


def wavelist() -> list[str]:
    """The names of the wavelets there are."""
    return [*FAMILIES, "haar"]


class WaveletDetailTuple2d(NamedTuple):
    """The details of one level: along rows, along columns, along both."""

    horizontal: Tensor
    vertical: Tensor
    diagonal: Tensor


class WaveletTensorTuple(NamedTuple):
    """A wavelet's filters as tensors."""

    dec_lo: Tensor
    dec_hi: Tensor
    rec_lo: Tensor
    rec_hi: Tensor

    @classmethod
    def from_wavelet(cls, wavelet: Any, dtype: torch.dtype) -> WaveletTensorTuple:
        """The filters of a wavelet."""
        return cls(*(torch.tensor(part, dtype=dtype) for part in wavelet.filter_bank))


def spread(f: Tensor, filters: Tensor, size: int) -> Tensor:
    """Rows of coefficients (k, averages | details) -> rows of numbers (k, size): one step of the inverse transform."""
    cut = filters.shape[1] - 2
    return F.conv_transpose1d(f.unflatten(1, (2, -1)), filters[:, None], stride=2)[:, 0, cut : cut + size]


def waverec2d(coeffs: tuple[Any, ...], wavelet: Any, axes: tuple[int, int] = (-2, -1)) -> Tensor:
    """Averages and, level by level, details (horizontal, vertical, diagonal) -> the matrices (..., rows, columns)."""
    bank = Wavelet(wavelet) if isinstance(wavelet, str) else wavelet
    place = lambda M: M.movedim(axes, (-2, -1))
    found: Tensor = place(coeffs[0])
    filters = torch.tensor([bank.rec_lo, bank.rec_hi], dtype=found.dtype, device=found.device)

    def joined(low: Tensor, high: Tensor) -> Tensor:
        f = torch.cat([low, high], -1)
        return spread(f.flatten(0, -2), filters, 2 * low.shape[-1] - len(bank.rec_lo) + 2).unflatten(0, f.shape[:-1])

    for details in coeffs[1:]:
        h, v, d = map(place, details)
        found = found[..., : h.shape[-2], : h.shape[-1]]  # a level below may be larger by one
        found = joined(joined(found, v).mT, joined(h, d).mT).mT
    return found.movedim((-2, -1), axes)


# ------------------------------------------------------------------ aLoRA, Arrow
def calculate_alora_offsets(
    peft_config: Mapping[str, Any], active_adapter: str, input_ids: Tensor, adapter_names: Sequence[str] | None = None
) -> list[int | None]:
    """On how many of its last tokens each row's adapter acts; None: on none, or it is no aLoRA."""
    found: list[int | None] = []
    for row, name in zip(input_ids, adapter_names or [active_adapter] * len(input_ids), strict=True):
        tokens = getattr(peft_config.get(name), "alora_invocation_tokens", None)
        found.append((int(invoked(row[None], torch.tensor(tokens))[0]) or None) if tokens else None)
    return found


def is_alora_relevant_in_batch(model: Any, adapter_names: Sequence[str] | None = None) -> bool:
    """Whether the active adapter, or one of those named, is an aLoRA."""
    names = {model.active_adapter, *(adapter_names or ())}
    return any(getattr(model.peft_config.get(n), "alora_invocation_tokens", None) for n in names)


def _with_offsets(model: Any, input_ids: Tensor | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    names = kwargs.get("adapter_names")
    if not is_alora_relevant_in_batch(model, names):
        return kwargs
    found = None if input_ids is None else calculate_alora_offsets(
        model.peft_config, model.active_adapter, input_ids, names)  # fmt: skip
    return {**kwargs, "alora_offsets": found}


def get_alora_offsets_for_forward(
    model: Any, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **kwargs: Any
) -> dict[str, Any]:
    """The keyword arguments, and `alora_offsets` where an aLoRA is active."""
    return _with_offsets(model, input_ids, kwargs)


def get_alora_offsets_for_generate(model: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The same for a generation, whose tokens are the first argument or `input_ids`."""
    return _with_offsets(model, kwargs.get("input_ids", args[0] if args else None), kwargs)


def check_loaded_lora_compatibility_arrow(model: nn.Module, adapter_names: Sequence[str]) -> None:
    """Raise a ValueError unless adapters are of one shape and scale in every layer, as a router among them needs."""
    for path, layer in model.named_modules():
        if isinstance(layer, AdaptedLayer):
            found = {name: _shape(layer, name) for name in adapter_names}
            if len(set(found.values())) > 1:
                raise ValueError(f"'{path}': the adapters are of different shapes or scales: {found}.")


def _shape(layer: AdaptedLayer, name: str) -> tuple[Any, ...]:
    return tuple((type(m).__name__, tuple(m.declared.items()), m.scaling) for m in layer.methods.get(name, ()))


def ensure_adapters_target_linear_layers_only(model: nn.Module, adapter_names: Sequence[str]) -> None:
    """Raise a TypeError where one of the adapters adapts another kind of layer."""
    for path, layer in model.named_modules():
        if isinstance(layer, AdaptedLayer):
            for name in adapter_names:
                if any(method.site.kind != "linear" for method in layer.methods.get(name, ())):
                    raise TypeError(f"Arrow is for linear layers, and '{name}' adapts '{path}'.")
