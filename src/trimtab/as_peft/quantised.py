"""Which library holds a layer's weight quantised, as peft's modules are asked; `formats` reads and writes it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from trimtab.formats import weights
from trimtab.formats.plain import made_by
from trimtab.layer.adapted import AdaptedLayer
from trimtab.shell.status import quantization_backend

__all__ = [
    "Bnb4bitBackend",
    "Bnb8bitBackend",
    "ForwardOnlyQuantizationBackend",
    "HqqBackend",
    "QuantizationBackend",
    "TorchaoBackend",
    "dequantize_bnb_weight",
    "dequantize_module_weight",
    "get_bnb_param_type",
    "get_gptqmodel_quant_linear",
    "get_quantization_kwargs",
    "is_gptqmodel_awq_layer",
    "is_gptqmodel_quant_linear",
    "quantization_extra_repr",
    "resolve_quantization_backend",
]

# What stands in a dispatcher's name after `dispatch_`: peft's name of the backend.
BACKENDS = {
    "default": None,
    "bnb_4bit": "bnb 4bit",
    "bnb_8bit": "bnb 8bit",
    "gptq": "gptqmodel",
    "awq": "gptqmodel",
    "inc": "neural_compressor",
    "transformer_engine": "transformer_engine",
    **{name: name for name in ("aqlm", "eetq", "hqq", "megatron", "torchao")},
}
# Layer classes for one backend: what the base layer's weight is held by.
LAYERS = {
    "Linear4bit": "bnb 4bit",
    "Linear8bitLt": "bnb 8bit",
    "AqlmLoraLinear": "aqlm",
    "AwqLoraLinear": "gptqmodel",
    "GPTQLoraLinear": "gptqmodel",
    "SVDLinear4bit": "bnb 4bit",
    "SVDLinear8bitLt": "bnb 8bit",
    "SVDQuantLinear": "gptqmodel",
    "LoraParallelLinear": "megatron",
    "TeLinear": "transformer_engine",
    "TorchaoLoraLinear": "torchao",
}


class QuantizationBackend:
    """How the weight of a frozen layer is held: read, and written where its format can be."""

    def __init__(self, backend_name: str = "") -> None:
        self.backend_name = backend_name
        self.supports_merge = self.backend_name in ("bnb 4bit", "bnb 8bit", "hqq", "torchao")

    def get_base_weight(self, layer: nn.Module) -> Tensor:
        """The weight in plain numbers."""
        return weights.read(layer, getattr(layer, "weight", None))

    def set_base_weight(self, layer: nn.Module, weight: Tensor) -> None:
        """Give the layer another weight, in the format it has."""
        weights.write(layer, "weight", weight)

    def maybe_clone_base_result(self, result: Tensor) -> Tensor:
        """A copy of what the layer gave, which some kernels write into."""
        return result.clone()


class Bnb4bitBackend(QuantizationBackend):
    """bitsandbytes, four bits."""

    def __init__(self) -> None:
        super().__init__("bnb 4bit")


class Bnb8bitBackend(QuantizationBackend):
    """bitsandbytes, eight bits."""

    def __init__(self) -> None:
        super().__init__("bnb 8bit")


class HqqBackend(QuantizationBackend):
    """HQQ."""

    def __init__(self) -> None:
        super().__init__("hqq")


class TorchaoBackend(QuantizationBackend):
    """torchao; nothing is needed to write its tensors."""

    def __init__(self, get_apply_tensor_subclass: Any = None) -> None:
        super().__init__("torchao")


class ForwardOnlyQuantizationBackend(QuantizationBackend):
    """A format that is run, not read."""


def resolve_quantization_backend(base_layer: nn.Module, **kwargs: Any) -> QuantizationBackend | None:
    """The backend of a layer whose weight is quantised, or None."""
    name = quantization_backend(base_layer)
    own = {"bnb 4bit": Bnb4bitBackend, "bnb 8bit": Bnb8bitBackend, "hqq": HqqBackend, "torchao": TorchaoBackend}
    return None if name is None else own[name]() if name in own else ForwardOnlyQuantizationBackend(name)


def get_quantization_kwargs(model: nn.Module) -> dict[str, Any]:
    """Nothing: formats are read off the layers."""
    return {}


def quantization_extra_repr(module: nn.Module) -> str:
    """What an adapted layer's text says of its base's format."""
    name = quantization_backend(getattr(module, "base_layer", module))
    return f"quantization={name}" if name else ""


def dequantize_module_weight(module: nn.Module) -> nn.Parameter:
    """The weight of a layer in plain numbers."""
    module = module.frozen if isinstance(module, AdaptedLayer) else module
    return nn.Parameter(weights.read(module, getattr(module, "weight", None)), requires_grad=False)


def dequantize_bnb_weight(weight: nn.Parameter, state: Any = None) -> Tensor:
    """A weight of bitsandbytes in plain numbers; with `state`, that of the eight-bit layer whose state it is."""
    holder = nn.Module()
    holder.weight = weight
    if state is not None:
        holder.state = state
    return weights.read(holder, weight)


def get_bnb_param_type(param: nn.Parameter) -> Any:
    """ "4bit", "8bit", or False."""
    return {"Params4bit": "4bit", "Int8Params": "8bit"}.get(type(param).__name__, False)


def is_gptqmodel_quant_linear(module: nn.Module | None) -> bool:
    """Whether a layer is one of GPTQModel's."""
    return module is not None and made_by("gptqmodel", module)


def is_gptqmodel_awq_layer(module: nn.Module | None) -> bool:
    """Whether a layer is one of GPTQModel's for AWQ."""
    return is_gptqmodel_quant_linear(module) and "awq" in type(module).__name__.lower()


def get_gptqmodel_quant_linear(gptq_quantization_config: Any, device_map: Any = None) -> None:
    """None: layers of GPTQModel are told by the module they come from."""
