"""What is in a model: the state of each adapted layer, and of the whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from trimtab.core.config import type_name
from trimtab.errors import ArgumentError
from trimtab.formats.plain import made_by
from trimtab.graft.graft import Graft, grafted
from trimtab.layer.adapted import AdaptedLayer
from trimtab.layer.copies import SavedModule
from trimtab.shell.locate import locate_graft, unwrap


@dataclass
class TunerLayerStatus:
    """The state of one adapted layer."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Literal["irregular"]]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None = None


@dataclass
class TunerModelStatus:
    """The state of the model: what differs from layer to layer is "irregular"."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Literal["irregular"]
    active_adapters: list[str] | Literal["irregular"]
    merged_adapters: list[str] | Literal["irregular"]
    requires_grad: dict[str, bool | Literal["irregular"]]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None = None


def _graft(model: nn.Module) -> Graft:
    try:
        return locate_graft(model)[0]
    except TypeError:
        if inside := grafted(model):  # a part of a larger model
            return inside
        raise ValueError(
            "No adapter layers found in the model, please ensure that it's a PEFT model or that you have PEFT adapters "
            f"injected in the model: this is a {type(model).__name__} without any."
        ) from None


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """One row for each adapted layer of a PeftModel, or of a model with injected adapters.

    Raises:
        ValueError: the model has no adapters.
        ArgumentError: its adapters (prompts) are of the model as a whole.
    """
    return _rows(model, "get_layer_status")


def _rows(model: nn.Module, asked: str) -> list[TunerLayerStatus]:
    model, graft = unwrap(model), _graft(model)
    prefix = next((n for n, m in model.named_modules() if m is graft.model), "")
    order = {path: i for i, path in enumerate(graft.base.modules)}
    rows = []
    ours: list[Any] = [*graft.layers.values(), *graft.saved.values()]
    parts = [(getattr(part, "path", part.name), part.name, *_described(part, graft), part) for part in ours]
    parts += [(path, path, path, type(part).__name__, part) for path, part in graft.base.foreign.items()]
    for _, _, path, module_type, part in sorted(parts, key=lambda row: (order.get(row[0], -1), len(row[1]))):
        tensors = {a: [p for _, p in part.adapter_parameters(a)] for a in part.adapters}
        rows.append(
            TunerLayerStatus(
                name=".".join(filter(None, (prefix, path))).removeprefix("base_model."),
                module_type=module_type,
                enabled=not part.disable_adapters,
                active_adapters=part.active_adapters,
                merged_adapters=list(part.merged_adapters),
                requires_grad={a: _same([p.requires_grad for p in ps]) for a, ps in tensors.items() if ps},
                available_adapters=sorted(part.adapters),
                devices={a: sorted({p.device.type for p in ps}) for a, ps in tensors.items() if ps},
                quantization_backend=quantization_backend(part.frozen) if isinstance(part, AdaptedLayer) else None,
            )
        )
    if not rows:
        raise ArgumentError(
            f"{asked}() got an invalid PeftModel instance; prefix tuning and adaption prompt are not supported: "
            "no layer of the model is adapted."
        )
    return rows


# Libraries that hold weights quantised, and are called by their own name.
QUANTISED_BY = ("aqlm", "eetq", "gptqmodel", "hqq", "neural_compressor", "torchao", "transformer_engine", "megatron")


def quantization_backend(layer: nn.Module) -> str | None:
    """What holds a frozen layer's weight quantised, as PEFT calls it; None: nothing does."""
    weight = getattr(layer, "weight", None)
    kinds = {type(layer).__name__, type(weight).__name__} if made_by("bitsandbytes", layer, weight) else set()
    if kinds & {"Linear4bit", "Params4bit"}:
        return "bnb 4bit"
    if kinds & {"Linear8bitLt", "Int8Params"}:
        return "bnb 8bit"
    return next((library for library in QUANTISED_BY if made_by(library, layer, weight)), None)


def _described(part: AdaptedLayer | SavedModule, graft: Graft) -> tuple[str, str]:
    """The path and type under which PEFT lists a layer, a module trained whole, or an embedding with trained rows."""
    if isinstance(part, SavedModule):
        return part.name, "ModulesToSaveWrapper"
    classes = {type(m) for ms in part.methods.values() for m in ms}
    if len(classes) == 1 and (own := next(iter(classes))).listed:
        return f"{part.name}.{own.listed}", f"{own.__name__}Layer"
    kinds = dict.fromkeys(type_name(graft.adapters[a].config).lower() for a in part.methods)
    return part.name, f"{'.'.join(kinds)}.{'ParamWrapper' if part.param else type(part.frozen).__name__}"


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The state of the whole model."""
    model, graft = unwrap(model), _graft(model)
    rows = _rows(model, "get_model_status")
    trainable, total = count_parameters(model)
    names = sorted({a for r in rows for a in r.available_adapters})
    tuner = model._modules.get("base_model")
    tuner = tuner if getattr(tuner, "model", None) is graft.model else None
    return TunerModelStatus(  # only a PeftModel tells types, as programs expect that tell one by them
        base_model_type=_called(model) if tuner is None else type(graft.model).__name__,
        adapter_model_type="None" if tuner is None else type(tuner).__name__,
        peft_types={} if tuner is None else {a: type_name(graft.adapters[a].config) for a in names},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(rows),
        enabled=_same([r.enabled for r in rows]),
        active_adapters=_same([r.active_adapters for r in rows]),
        merged_adapters=_same([r.merged_adapters for r in rows]),
        requires_grad={a: _same([r.requires_grad[a] for r in rows if a in r.requires_grad]) for a in names},
        available_adapters=names,
        devices={a: sorted({d for r in rows for d in r.devices.get(a, [])}) for a in names},
        quantization_backend=_same([r.quantization_backend for r in rows]),
    )


def _called(model: nn.Module) -> str:
    """What PEFT calls a model with injected adapters: by its class where it is transformers'."""
    try:
        from transformers import PreTrainedModel
    except ImportError:
        return "other"
    return type(model).__name__ if isinstance(model, PreTrainedModel) else "other"


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; a tied one counts once, a sharded one whole, a 4-bit one by what it stands for."""
    trainable = total = 0
    for parameter in model.parameters():
        count = parameter.numel()
        if count == 0 and hasattr(parameter, "ds_numel"):
            count = parameter.ds_numel
        if type(parameter).__name__ == "Params4bit":
            storage = getattr(parameter, "quant_storage", None)
            count = count * 2 * (storage.itemsize if storage is not None else 1)
        total += count
        trainable += count if parameter.requires_grad else 0
    return trainable, total


def _same(values: list[Any]) -> Any:
    return values[0] if all(v == values[0] for v in values) else "irregular"


__all__ = [
    "AdaptedLayer",
    "TunerLayerStatus",
    "TunerModelStatus",
    "count_parameters",
    "get_layer_status",
    "get_model_status",
]
