"""Adapters and models into other forms: a LoRA of one whose start changed the base, a quantised base made plain."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trimtab.errors import ConfigError
from trimtab.files.codec import PREFIX
from trimtab.files.store import load_peft_weights
from trimtab.formats import weights
from trimtab.graft.graft import Graft, grafted
from trimtab.layer.spelling import first_input, fold


def subtract_start(graft: Graft, name: str, config: Any, tensors: dict[str, Tensor], start: str) -> dict[str, Tensor]:
    """The tensors of an adapter on the base as it was before the adapter's start changed it.

    W0 - s·B0·A0 + s·B·A = W0 + s·[B, -B0]·[A; A0]: a LoRA of twice the rank (PiSSA, appendix; OLoRA likewise). `config`
    is changed to say so.

    Args:
        start: the folder of the adapter as it was saved before training.
    """
    if config.rank_pattern or config.alpha_pattern:
        if config.use_rslora:
            raise ConfigError(
                "Passing `path_initial_model_for_weight_conversion` to `save_pretrained` is not supported when "
                "using `rank_pattern` or `alpha_pattern` at the same time as `use_rslora=True`."
            )
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
    config.init_lora_weights, config.loftq_config = True, {}
    config.eva_config = config.corda_config = config.lora_ga_config = None
    config.lora_alpha = config.lora_alpha * (2**0.5 if config.use_rslora else 2)
    config.r *= 2
    return out


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> nn.Module:
    """Make a quantised base ready for training: frozen, its norms in fp32, gradient checkpointing on.

    As in PEFT, the last is not done to a base without a quantised layer.

    With `auto_clear_cache`, the memory that this leaves unused goes back to the device.

    Unlike PEFT, only the norms are upcast (embeddings and heads in half precision stay so, which saves their size
    again), and they give back what number format they were given, so nothing else sees a difference.
    """
    model.requires_grad_(False)
    for module in model.modules():
        own = [p for p in module._parameters.values() if p is not None and p.dtype in (torch.float16, torch.bfloat16)]
        if own and "norm" in type(module).__name__.lower():
            for parameter in own:
                parameter.data = parameter.data.float()
            module.register_forward_pre_hook(_widen, with_kwargs=True)
            module.register_forward_hook(_narrow)
    if auto_clear_cache and torch.cuda.is_available():
        torch.cuda.empty_cache()
    if use_gradient_checkpointing and any(map(weights.quantised, model.modules())):
        if not getattr(model, "supports_gradient_checkpointing", False):
            return model
        if hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()  # type: ignore[operator]
        arguments = gradient_checkpointing_kwargs or {"use_reentrant": True}
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable(arguments)  # type: ignore[operator]
    return model


def dequantize(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replace every quantised Linear and Embedding of a model, adapted or not, by a plain one of the same numbers.

    What a number format that cannot be written needs before a merge, and what keeps a merge from being rounded again.

    Args:
        model: changed in place; nothing may be merged into it.
        dtype: of the new weights; by default what each layer computes in.
    """
    graft = grafted(model)
    if graft is not None and graft.merged:
        raise ValueError(f"Adapters {graft.merged} are merged into the quantised base: call unmerge_adapter() first.")
    weights.plain(model, dtype)
    for path, old in graft.base.modules.items() if graft is not None else ():
        if weights.quantised(old):
            now: Any = graft.model.get_submodule(path)  # type: ignore[union-attr]
            graft.base.modules[path] = now._modules.get("base_layer") or now._modules.get("original_module") or now  # type: ignore[union-attr]
    for module in model.modules():  # what transformers notes of a quantised model, and refuses to save or cast it for
        if module.__dict__.get("is_quantized"):
            module.is_quantized = False  # type: ignore[assignment]
            for mark in ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit"):
                module.__dict__.pop(mark, None)
            config = getattr(module, "config", None)
            if hasattr(config, "quantization_config"):
                del config.quantization_config  # type: ignore[union-attr]
    keep_reversible(model)
    return model


def keep_reversible(model: nn.Module) -> None:
    """Drop the conversions that transformers notes on reading a quantised folder, and cannot undo for saving."""
    for module in model.modules():
        noted = module.__dict__.get("_weight_conversions")
        if noted:
            module.__dict__["_weight_conversions"] = [c for c in noted if _reversible(c)]


def _reversible(conversion: Any) -> bool:
    try:
        conversion.reverse_transform()
    except NotImplementedError:
        return False
    return True


def _widen(norm: Any, args: Any, kwargs: Any) -> Any:
    """Before an upcast norm: note its input's number format, and upcast that too."""
    x, args, kwargs = first_input(args, kwargs)
    norm.__dict__["incoming"] = x.dtype
    return (x.float(), *args), kwargs


def _narrow(norm: Any, args: Any, output: Any) -> Any:
    """After an upcast norm: its output in its input's number format."""
    return output.to(norm.__dict__["incoming"]) if isinstance(output, Tensor) else output


@torch.no_grad()
def merge_error(model: nn.Module) -> dict[str, float]:
    """How much of what was merged is lost to rounding, a merged layer: ||stored - wanted|| / ||wanted - original||.

    1.0 means that rounding to the base's number format is as large as all the adapters changed.
    """
    graft = grafted(model)
    lost: dict[str, float] = {}
    for path, layer in graft.layers.items() if graft is not None else ():
        if not layer.originals.held:
            continue
        for site, (W, _) in fold(layer.below()).items():
            stored = weights.read(layer.frozen, getattr(layer.frozen, site.param)).to(W.dtype)
            change = (W - site.matrix().to(W.dtype)).norm()
            lost[path] = float((stored - site.store(W)).norm() / change.clamp_min(1e-30))
    return lost


__all__ = ["PREFIX", "dequantize", "merge_error", "prepare_model_for_kbit_training", "subtract_start"]
