"""What starts of a LoRA need beforehand: data seen by the model (CorDA), a gradient (LoRA-GA), weights (LoftQ)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.report import warn
from trimtab.errors import AdapterFileError, ConfigError
from trimtab.files.sources import resolve_base
from trimtab.formats import weights
from trimtab.graft.base import Base
from trimtab.graft.graft import Graft, grafted
from trimtab.graft.selection import choose
from trimtab.init.corda import CordaEigens, components
from trimtab.init.loftq import low_rank
from trimtab.init.lora_ga import GRADIENT
from trimtab.methods import method_class


# ---------------------------------------------------------------------- CorDA, LoRA-GA
@torch.no_grad()
def preprocess_corda(
    model: nn.Module,
    lora_config: Any,
    run_model: Callable[[], Any] | None = None,
    hooked_model: nn.Module | None = None,
) -> None:
    """Find the components that an adapter with `init_lora_weights="corda"` starts from; call it on the plain model.

    Args:
        run_model: runs the model on the data; not needed where the config's files hold what it would give.
        hooked_model: the model it runs, where that is another object than `model`.
    """
    config, settings = lora_config, lora_config.corda_config
    if settings is None:
        raise ConfigError("preprocess_corda needs a config with `corda_config`.")
    layers = targets(model, None, config, "")
    cache = settings.cache_file
    kept = torch.load(cache, map_location="cpu", weights_only=True) if cache and Path(cache).exists() else None
    covariances = None if kept is not None else _covariances(layers, settings, run_model, hooked_model or model)
    for name, layer in layers.items():
        if settings.verbose:
            print(f"CorDA: {name}")
        r = config.resolve(name).r
        W = weights.read(layer, layer.weight)
        W = W.T if type(layer).__name__ == "Conv1D" else W
        if kept is not None:
            parts = {p: kept[f"{name}.eigens.{p}"].to(W.device) for p in ("S_WC", "U_WC", "V_WC")}
            layer.__dict__["eigens"] = CordaEigens(**parts)
        else:
            assert covariances is not None
            layer.__dict__["eigens"] = components(W, covariances[name].to(W.device), r, settings.corda_method)
    if cache and kept is None:
        out = {f"{n}.eigens.{p}": t.cpu() for n, x in layers.items() for p, t in vars(x.__dict__["eigens"]).items()}
        Path(cache).parent.mkdir(parents=True, exist_ok=True)
        torch.save(out, cache)


def _covariances(layers: Mapping[str, Any], settings: Any, run: Any, runner: nn.Module) -> dict[str, Tensor]:
    """The mean over forwards of XᵀX for each layer's input X, scaled to a largest entry of 1."""
    file = settings.covariance_file
    if file and Path(file).exists():
        saved = torch.load(file, map_location="cpu", weights_only=True)
        return {n: saved[n] for n in layers}
    if run is None:
        raise ValueError("run_model must be specified when covariance file and cache file aren't built")
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(layers, 0)

    def note(name: str, x: Tensor) -> None:
        X = x.detach().flatten(0, -2)
        X = X.to(torch.float16 if settings.use_float16_for_covariance else torch.float32)
        X = X / X.max().abs()
        C = X.T @ X
        if not torch.isfinite(C).all():
            raise ValueError(f"The inputs of '{name}' give a covariance that is not finite.")
        sums[name] = sums[name] + C if name in sums else C
        counts[name] += 1

    with ExitStack() as stack:
        for name in layers:
            stack.enter_context(hooked(runner.get_submodule(name), partial(note, name)))
        stack.enter_context(evaluating(runner))
        run()
    if missed := [n for n in layers if n not in sums]:
        raise ConfigError(f"`run_model` never called these layers: {missed[:5]}.")
    means = {n: C.float() / counts[n] for n, C in sums.items()}
    if file:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        torch.save({n: C.cpu() for n, C in means.items()}, file)
    return means


def preprocess_loraga(
    model: nn.Module, lora_config: Any, train_step: Callable[[], Any], cache_file: str | None = None
) -> None:
    """Find the gradients that an adapter with `init_lora_weights="lora_ga"` starts from; call it on the plain model.

    Args:
        train_step: runs forward and backward on some batches, without an optimiser.
        cache_file: where the gradients are kept; it is read instead, if it is there.
    """
    layers = targets(model, None, lora_config, "")
    if cache_file and Path(cache_file).exists():
        found = torch.load(cache_file, map_location="cpu", weights_only=True)
    else:
        asked = {p: p.requires_grad for p in model.parameters()}
        held = {p: p.grad for p in asked}
        for parameter in asked:
            parameter.requires_grad_(False)
            parameter.grad = None
        sums: dict[str, Tensor] = {}
        with ExitStack() as stack:
            for name, layer in layers.items():
                layer.weight.requires_grad_(True)

                def note(parameter: Tensor, name: str = name) -> None:
                    G = parameter.grad.detach().float().cpu()  # type: ignore[union-attr]
                    sums[name] = sums[name] + G if name in sums else G
                    parameter.grad = None

                stack.callback(layer.weight.register_post_accumulate_grad_hook(note).remove)
            train_step()
        for parameter, wanted in asked.items():
            parameter.requires_grad_(wanted)
            parameter.grad = held[parameter]
        if missed := [n for n in layers if n not in sums]:
            raise ConfigError(f"`train_step` gave these layers no gradient: {missed[:5]}.")
        found = {f"{name}.{GRADIENT}": G for name, G in sums.items()}
        if cache_file:
            Path(cache_file).parent.mkdir(parents=True, exist_ok=True)
            torch.save(found, cache_file)
    for name, layer in layers.items():
        layer.__dict__[GRADIENT] = found[f"{name}.{GRADIENT}"]


# ---------------------------------------------------------------------- LoftQ
@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: Any,
    model_path: str | None = None,
    adapter_name: str = "default",
    callback: Callable[[Any, str], bool] | None = None,
) -> None:
    """Start an adapter of a quantised model from what quantising lost: s·B·A = the best part of W - Q.

    Args:
        model_path: the folder (or a file) of the model before it was quantised, in safetensors.
        callback: asked after each layer with (model, name) whether its new pair stays.
    """
    from safetensors import safe_open

    graft = grafted(peft_model)
    if graft is None or adapter_name not in graft.adapters:
        raise ConfigError(f"The model has no adapter '{adapter_name}' to start.")
    if model_path is None and not graft.configs[adapter_name].base_model_name_or_path:
        raise ConfigError("The model does not say where it was loaded from: pass `model_path`.")
    path = Path(model_path or resolve_base(graft.configs[adapter_name].base_model_name_or_path))
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    where: dict[str, Path] = {}
    for file in files:
        with safe_open(str(file), framework="pt") as opened:  # type: ignore[no-untyped-call]
            where |= dict.fromkeys(opened.keys(), file)
    if not where:
        raise AdapterFileError(f"'{path}' has no safetensors file with the weights before quantising.")
    adapter, found = graft.adapters[adapter_name], False
    for layer in adapter.layers:
        for method in layer.methods[adapter_name]:
            site: Any = method.site
            if site.kind != "linear" or not weights.quantised(site.layer):
                continue
            key = next((k for k in (f"{site.name}.weight", f"model.{site.name}.weight") if k in where), "")
            key = key or next((k for k in where if f"{site.name}.weight".endswith(f".{k}")), "")
            if not key:
                raise AdapterFileError(f"'{path}' has no weight of '{site.name}'.")
            with safe_open(str(where[key]), framework="pt") as opened:  # type: ignore[no-untyped-call]
                W = opened.get_tensor(key).to(site.device).float()
            _replace(peft_model, method, W, callback)
            found = True
    if not found:
        raise ValueError("No bnb LoRA module found on the model")


def _replace(model: Any, method: Any, W: Tensor, callback: Callable[[Any, str], bool] | None) -> None:
    """A layer's pair for the difference of its weight before quantising and after; undone where that is not wanted."""
    old = [factor.clone() for factor in method.factors]
    method.put(*low_rank((W - method.site.matrix().float()) / method.scaling, method.r))
    if callback is not None and not callback(model, method.site.name):
        for factor, value in zip(method.factors, old, strict=True):
            factor.copy_(value)


# ---------------------------------------------------------------------- shared
def targets(model: nn.Module, graft: Graft | None, config: Any, adapter: str) -> dict[str, Any]:
    """{path: the frozen layer} of the linear layers a config adapts."""
    if graft is not None and adapter in graft.adapters:
        layers = [(layer.path, layer.frozen) for layer in graft.adapters[adapter].layers if not layer.param]
        kinds = {layer.path: next(iter(layer.sites.values())).kind for layer in graft.adapters[adapter].layers}
        return {path: layer for path, layer in layers if kinds[path] == "linear"}
    base, cls = Base(model), method_class(config)
    found = choose(base, config.copy(), cls, strict=False)
    skipped = [t.name for t in found if t.kind != "linear"]
    if skipped:
        warn(f"These layers are not linear, and start plainly: {skipped[:5]}.")
    return {t.name: base.modules[t.name] for t in found if t.kind == "linear"}


@contextmanager
def hooked(layer: nn.Module, note: Callable[[Tensor], Any]) -> Iterator[None]:
    """Inside the block `note` is given the layer's inputs."""
    handle = layer.register_forward_pre_hook(lambda module, args: note(args[0]))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside the block the model is in evaluation mode."""
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def moved(batch: Any, device: Any) -> Any:
    """A batch on a device."""
    if isinstance(batch, Mapping):
        return {k: moved(v, device) for k, v in batch.items()}
    return batch.to(device) if hasattr(batch, "to") else batch
