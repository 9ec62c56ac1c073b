"""Adapters and models into other forms: a plain LoRA of one whose start changed the base; a quantised base made ready."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trimtab.errors import ConfigError
from trimtab.files.codec import PREFIX
from trimtab.files.store import load_peft_weights
from trimtab.model.graft import Graft


def subtract_start(graft: Graft, name: str, config: Any, tensors: dict[str, Tensor], start: str) -> dict[str, Tensor]:
    """The tensors of an adapter on the base as it was before the adapter's start changed it.

    W0 - s·B0·A0 + s·B·A = W0 + s·[B, -B0]·[A; A0]: a LoRA of twice the rank (PiSSA, appendix; OLoRA likewise). `config`
    is changed to say so.

    Args:
        start: the folder of the adapter as it was saved before training.
    """
    if config.rank_pattern or config.alpha_pattern:
        if config.use_rslora:
            raise ConfigError("Passing `path_initial_model_for_weight_conversion` to `save_pretrained` is not supported when "
                              "using `rank_pattern` or `alpha_pattern` at the same time as `use_rslora=True`.")
        config.rank_pattern = {k: 2 * r for k, r in config.rank_pattern.items()}
        config.alpha_pattern = {k: 2 * a for k, a in config.alpha_pattern.items()}
    first = load_peft_weights(start)
    missing = [k for k in tensors if k not in first and ".lora_" in k]
    if missing:
        raise ConfigError(f"The adapter in '{start}' is not the start of '{name}': it lacks {missing[:5]}.")
    out = dict(tensors)
    for key, tensor in tensors.items():
        other = first.get(key)
        if other is None or ".lora_" not in key:
            continue
        if ".lora_A" in key or ".lora_embedding_A" in key:
            out[key] = torch.cat([tensor.detach().cpu(), other.to(tensor.dtype)], 0)
        elif ".lora_B" in key or ".lora_embedding_B" in key:
            out[key] = torch.cat([tensor.detach().cpu(), -other.to(tensor.dtype)], 1)
    config.init_lora_weights = True
    config.lora_alpha = config.lora_alpha * (2**0.5 if config.use_rslora else 2)
    config.r *= 2
    return out


def prepare_model_for_kbit_training(
    model: nn.Module, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: dict[str, Any] | None = None
) -> nn.Module:
    """Make a quantised base ready for training: frozen, its norms in fp32, gradient checkpointing on.

    Unlike PEFT, only the norms are upcast: embeddings and heads in half precision stay so, which saves their size again.
    """
    model.requires_grad_(False)
    for module in model.modules():
        if "norm" in type(module).__name__.lower():
            for parameter in module._parameters.values():
                if parameter is not None and parameter.dtype in (torch.float16, torch.bfloat16):
                    parameter.data = parameter.data.float()
    if use_gradient_checkpointing:
        if not getattr(model, "supports_gradient_checkpointing", False):
            return model
        if hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()  # type: ignore[operator]
        arguments = gradient_checkpointing_kwargs or {"use_reentrant": True}
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable(arguments)  # type: ignore[operator]
    return model


__all__ = ["PREFIX", "prepare_model_for_kbit_training", "subtract_start"]
