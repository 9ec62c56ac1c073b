"""What peft's programs do around a model with adapters: masks, caches, data for starts, LLaMA-Adapter's attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trimtab.graft.graft import find_graft
from trimtab.methods import config_class, load
from trimtab.methods.adaption_prompt import half_turned, turned
from trimtab.shell.starts import moved, preprocess_loraga, targets
from trimtab.shell.state import locate_graft
from trimtab.shell.tasks import inject_adapter_in_model

LAZY = ("AdamssAsaCallback", "TRANSFORMERS_MODEL_CONFIG", "UNSUPPORTED_LORA_MODULES")
ENABLE_DORA_CACHING = False
warn_msg_weight_tying = "Layers that share a weight are adapted apart: merging gives each a weight of its own."

__all__ = [
    *LAZY,
    "ENABLE_DORA_CACHING",
    "ModelTypeConfig",
    "TpInfo",
    "bloom_model_postprocess_past_key_value",
    "cache_decorator",
    "dtensor_from_local_like",
    "starcoder_model_postprocess_past_key_value",
    "create_attention_mask",
    "estimate_gradients",
    "find_equal_values",
    "get_device_with_meta_params",
    "get_target_modules",
    "gpt2_compute_query_states",
    "is_adaption_prompt_trainable",
    "llama_apply_rotary_pos_emb",
    "llama_compute_query_states",
    "llama_rotate_half",
    "map_cache_to_layer_device_map",
    "move_inputs_to_device",
    "prepare_config",
    "set_additional_trainable_modules",
    "warn_msg_weight_tying",
]


def __getattr__(name: str) -> Any:
    if name == "AdamssAsaCallback":
        from transformers import TrainerCallback

        return type(name, (TrainerCallback,), {"__doc__": "Nothing to do: optimisers tell adapters of their steps."})
    if name == "UNSUPPORTED_LORA_MODULES":
        from trimtab.as_peft.classes import base_of, layer_class

        kinds = ("Embedding", "MultiheadAttention", "Conv1d", "Conv2d", "Conv3d")
        return tuple(layer_class("LORA", kind, base_of("Lora", kind) or ()) for kind in kinds)
    if name == "TRANSFORMERS_MODEL_CONFIG":
        known = load("adaption_prompt", "AdaptionPrompt").targets
        return {model: _attention(model, path) for model, path in known.items()}
    raise AttributeError(name)


# ------------------------------------------------------------------ masks and caches
def create_attention_mask(
    model: Any,
    *,
    model_input: Tensor | None,
    attention_mask: Tensor | None,
    past_key_values: Any,
    cache_position: Tensor | None,
    batch_size: int,
    sequence_length: int,
    position_ids: Tensor | None,
) -> Any:
    """The mask that a model's attention takes, as transformers makes it from one of tokens (rows, tokens)."""
    from transformers.masking_utils import create_masks_for_generate

    parameter = next(model.parameters())
    like = torch.empty(batch_size, sequence_length, 1, dtype=parameter.dtype, device=parameter.device)
    config = model.config.get_text_config()
    return create_masks_for_generate(config, like, attention_mask, past_key_values, position_ids=position_ids)


def bloom_model_postprocess_past_key_value(past_key_values: tuple[Tensor, ...]) -> tuple[tuple[Tensor, Tensor], ...]:
    """The layout that Bloom's cache once had: keys (rows · heads, dim, tokens), values (rows · heads, tokens, dim)."""
    keys, values = torch.cat(past_key_values).chunk(2)  # (layers, rows, heads, tokens, dim)
    _, rows, heads, tokens, dim = keys.shape
    keys = keys.transpose(2, 3).reshape(-1, rows * heads, dim, tokens)
    return tuple(zip(keys, values.reshape(-1, rows * heads, tokens, dim)))


def starcoder_model_postprocess_past_key_value(past_key_values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The layout that GPT BigCode's cache once had: keys beside values (rows, tokens, 2 dim), of its one head."""
    return tuple(layer[:, :, 0].permute(1, 2, 0, 3).flatten(2) for layer in past_key_values)


def map_cache_to_layer_device_map(model: Any, cache: Any) -> None:
    """Put each layer's keys and values where accelerate has put that layer, in place."""
    from trimtab.as_peft.inside import get_layer_device_map

    for index, device in (get_layer_device_map(model) or {}).items():
        layer = cache.layers[index]
        layer.keys, layer.values = layer.keys.to(device), layer.values.to(device)


def set_additional_trainable_modules(
    model: nn.Module, peft_config: Any, model_config: Any, adapter_name: str, activate_adapter: bool = True
) -> None:
    """Give an adapter its own copies of the modules that `modules_to_save` of its config names, if it has none yet."""
    names = getattr(peft_config, "modules_to_save", None)
    graft = find_graft(model)
    if not names or (graft is not None and adapter_name in graft.adapters):
        return
    own: Any = config_class("LORA")
    inject_adapter_in_model(own(target_modules=[], modules_to_save=list(names)), model, adapter_name)
    if activate_adapter:
        locate_graft(model)[0].set_active([adapter_name])


# ------------------------------------------------------------------ tensors spread over devices
@dataclass
class TpInfo:
    """How a model's layers are cut among devices."""

    tp_plan: dict[str, str]
    device_mesh: Any
    tp_size: int


def dtensor_from_local_like(local_tensor: Tensor, ref: Tensor) -> Tensor:
    """This process's part of a tensor as one that is spread as `ref` is; the part itself where that is not."""
    from torch.distributed.tensor import DTensor

    if not isinstance(ref, DTensor):
        return local_tensor
    return DTensor.from_local(local_tensor, ref.device_mesh, ref.placements)


def cache_decorator(cache_key: str) -> Callable[[Any], Any]:
    """Nothing to do: what DoRA needs of frozen weights is kept where it helps."""
    return lambda function: function


# ------------------------------------------------------------------ starts from data
def find_equal_values(dictionary: Mapping[Any, Any]) -> dict[Any, list[Any]]:
    """{value: its keys} of the values that several keys have."""
    keys: dict[Any, list[Any]] = {}
    for key, value in dictionary.items():
        keys.setdefault(value, []).append(key)
    return {value: some for value, some in keys.items() if len(some) > 1}


def get_device_with_meta_params(model: nn.Module) -> torch.device:
    """The device of the first parameter that has storage."""
    return next(p.device for p in model.parameters() if p.device.type != "meta")


def move_inputs_to_device(inputs: Any, device: str | torch.device) -> Any:
    """A batch, of any nesting, on a device."""
    return moved(inputs, device)


def estimate_gradients(model: nn.Module, lora_config: Any, train_step: Callable[[], None]) -> None:
    """Find the gradients that LoRA-GA starts from; each target layer keeps its own until an adapter is added."""
    preprocess_loraga(model, lora_config, train_step)


def get_target_modules(model: nn.Module, config: Any) -> Iterator[tuple[str, nn.Module]]:
    """The (path, layer) that a LoRA config selects."""
    yield from targets(model, None, config, "").items()


# ------------------------------------------------------------------ LLaMA-Adapter
class ModelTypeConfig(NamedTuple):
    """Where a kind of model has its attention's parts."""

    compute_query_states: Callable[..., Tensor]
    target_modules: str
    k_proj_layer: str
    v_proj_layer: str | None
    o_proj_layer: str | None


llama_rotate_half = half_turned


def llama_apply_rotary_pos_emb(q: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor) -> Tensor:
    """Queries (rows, heads, tokens, dim) turned to their positions; cos and sin (..., positions, dim) are of all."""
    if cos.ndim == 4:  # two axes of one before
        cos, sin = cos[0, 0], sin[0, 0]
    return turned(q, cos[position_ids], sin[position_ids])


def llama_compute_query_states(model: nn.Module, **kwargs: Any) -> Tensor:
    """The queries (rows, heads, tokens, dim) of an attention for the arguments of its forward, turned."""
    attention: Any = model
    x, turns = kwargs["hidden_states"], kwargs.get("position_embeddings")
    q = attention.q_proj(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
    q = attention.q_norm(q) if hasattr(attention, "q_norm") else q
    if turns is None:
        turns = attention.rotary_emb(q, kwargs["position_ids"])
    return turned(q, *turns)


def gpt2_compute_query_states(
    model: nn.Module, hidden_states: Any = None, encoder_hidden_states: Tensor | None = None
) -> Tensor:
    """The queries (rows, heads, tokens, dim) of GPT-2's attention."""
    attention: Any = model
    x = hidden_states[0] if isinstance(hidden_states, tuple) else hidden_states
    q = attention.c_attn(x).chunk(3, -1)[0] if encoder_hidden_states is None else attention.q_attn(x)
    return q.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)  # type: ignore[no-any-return]


def _attention(model: str, path: str) -> ModelTypeConfig:
    if model == "gpt2":
        return ModelTypeConfig(gpt2_compute_query_states, path, "c_attn", None, None)
    return ModelTypeConfig(llama_compute_query_states, path, "k_proj", "v_proj", "o_proj")


def is_adaption_prompt_trainable(params: str) -> bool:
    """Whether a parameter of that path is one of LLaMA-Adapter's."""
    return params.rpartition(".")[2].startswith("adaption_")


def prepare_config(peft_config: Any, model: Any) -> Any:
    """The config, complete: where the model's attention is.

    Raises:
        ValueError: the kind of model is not known.
    """
    kind = model.config.model_type
    known = __getattr__("TRANSFORMERS_MODEL_CONFIG")
    if kind not in known:
        raise ValueError(f"Unsupported model type for adaption prompt: '{kind}'.")
    if peft_config.target_modules is None:
        peft_config.target_modules = known[kind].target_modules
    return peft_config
