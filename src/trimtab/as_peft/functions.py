"""Functions of peft's modules that are not part of trimtab's own interface."""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.config import PeftConfig, match_pattern
from trimtab.core.targets import condense, selects
from trimtab.errors import PeftError
from trimtab.graft.staging import HALF
from trimtab.layer.adapted import AdaptedLayer
from trimtab.shell.peft_model import PeftModel
from trimtab.shell.state import locate_graft

__all__ = [
    "DoraCaching",
    "_find_minimal_target_modules",
    "_get_submodules",
    "cast_adapter_dtype",
    "cast_mixed_precision_params",
    "check_adapters_to_merge",
    "check_deepspeed_zero3_enabled",
    "check_if_peft_model",
    "check_target_module_exists",
    "delete_adapter",
    "disable_input_dtype_casting",
    "find_parameter_name_by_module",
    "fsdp_auto_wrap_policy",
    "gather_params_ctx",
    "get_device_map",
    "get_pattern_key",
    "get_peft_config",
    "get_quantization_config",
    "id_tensor_storage",
    "infer_device",
    "init_empty_weights",
    "inspect_matched_modules",
    "match_target_against_key",
    "rescale_adapter_scale",
    "set_adapter",
    "set_requires_grad",
    "shift_tokens_right",
    "str_to_bool",
    "torch_load",
    "transpose",
    "update_forward_signature",
    "update_generate_signature",
    "update_signature",
]


# ------------------------------------------------------------------ adapters of a model that was injected into
def set_adapter(
    model: nn.Module, adapter_name: str | Sequence[str], inference_mode: bool = False, layer_cls: Any = None
) -> None:
    """Use these adapters and train just them."""
    names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
    locate_graft(model)[0].set_active(names, trainable=not inference_mode)


def delete_adapter(model: nn.Module, adapter_name: str, prefix: str = "", layer_cls: Any = None) -> list[str]:
    """Forget an adapter; returns the adapters that are active afterwards. As in PEFT, an unknown name does nothing.

    transformers' `delete_adapter(["one", "one"])` asks for the same name twice.
    """
    graft = locate_graft(model)[0]
    if adapter_name in graft.adapters:
        graft.delete(adapter_name)
    return list(graft.board.route.active)


def set_requires_grad(model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Make adapters trainable or frozen."""
    for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
        locate_graft(model)[0].set_trainable(name, requires_grad)


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Keep an adapter's tensors in fp32 where they are in half precision."""
    graft = locate_graft(model)[0]
    for slot in graft.slots(graft.require(adapter_name)) if autocast_adapter_dtype else ():
        tensor = slot.get()
        if tensor.dtype in HALF:
            tensor.data = tensor.data.float()


def check_adapters_to_merge(module: AdaptedLayer, adapter_names: Sequence[str] | None = None) -> list[str]:
    """Of the adapters named (or the active ones), those that are not merged yet."""
    names = module.active_adapters if adapter_names is None else adapter_names
    return [name for name in names if name not in module.merged_adapters]


@contextlib.contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Inside the block, the scale of every adapter that has one is multiplied."""
    if not isinstance(multiplier, float | int):
        raise TypeError(f"Argument multiplier should be of type float, got {type(multiplier)}")
    layers = [m for m in model.modules() if isinstance(m, AdaptedLayer)]
    scaled = [m for layer in layers for ms in layer.methods.values() for m in ms if "scaling" in m.views]
    if not scaled:
        raise ValueError("scaling is only supported for models with `LoraLayer`s")
    before = [method.scaling for method in scaled]
    try:
        for method, value in zip(scaled, before):
            method.scaling = value * multiplier
        yield
    finally:
        for method, value in zip(scaled, before):
            method.scaling = value


@contextlib.contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Nothing to do: trimtab's layers never cast their input."""
    yield


class DoraCaching(contextlib.nullcontext[None]):
    """Nothing to do: what DoRA needs of frozen weights is kept where it helps."""

    def __init__(self, enabled: bool = True) -> None:
        super().__init__()

    def __call__(self, enabled: bool = True) -> DoraCaching:
        """The same, from now on or in a block."""
        return self


# ------------------------------------------------------------------ configs and names
def get_peft_config(config_dict: dict[str, Any]) -> Any:
    """A config from a dict, one of whose keys is `peft_type`."""
    return PeftConfig.from_peft_type(**config_dict)


def check_if_peft_model(model_name_or_path: str) -> bool:
    """Whether a folder or Hub id holds an adapter."""
    try:
        PeftConfig.from_pretrained(model_name_or_path)
    except (PeftError, OSError, ValueError):  # there is none, or it is damaged or of no method that is known
        return False
    return True


def check_target_module_exists(config: Any, key: str) -> bool:
    """Whether a config selects the module `key`."""
    return selects(config, key)


def match_target_against_key(target_pattern: str, key: str) -> Any:
    """The match of a regular expression with a whole module path, or None."""
    return re.fullmatch(target_pattern, key)


def _find_minimal_target_modules(target_modules: Sequence[str], other_module_names: Sequence[str]) -> set[str]:
    """The shortest endings that fit all of the first names and none of the others."""
    if not target_modules or isinstance(target_modules, str):
        raise ValueError("target_modules should be a list or set of strings.")
    if "" in target_modules:
        raise ValueError("target_modules should not contain an empty string.")
    if both := set(target_modules) & set(other_module_names):
        raise ValueError(f"target_modules and other_module_names contain common elements: {sorted(both)}.")
    return condense(target_modules, other_module_names)


def get_pattern_key(pattern_keys: Sequence[str], key_to_match: str) -> str:
    """The key of a rank or alpha pattern that fits a module path, or else the path itself."""
    return match_pattern(pattern_keys, key_to_match) or key_to_match


def inspect_matched_modules(tuner: Any, adapter_name: str = "default") -> dict[str, list[str]]:
    """{"matched": the modules that an adapter adapts, "unmatched": the others}."""
    matched = [layer.name for layer in tuner.graft.require(adapter_name).layers]
    taken = set(matched)
    return {"matched": matched, "unmatched": [n for n, _ in tuner.model.named_modules() if n not in taken]}


# ------------------------------------------------------------------ modules
def _get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """(parent, module, its name in the parent) at a path."""
    path, _, name = key.rpartition(".")
    return model.get_submodule(path), model.get_submodule(key), name


def find_parameter_name_by_module(model: nn.Module, reference_module: nn.Module) -> str:
    """The path of a module, or ''."""
    return next((name for name, module in model.named_modules() if module is reference_module), "")


def get_device_map(model: nn.Module) -> dict[str, Any]:
    """Where accelerate has put which part of a model."""
    found = getattr(model, "hf_device_map", None)
    return dict(found) if found else {"": next(model.parameters()).device}


def get_quantization_config(model: nn.Module, method: str) -> Any:
    """The quantisation config of a model whose method is `method`, or None."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    return config if config is not None and getattr(model, "quantization_method", None) == method else None


def fsdp_auto_wrap_policy(model: nn.Module) -> Any:
    """A policy for FSDP 1 that wraps the model's own blocks; it needs `use_orig_params=True`.

    Adapters' leaves are not wrapped by themselves: their layer reads them, so that they gather with its block.
    """
    import os

    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    named = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP") or ",".join(getattr(model, "_no_split_modules", None) or ())
    classes = {type(m) for m in model.modules() if type(m).__name__ in named.split(",")}
    missing = {n for n in named.split(",") if n} - {c.__name__ for c in classes}
    if missing and not classes:
        raise ValueError(f"Could not find the transformer layer class to wrap in the model: {sorted(missing)}.")
    return functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=classes)


@torch.no_grad()
def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Trainable parameters to fp32, the others to `dtype`."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)


# ------------------------------------------------------------------ signatures
def update_forward_signature(model: PeftModel) -> None:
    """Show the base model's `forward` signature on the model's."""
    _show(model, "forward")


def update_generate_signature(model: PeftModel) -> None:
    """Show the base model's `generate` signature on the model's."""
    _show(model, "generate")


def update_signature(model: PeftModel, method: str = "all") -> None:
    """Show the base model's signatures of "forward", "generate" or "all" (both)."""
    if method not in ("forward", "generate", "all"):
        raise ValueError(f"method {method} is not supported please choose one of ['forward', 'generate', 'all']")
    for name in ("forward", "generate") if method == "all" else (method,):
        _show(model, name)


def _show(model: PeftModel, name: str) -> None:
    theirs = getattr(model.get_base_model(), name)
    ours = getattr(model, name)

    @functools.wraps(theirs)
    def call(*args: Any, **kwargs: Any) -> Any:
        return ours(*args, **kwargs)

    call.__signature__ = inspect.signature(theirs)  # type: ignore[attr-defined]
    setattr(model, name, call)


# ------------------------------------------------------------------ small things
def infer_device() -> str:
    """The kind of device there is to compute on."""
    for kind in ("cuda", "xpu", "npu", "mlu"):
        if hasattr(torch, kind) and getattr(torch, kind).is_available():
            return kind
    return "mps" if torch.backends.mps.is_available() else "cpu"


def str_to_bool(value: str) -> int:
    """1 for yes, true, t, y, on, 1; 0 for their opposites."""
    text = value.lower()
    if text in ("y", "yes", "t", "true", "on", "1"):
        return 1
    if text in ("n", "no", "f", "false", "off", "0"):
        return 0
    raise ValueError(f"invalid truth value {value}")


def transpose(weight: Tensor, fan_in_fan_out: bool) -> Tensor:
    """The transposed weight, if it is stored the other way round."""
    return weight.T if fan_in_fan_out else weight


def id_tensor_storage(tensor: Tensor) -> tuple[torch.device, int, int]:
    """What tells whether two tensors share memory: (device, address, size)."""
    storage = tensor.untyped_storage()
    return tensor.device, storage.data_ptr(), storage.nbytes()


def shift_tokens_right(input_ids: Tensor, pad_token_id: int, decoder_start_token_id: int) -> Tensor:
    """Labels as the decoder's inputs: one place to the right, -100 as padding."""
    shifted = input_ids.roll(1, -1)
    shifted[:, 0] = decoder_start_token_id
    return shifted.masked_fill(shifted == -100, pad_token_id)


def torch_load(*args: Any, weights_only: bool = True, **kwargs: Any) -> Any:
    """`torch.load` that reads tensors and nothing else."""
    return torch.load(*args, weights_only=weights_only, **kwargs)


def check_deepspeed_zero3_enabled() -> bool:
    """Whether DeepSpeed has the model's parameters in pieces (ZeRO 3)."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    return bool(is_deepspeed_zero3_enabled())


@contextlib.contextmanager
def gather_params_ctx(param: Any, modifier_rank: int | None = 0, fwd_module: nn.Module | None = None) -> Iterator[None]:
    """Inside the block, parameters that DeepSpeed keeps in pieces are whole."""
    if not check_deepspeed_zero3_enabled():
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(param, modifier_rank=modifier_rank, fwd_module=fwd_module):
        yield


@contextlib.contextmanager
def init_empty_weights(include_buffers: bool | None = None) -> Iterator[None]:
    """Inside the block, modules are built without storage."""
    with torch.device("meta"):
        yield
