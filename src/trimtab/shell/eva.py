"""EVA's vectors from data, and an adapter that starts from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.errors import ConfigError
from trimtab.graft.graft import grafted
from trimtab.init.eva import Watched, distribute, gathered, in_processes
from trimtab.shell.starts import evaluating, hooked, moved, targets


def prepare_model_inputs_fn_language_modeling(model_input: Any, peft_config: Any) -> Any:
    """Which tokens EVA looks at: (their rows, their places), or None for all."""
    if not isinstance(model_input, Mapping):
        raise ValueError("When using `prepare_model_inputs_fn_language_modeling` inputs must be a dictionary")
    mask, settings = model_input.get("attention_mask"), peft_config.eva_config
    mask = torch.ones_like(model_input["input_ids"]) if mask is None else mask
    mask = mask.bool()
    if settings.use_label_mask and model_input.get("labels") is not None:
        mask = mask & (model_input["labels"] != settings.label_mask_value)
    return mask.nonzero()


def prepare_layer_inputs_fn_language_modeling(layer_input: Any, model_input: Any, layer_name: str) -> Tensor:
    """The rows (tokens, features) of a layer's input that EVA looks at."""
    x: Tensor = layer_input[0] if isinstance(layer_input, tuple | list) else layer_input
    if model_input is None or x.ndim != 3:
        return x.flatten(0, -2)
    return x[model_input[:, 0], model_input[:, 1]]


def forward_fn_dict(model: nn.Module, inputs: Any) -> Any:
    """The model's output for a batch that is a dict."""
    return model(**inputs)


@torch.no_grad()
def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Any],
    peft_config: Any = None,
    forward_fn: Callable[[nn.Module, Any], Any] | None = forward_fn_dict,
    prepare_model_inputs_fn: Callable[[Any, Any], Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Any = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """EVA's vectors: {layer: A (rank, in)}, the ranks shared out among the layers.

    Args:
        model: a model with an adapter, or a plain one with `peft_config`.
        dataloader: batches; it is gone through until all vectors have converged.
        prepare_layer_inputs_fn: a function of (a layer's input, what the one before gave, its name), or one by layer.
        gather_distributed_inputs: look at the rows of all processes, so that all find the same.
    """
    graft = grafted(model)
    if peft_config is None:
        if graft is None:
            raise ConfigError("get_eva_state_dict of a plain model needs a `peft_config`.")
        peft_config = graft.configs[adapter_name]
    if peft_config.init_lora_weights != "eva":
        raise ConfigError("`initialize_lora_eva_weights` can only be used with `init_lora_weights='eva'`")
    several = gather_distributed_inputs and in_processes(speak=True)
    layers, prefix = targets(model, graft, peft_config, adapter_name), "" if graft is None else "base_model.model."
    if not layers:
        raise ConfigError("EVA starts linear layers only, and the config selects none.")
    settings, ranks = peft_config.eva_config, {n: peft_config.resolve(n).r for n in layers}
    watched = {n: Watched(min(round(r * settings.rho), layers[n].in_features), settings.tau) for n, r in ranks.items()}
    left = set(layers)
    twins: dict[str, str] = {}
    seen: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.enter_context(hooked(layer, partial(seen.__setitem__, name)))
        if graft is not None:
            stack.enter_context(graft.off())
        stack.enter_context(evaluating(model))
        for batch in cycle(dataloader):
            batch = moved(batch, next(model.parameters()).device)
            chosen = prepare_model_inputs_fn(batch, peft_config) if prepare_model_inputs_fn else batch
            (forward_fn or forward_fn_dict)(model, batch)
            if not twins:  # layers that see one tensor share its vectors
                first: dict[tuple[int, int], str] = {}
                twins = {n: first.setdefault((id(x), watched[n].n), n) for n, x in seen.items()}
                left = {n for n, twin in twins.items() if n == twin}
            for name in sorted(left, key=list(layers).index):
                of = prepare_layer_inputs_fn
                of = of.get(name) if isinstance(of, Mapping) else of
                of = of or prepare_layer_inputs_fn_language_modeling
                rows = of(seen[name], chosen if prepare_model_inputs_fn else None, prefix + name)
                watched[name].see(gathered(rows) if several else rows)
            shares = {n: watched[twins[n]].pca.share for n in seen}
            if all(len(share) for share in shares.values()):
                given = distribute(shares, sum(ranks.values()))
                left = {n for n in set(twins.values()) if not _settled(n, watched, twins, given)}
            seen.clear()
            if not left:
                break
    found: dict[str, Tensor] = {}
    for name in sorted(twins, key=lambda n: n != twins[n]):
        pca, r = watched[twins[name]].pca, given[name]
        if pca.components is not None:
            A = pca.components[:r]
            found[prefix + name] = A / pca.values[:r, None].sqrt() if settings.whiten else A
    return found


def _settled(name: str, watched: Mapping[str, Watched], twins: Mapping[str, str], ranks: Mapping[str, int]) -> bool:
    """Whether a layer's vectors have converged, as far as it or a twin of it needs them."""
    need = max(ranks[n] for n, twin in twins.items() if twin == name)
    return bool(watched[name].converged[:need].all())


@torch.no_grad()
def initialize_lora_eva_weights(
    model: nn.Module,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: Mapping[str, Tensor] | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] | None = forward_fn_dict,
    prepare_model_inputs_fn: Callable[[Any, Any], Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Any = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Start an adapter with `init_lora_weights="eva"` from data (or from EVA's vectors, if they are there already).

    The adapter is made anew with the ranks that EVA gives its layers; those that get none are plain again.
    """
    graft = grafted(model)
    if graft is None or adapter_name not in graft.adapters:
        raise ConfigError(f"The model has no adapter '{adapter_name}' to start.")
    config = graft.configs[adapter_name].copy()
    if config.init_lora_weights != "eva":
        raise ConfigError("`initialize_lora_eva_weights` can only be used with `init_lora_weights='eva'`")
    if dataloader is None and eva_state_dict is None:
        raise ValueError("dataloader is required if eva_state_dict is not provided")
    vectors = eva_state_dict or get_eva_state_dict(
        model, dataloader or (), config, forward_fn, prepare_model_inputs_fn, prepare_layer_inputs_fn, adapter_name,
        gather_distributed_inputs, show_progress_bar,
    )  # fmt: skip
    vectors = {key.removeprefix("base_model.model."): A for key, A in vectors.items()}
    before = targets(model, graft, config, adapter_name)
    if unknown := [n for n in vectors if n not in before]:
        raise ConfigError(f"The EVA vectors are of layers that the adapter does not have: {unknown[:5]}.")
    others = [t.name for t in graft.adapters[adapter_name].targets if t.name not in before]
    kept = [n for n in before if len(vectors.get(n, ()))]
    patterns = {n: config.resolve(n) for n in kept}
    config.rank_pattern, config.alpha_pattern = {}, {}
    for name in kept:
        r, old = len(vectors[name]), patterns[name]
        alpha = old.lora_alpha * r / old.r if config.eva_config.adjust_scaling_factors else old.lora_alpha
        if r != config.r:
            config.rank_pattern[name] = r
        if alpha != config.lora_alpha:
            config.alpha_pattern[name] = alpha
    config.target_modules = {*kept, *others}
    active, trainable = list(graft.board.route.active), graft.adapters[adapter_name].trainable
    graft.set_active([])
    graft.delete(adapter_name)
    graft.add(adapter_name, config, trainable=trainable)
    graft.set_active(active, trainable=None)
    for layer in graft.adapters[adapter_name].layers:
        for method in layer.methods[adapter_name]:
            if method.site.name in kept:
                method.put(vectors[method.site.name].to(method.factors[0]), torch.zeros_like(method.matrices[1]))  # type: ignore[attr-defined]
