"""Names of peft's inside that programs import, for what trimtab has in another form."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import nn

from trimtab.core.config import PeftType
from trimtab.formats import offload
from trimtab.layer.adapted import AdaptedLayer
from trimtab.methods import config_class, load, prefix_of
from trimtab.shell.tuner import tuner_class

MIXED = ("LORA", "LOHA", "LOKR", "ADALORA", "OFT", "SHIRA")
ENCODERS = {
    "CPTEmbedding": ("cpt", "CPT"),
    "CartridgeEncoder": ("cartridge", "Cartridge"),
    "MultitaskPromptEmbedding": ("multitask_prompt_tuning", "MultitaskPromptTuning"),
    "PrefixEncoder": ("prefix_tuning", "PrefixTuning"),
    "PromptEmbedding": ("prompt_tuning", "PromptTuning"),
    "PromptEncoder": ("p_tuning", "PTuning"),
}

LAZY = (
    "COMPATIBLE_TUNER_TYPES",
    "Layers",
    "PREFIXES",
    "TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING",
)

__all__ = [
    *ENCODERS,
    *LAZY,
    "LycorisConfig",
    "LycorisLayer",
    "LycorisTuner",
    "check_file_exists_on_hf_hub",
    "clone_module",
    "get_embedding_layer_name",
    "get_layer_device_map",
    "get_model_device",
    "has_valid_embedding_base_layer",
    "is_torchao_ge_v0_18_0",
    "onload_layer",
    "register_peft_method",
    "skip_init_on_device",
]


class Either(type):
    """A class that stands above those of several methods."""

    of: Callable[[], tuple[type, ...]]

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls.of())

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, cls.of())


def _layers(*peft_types: str) -> tuple[type, ...]:
    from trimtab.as_peft.classes import layer_class

    return tuple(layer_class(t, f"{t.title()}Layer", ()) for t in peft_types)


class LycorisConfig(metaclass=Either):
    """The configs of LoHa and LoKr."""

    of = staticmethod(lambda: (config_class("LOHA"), config_class("LOKR")))


class LycorisLayer(metaclass=Either):
    """Layers that LoHa or LoKr adapts."""

    of = staticmethod(lambda: _layers("LOHA", "LOKR"))


class LycorisTuner(metaclass=Either):
    """The tuners of LoHa and LoKr."""

    of = staticmethod(lambda: (tuner_class("LOHA"), tuner_class("LOKR")))


def __getattr__(name: str) -> Any:
    if name in ENCODERS:  # the module of a prompt, at `model.prompt_encoder[adapter]`
        return load(*ENCODERS[name])
    if name == "COMPATIBLE_TUNER_TYPES":
        return tuple(map(PeftType, MIXED))
    if name == "PREFIXES":
        return sorted({prefix_of(t) for t in MIXED})
    if name == "Layers":
        return _layers(*MIXED)
    if name == "TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING":
        return {model: list(inputs) for model, inputs in load("ia3", "IA3").defaults["feedforward_modules"].items()}
    raise AttributeError(name)


def register_peft_method(
    *, name: str, config_cls: type, model_cls: type, prefix: str | None = None, is_mixed_compatible: bool = False
) -> None:
    """Refuse: a method is a formula here, not a tuner.

    Raises:
        NotImplementedError: says how a method of one's own is added.
    """
    raise NotImplementedError(
        f"'{name}' cannot be registered as a tuner ({model_cls.__name__}): here a method is one class, its formula. "
        "Write that, and call trimtab.methods.register_method(peft_type, method)."
    )


def skip_init_on_device(func: Callable[..., Any]) -> Callable[..., Any]:
    """A function that makes its tensors in memory, also where modules are being built without storage."""

    @functools.wraps(func)
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.device("cpu"):
            return func(*args, **kwargs)

    return call


def is_torchao_ge_v0_18_0() -> bool:
    """Whether torchao is installed, 0.18 or newer."""
    from importlib.metadata import PackageNotFoundError, version

    from packaging.version import Version

    try:
        return Version(version("torchao")) >= Version("0.18.0")
    except PackageNotFoundError:
        return False


def check_file_exists_on_hf_hub(repo_id: str, filename: str, **kwargs: Any) -> bool | None:
    """Whether a repository has a file; None where the Hub cannot be asked."""
    hub = import_module("huggingface_hub")
    try:
        return bool(hub.file_exists(repo_id, filename, **kwargs))
    except Exception:  # whatever keeps the Hub from answering
        return None


# ------------------------------------------------------------------ modules
def clone_module(module: nn.Module, share_weights: bool = False) -> nn.Module:
    """A copy of a module; with `share_weights`, of the same parameter and buffer objects."""
    import copy

    tensors = [*module.parameters(), *module.buffers()] if share_weights else []
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})


def onload_layer(layer: nn.Module) -> Any:
    """A block inside which the layer's weights are in memory, where they are kept elsewhere."""
    return offload.running(layer.frozen if isinstance(layer, AdaptedLayer) else layer)


def get_model_device(model: nn.Module) -> str:
    """The kind of device a model is on."""
    return next(model.parameters()).device.type


def get_layer_device_map(model: Any) -> dict[int, Any] | None:
    """{index of a block: the device that computes it} of a model that is spread over several, or None."""
    from trimtab.core.targets import layer_index

    spread = getattr(model, "hf_device_map", None) or {}
    away = ("cpu", "disk")  # blocks kept there are computed where the others are
    main = next((device for device in spread.values() if device not in away), "cpu")
    found = {}
    for name, device in spread.items():
        index = layer_index(f"{name}.", None)
        if index is not None:
            found[index] = main if device in away else device
    return found if len(set(spread.values())) > 1 and found else None


# ------------------------------------------------------------------ embeddings
def has_valid_embedding_base_layer(layer: Any) -> bool:
    """Whether a layer is an adapted embedding or head."""
    return isinstance(layer, AdaptedLayer) and isinstance(layer.base_layer, nn.Linear | nn.Embedding)


def get_embedding_layer_name(model: nn.Module, layer: nn.Module, is_embedding_in_target_modules: bool) -> str | None:
    """The path of an embedding in a model, or None."""
    base = layer.base_layer if isinstance(layer, AdaptedLayer) else layer
    for name, module in model.named_modules():
        if (not is_embedding_in_target_modules and module is layer) or module is base:
            return name
    return None
