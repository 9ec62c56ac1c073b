"""Number formats: how to read the weight of a layer as plain numbers, and how to write it back.

A format is one class and one line in `FORMATS`; the first that fits a parameter serves it. No quantisation library is
imported here unless the layer or its weight comes from it, so none is needed for plain models.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from trimtab.errors import ReadOnlyWeight
from trimtab.formats import offload

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# (out, in) as the linear layers of quantisation libraries call them, and what such a layer keeps in place of a weight.
SIZES = [("out_features", "in_features"), ("outfeatures", "infeatures")]
PACKED = ("qweight", "W_q", "q_weight", "codes", "weight_packed")


_LIBRARIES: dict[type, frozenset[str]] = {}  # a class -> where it and the classes below it come from


def made_by(library: str, *things: Any) -> bool:
    """Whether the class of one of these objects, or a class below it, comes from a library."""
    for cls in map(type, things):
        if cls not in _LIBRARIES:  # looked up once: a compiled forward comes by here
            _LIBRARIES[cls] = frozenset(c.__module__.partition(".")[0] for c in cls.__mro__)
        if library in _LIBRARIES[cls]:
            return True
    return False


def read_only(layer: nn.Module, weight: Tensor | None, why: str = "is read, not written") -> ReadOnlyWeight:
    """The error that names the class and the ways out."""
    kind = f"{type(layer).__module__}.{type(layer).__name__}"
    if weight is not None and type(weight) not in (Tensor, nn.Parameter):
        kind += f" ({type(weight).__name__})"
    return ReadOnlyWeight(
        f"The number format of a {kind} {why}. Either keep the adapter unmerged (save it and load it onto the "
        "same base), or merge it into plain numbers: call trimtab.dequantize(model) first, or load the adapter onto "
        "the original base in full precision."
    )


class Format:
    """Plain numbers, and what every other format does unless it says otherwise."""

    def fits(self, layer: nn.Module, weight: Any) -> bool:
        """Whether this parameter of the layer is of this format."""
        return True

    def shape(self, layer: nn.Module, weight: Any) -> tuple[int, ...]:
        """The parameter's shape in plain numbers."""
        return tuple(weight.shape)

    def read(self, layer: nn.Module, weight: Any) -> Tensor:
        """The plain numbers, detached."""
        numbers: Tensor = weight.detach()
        return numbers

    def make(self, layer: nn.Module, old: Any, value: Tensor) -> nn.Parameter:
        """A new parameter that holds `value` as `old` held its own.

        Raises:
            ReadOnlyWeight: this format cannot be written.
        """
        return nn.Parameter(value.to(device=old.device, dtype=old.dtype), requires_grad=old.requires_grad)

    def dtype(self, layer: nn.Module, weight: Any) -> torch.dtype | None:
        """What the layer computes in; None: in whatever its input is."""
        found: torch.dtype = weight.dtype
        return found

    def leave(self, layer: Any, weight: Any) -> None:
        """Before a parameter is taken out: give it what the layer keeps of it."""

    def enter(self, layer: Any, weight: Any) -> None:
        """After a parameter was put in: give the layer what it keeps of it."""


class Bnb4bit(Format):
    """bitsandbytes' NF4 and FP4: packed pairs of values and a `quant_state`."""

    @staticmethod
    def state(layer: Any, weight: Any) -> Any:
        """The scales: on the parameter, or on the layer where an engine (FSDP) has made the parameter a plain one."""
        return getattr(weight, "quant_state", None) or getattr(layer, "quant_state", None)

    def fits(self, layer: nn.Module, weight: Any) -> bool:
        return made_by("bitsandbytes", layer, weight) and weight.ndim == 2 and self.state(layer, weight) is not None

    def shape(self, layer: nn.Module, weight: Any) -> tuple[int, ...]:
        return tuple(self.state(layer, weight).shape)

    def read(self, layer: nn.Module, weight: Any) -> Tensor:
        from bitsandbytes import functional as F

        packed, state = weight.detach().data, self.state(layer, weight)
        if getattr(state, "packing_format_for_cpu", False):  # AVX-512 processors repack a weight in evaluation mode
            packed, state = F._convert_weight_packed_for_cpu_inverse(packed, copy.deepcopy(state))
        numbers: Tensor = F.dequantize_4bit(packed, state)
        return numbers

    def make(self, layer: nn.Module, old: Any, value: Tensor) -> nn.Parameter:
        from bitsandbytes.nn import Params4bit

        state = self.state(layer, old)
        new = Params4bit(
            value.float().cpu(),  # older versions quantise on the way from the CPU only
            requires_grad=False,
            blocksize=state.blocksize,
            compress_statistics=getattr(old, "compress_statistics", state.nested),
            quant_type=state.quant_type,
            quant_storage=getattr(old, "quant_storage", old.dtype),
        ).to(old.device)
        new.quant_state.dtype = state.dtype
        return new

    def dtype(self, layer: nn.Module, weight: Any) -> torch.dtype | None:
        return getattr(layer, "compute_dtype", None)

    def enter(self, layer: Any, weight: Any) -> None:
        if hasattr(layer, "quant_state"):
            layer.quant_state = self.state(layer, weight)
            weight.module = layer


class Bnb8bit(Format):
    """bitsandbytes' LLM.int8(): whole numbers and a scale a row, which the first forward moves to `layer.state`."""

    def fits(self, layer: nn.Module, weight: Any) -> bool:
        return weight.dtype == torch.int8 and made_by("bitsandbytes", layer, weight)

    def read(self, layer: Any, weight: Any) -> Tensor:
        scale = getattr(weight, "SCB", None)
        if scale is None:
            scale = layer.state.SCB
        return weight.detach().data.float() * (scale.detach().float() / 127)[:, None]

    def make(self, layer: nn.Module, old: Any, value: Tensor) -> nn.Parameter:
        from bitsandbytes.nn import Int8Params

        return Int8Params(value.cpu(), requires_grad=False, has_fp16_weights=False).to(old.device)

    def dtype(self, layer: nn.Module, weight: Any) -> torch.dtype | None:
        return None

    def leave(self, layer: Any, weight: Any) -> None:
        state = getattr(layer, "state", None)
        if state is not None and state.SCB is not None:
            weight.CB, weight.SCB = weight.data, state.SCB
            state.CB = state.SCB = None

    def enter(self, layer: Any, weight: Any) -> None:
        state = getattr(layer, "state", None)
        if state is not None:  # the next forward takes CB and SCB from the parameter again
            state.CB = state.SCB = None


class BnbUnpacked(Format):
    """A bitsandbytes layer that keeps its weight in floating point (`has_fp16_weights`) or is not quantised yet."""

    def fits(self, layer: nn.Module, weight: Any) -> bool:
        return type(weight) is not nn.Parameter and made_by("bitsandbytes", weight)

    def make(self, layer: nn.Module, old: Any, value: Tensor) -> nn.Parameter:
        new = copy.copy(old) if type(old).__name__ == "Params4bit" else copy.deepcopy(old)
        new.data = value.to(device=old.device, dtype=old.dtype)
        parameter: nn.Parameter = new
        return parameter


def _int8_tensor(old: Any, value: Tensor) -> Tensor:
    from torchao.quantization import PerGroup, PerRow, PerTensor
    from torchao.quantization.quant_primitives import MappingType

    block, shape = tuple(old.block_size), tuple(old.shape)
    per = PerTensor() if block == shape else PerRow() if block[-1] == shape[-1] else PerGroup(block[-1])
    shifted = old.zero_point is not None and bool((old.zero_point != 0).any())
    new: Tensor = type(old).from_hp(
        value,
        per,
        MappingType.ASYMMETRIC if shifted else MappingType.SYMMETRIC,
        act_quant_kwargs=old.act_quant_kwargs,
        act_quant_scale=old.act_quant_scale,
        act_quant_zero_point=old.act_quant_zero_point,
        reduce_range=old.reduce_range,
    )
    return new


def _intx_tensor(old: Any, value: Tensor) -> Tensor:
    from torchao.quantization.quant_primitives import MappingType

    new: Tensor = type(old).from_hp(
        value,
        tuple(old.block_size),
        old.target_dtype,
        mapping_type=MappingType.ASYMMETRIC if bool((old.zero_point != 0).any()) else MappingType.SYMMETRIC,
        activation_quantization=old.activation_quantization,
    )
    return new


class Subclass(Format):
    """A tensor subclass that can say its plain numbers (`dequantize`): torchao's, optimum-quanto's.

    `writers` has one line a class that can also be written.
    """

    writers: Mapping[str, Callable[[Any, Tensor], Tensor]] = {
        "Int8Tensor": _int8_tensor,
        "IntxUnpackedToInt8Tensor": _intx_tensor,
    }

    def fits(self, layer: nn.Module, weight: Any) -> bool:
        return type(weight) is not nn.Parameter and type(weight).dequantize is not Tensor.dequantize

    def read(self, layer: nn.Module, weight: Any) -> Tensor:
        if getattr(weight, "act_pre_scale", None) is not None:
            raise read_only(layer, weight, "scales its input as well, so its numbers are not its weight")
        numbers: Tensor = weight.detach().dequantize()
        return numbers

    def make(self, layer: nn.Module, old: Any, value: Tensor) -> nn.Parameter:
        writer = self.writers.get(type(old).__name__)
        if writer is None:
            raise read_only(layer, old)
        return nn.Parameter(writer(old, value.to(device=old.device, dtype=old.dtype)), requires_grad=False)


class Opaque(Format):
    """A packed linear layer that only its own library understands (GPTQ, AWQ, HQQ, AQLM, EETQ, torchao's int4 ...).

    It is read as what it makes of the unit vectors, and never written.
    """

    def fits(self, layer: nn.Module, weight: Any) -> bool:
        if not weight.is_floating_point() or made_by("torchao", weight):
            return True
        scaled = any(hasattr(layer, name) for name in ("weight_scale", "weight_scale_inv", "scale_weight"))
        return weight.itemsize == 1 and scaled

    def shape(self, layer: nn.Module, weight: Any) -> tuple[int, ...]:
        for out, into in SIZES:
            if hasattr(layer, out) and hasattr(layer, into):
                return int(getattr(layer, out)), int(getattr(layer, into))
        raise read_only(layer, weight, "has no shape that we know")

    @torch.no_grad()
    def read(self, layer: nn.Module, weight: Any) -> Tensor:
        _, width = self.shape(layer, weight)
        units = torch.eye(width, dtype=self.dtype(layer, weight), device=device(layer, weight))
        bias = getattr(layer, "bias", None)
        try:
            y = layer(units)
        except Exception as e:
            raise read_only(layer, weight, f"cannot be read ({type(e).__name__}: {e})") from e
        numbers: Tensor = y if bias is None else y - bias
        return numbers.mT

    def make(self, layer: nn.Module, old: Any, value: Tensor) -> nn.Parameter:
        raise read_only(layer, old)

    def dtype(self, layer: nn.Module, weight: Any) -> torch.dtype | None:
        tensors = (weight, *layer.parameters(recurse=False), *layer.buffers(recurse=False))
        return next((t.dtype for t in tensors if t is not None and t.dtype in FLOATS), torch.float32)


PLAIN, OPAQUE = Format(), Opaque()
FORMATS: list[Format] = [Bnb4bit(), Bnb8bit(), BnbUnpacked(), Subclass(), OPAQUE, PLAIN]


def format_of(layer: nn.Module, weight: Any) -> Format:
    """The format of a parameter of a layer."""
    if type(weight) is nn.Parameter and weight.dtype in FLOATS and type(layer).__module__.startswith("torch."):
        return PLAIN
    return OPAQUE if weight is None else next(f for f in FORMATS if f.fits(layer, weight))


def quantised(layer: nn.Module, param: str = "weight") -> bool:
    """Whether a parameter is kept in anything but plain numbers."""
    weight = getattr(layer, param, None)
    return packed_linear(layer) if weight is None else format_of(layer, weight) is not PLAIN


def packed_linear(layer: nn.Module) -> bool:
    """Whether a layer is a linear one of a quantisation library that does not build on nn.Linear."""
    own = {**layer.__dict__, **layer._parameters, **layer._buffers}  # not what a wrapper passes through
    if not any(out in own and into in own for out, into in SIZES):
        return False
    weight = own.get("weight")
    return any(name in own for name in PACKED) or (isinstance(weight, Tensor) and not weight.is_floating_point())


def shape(layer: nn.Module, param: str) -> tuple[int, int]:
    """The two-dimensional shape of a parameter in plain numbers, as stored."""
    weight = getattr(layer, param, None)
    first, *rest = format_of(layer, weight).shape(layer, weight)
    return int(first), int(torch.Size(rest).numel())


def read(layer: nn.Module, weight: Tensor | None) -> Tensor:
    """The parameter as a plain floating-point tensor, detached. It may be one that the layer held before a merge."""
    return format_of(layer, weight).read(layer, weight)


def write(layer: nn.Module, param: str, value: Tensor) -> None:
    """Give the layer a new parameter object holding `value` in the old one's number format.

    Raises:
        ReadOnlyWeight: the format cannot be written.
    """
    old = offload.value(layer, param, getattr(layer, param, None))
    install(layer, {param: format_of(layer, old).make(layer, old, value.detach())})


def install(layer: nn.Module, parameters: Mapping[str, Any]) -> None:
    """Exchange parameter objects: the one way in and out, since some formats keep a part of the weight in the layer."""
    changed = {k: v for k, v in parameters.items() if layer._parameters.get(k) is not v}
    for name in changed:
        if (old := layer._parameters.get(name)) is not None:
            format_of(layer, old).leave(layer, old)
    layer._parameters.update(changed)
    for new in changed.values():
        if new is not None:
            format_of(layer, new).enter(layer, new)
    offload.install(layer, changed)


def moved(parameter: Any, fn: Callable[[Any], Any]) -> None:
    """Apply a conversion of nn.Module (`to`, `half` ...) to a parameter that no module holds, in place."""
    new = fn(parameter)
    if is_traceable_wrapper_subclass(parameter):
        torch.utils.swap_tensors(parameter, nn.Parameter(new, requires_grad=False))
        return
    parameter.data = new.data
    for name in ("CB", "SCB"):
        if getattr(parameter, name, None) is not None:
            setattr(parameter, name, parameter.data if name == "CB" else getattr(parameter, name).to(new.device))


def compute_dtype(layer: nn.Module, param: str) -> torch.dtype:
    """The number format the layer computes in (fp32 where it follows its input)."""
    weight = getattr(layer, param, None)
    return format_of(layer, weight).dtype(layer, weight) or torch.float32


def run_dtype(layer: nn.Module, param: str, x: Tensor) -> torch.dtype:
    """The number format in which the layer treats the input `x`."""
    found = format_of(layer, getattr(layer, param, None)).dtype(layer, getattr(layer, param, None))
    return found or (x.dtype if x.is_floating_point() else torch.float32)


def device(layer: nn.Module, weight: Tensor | None) -> torch.device:
    """Where a weight lives, or the layer where it has none of that name."""
    if weight is not None:
        return weight.device
    tensors = (t for t in (*layer.parameters(), *layer.buffers()))
    return next((t.device for t in tensors), torch.device("cpu"))


def plain(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """The module with a plain layer in place of every quantised Linear and Embedding in it (or of itself).

    Args:
        dtype: of the new weights; by default what each layer computes in.
    """
    made: dict[int, nn.Module] = {}

    def replaced(child: Any) -> nn.Module:
        known = isinstance(child, nn.Linear | nn.Embedding) or packed_linear(child)
        if known and id(child) not in made and quantised(child):
            made[id(child)] = _plain_layer(child, dtype or compute_dtype(child, "weight"))
        return made.get(id(child), child)

    for parent in list(module.modules()):
        for name, child in parent.named_children():
            parent._modules[name] = replaced(child)
    return replaced(module)


def _plain_layer(layer: Any, dtype: torch.dtype) -> nn.Module:
    W, bias = read(layer, getattr(layer, "weight", None)).to(dtype), getattr(layer, "bias", None)
    if isinstance(layer, nn.Embedding):
        rows, width = W.shape
        new: Any = nn.Embedding(rows, width, padding_idx=layer.padding_idx, device="meta")
    else:
        new = nn.Linear(W.shape[1], W.shape[0], bias=False, device="meta")
        new.bias = None if bias is None else nn.Parameter(bias.detach().to(dtype, copy=True), requires_grad=False)
    new.weight = nn.Parameter(W, requires_grad=False)
    made: nn.Module = new.train(layer.training)
    return made
