"""What a layer of PEFT's shows beside its forward: its adapters, their settings, and ways to change it by itself."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.method import Method
from trimtab.core.site import Site
from trimtab.formats import weights
from trimtab.layer.originals import Originals
from trimtab.layer.switch import Switched
from trimtab.layer.views import listed

SIZES = {"in_features": ("in_features", "in_channels"), "out_features": ("out_features", "out_channels")}
CONVERTED = ("linear", "embedding", "conv", "attention", "parameter")  # kinds of layers that a LoRA can change
RESET = re.compile(r"reset_\w+_parameters")  # in PEFT with what the method is called in between
# What a layer around a module one of whose parameters is adapted shows of it, beside what all do.
OF_PARAMETERS = ("parameter_name", "num_experts", "get_param", "get_delta_factors", "_did_swap_in_out_features")
NOT_OURS = ("_hf_hook", "_old_forward")  # what accelerate hangs on the frozen layer


class Face(Switched):
    """A layer with adapters as other libraries look at it and handle it.

    Attributes:
        base_layer: the frozen layer, or another layer of this kind that adapts another of its parameters.
        sites: the frozen layer's adapted parameters, by name.
        methods: of the adapters that are in the module tree.
        merged_adapters: those that are part of the base's weights now.
        cast_input_dtype_enabled: accepted for PEFT's sake; an input is never copied into an adapter's number format.
    """

    cast_input_dtype_enabled = True

    base_layer: nn.Module
    param: str
    sites: dict[str, Site]
    methods: dict[str, tuple[Method, ...]]
    shown: Mapping[str, Callable[[Any, str], Any]]
    merged_adapters: list[str]
    originals: Originals

    @property
    def frozen(self) -> nn.Module:
        """The layer itself."""
        raise NotImplementedError

    def read(self, name: str) -> Any:
        """A parameter as the model must see it where it reads the layer's without calling it."""
        raise NotImplementedError

    def stack(self, names: Sequence[str]) -> list[Method]:
        """The methods of some adapters here, innermost first; merged ones are part of the base already."""
        raise NotImplementedError

    def detach(self, adapter: str) -> None:
        """Take an adapter's methods and tensors out of the module tree."""
        raise NotImplementedError

    @property
    def adapters(self) -> list[str]:
        """The adapters that are here."""
        residents = self.board.residents
        return [*self.methods, *(residents.parked_at(self) if residents is not None else ())]

    def adapter_parameters(self, adapter: str) -> Iterator[tuple[Any, nn.Parameter]]:
        """(method, parameter) for each trained tensor of an adapter here."""
        for method in self.methods.get(adapter, ()):
            if method.home is self:
                for leaf in method.trained:
                    yield method, method.tensor(leaf)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Make adapters trainable or frozen."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            for _, parameter in self.adapter_parameters(name):
                parameter.requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter of this layer; if it was in use, the first remaining one takes its place."""
        if adapter_name in self.merged_adapters:
            raise ValueError(f"Adapter '{adapter_name}' is merged into the base: call unmerge_adapter() first.")
        self.originals.give_back(adapter_name)
        self.detach(adapter_name)
        self.without(adapter_name)

    def get_base_layer(self) -> nn.Module:
        """The frozen layer."""
        return self.frozen

    def _scaled(self, change: Callable[[Any], float], names: Sequence[str]) -> None:
        for method in (m for n in names for m in self.methods.get(n, ()) if "scaling" in m.views):
            method.scaling = change(method)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set an adapter's scale to `scale` times its own."""
        self.bring(adapter)
        self._scaled(lambda m: float(scale * m.unit), (adapter,))

    def scale_layer(self, scale: float) -> None:
        """Multiply the scale of the active adapters."""
        self._scaled(lambda m: float(m.scaling * scale), self.active_adapters)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scale of the active adapters, or without an argument set it back to their own."""
        self._scaled(lambda m: float(m.unit if scale is None else m.scaling / scale), self.active_adapters)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or name in NOT_OURS or "base_layer" not in self.__dict__.get("_modules", {}):
                raise
        if any(name in site.reads for site in self.__dict__.get("sites", {}).values()):
            return self.read(name)
        if name in SIZES:
            return self._size(name)
        if name == "fan_in_fan_out":
            return any(site.flipped and site.kind == "linear" for site in self.sites.values())
        if RESET.fullmatch(name):
            return self.reset
        if self.param and name in OF_PARAMETERS:
            return self._of_parameter(name)
        make = self.__dict__.get("shown", {}).get(name)
        return getattr(self.base_layer, name) if make is None else make(self, name)

    def _size(self, name: str) -> int:
        """in_features or out_features: the layer's own, its channels, or the sizes of the matrix it is."""
        for own in SIZES[name]:
            if isinstance(size := getattr(self.frozen, own, None), int):
                return size
        site: Any = next(iter(self.sites.values()))
        return int(site.fan_in if name == "in_features" else site.fan_out)

    @property
    def adapter_layer_names(self) -> tuple[str, ...]:
        """The names under which the adapters' trained tensors are here."""
        methods = [m for ms in self.methods.values() for m in ms]
        return tuple(dict.fromkeys(m.templates[leaf].partition(".{}")[0] for m in methods for leaf in m.trained))

    @property
    def other_param_names(self) -> tuple[str, ...]:
        """The names under which the adapters' settings are shown here."""
        return tuple(dict.fromkeys(name for ms in self.methods.values() for m in ms for name in listed(type(m))))

    def get_base_weight(self) -> Tensor:
        """The frozen layer's weight as it is now, in its own layout; a quantised one dequantised."""
        return weights.read(self.frozen, self.frozen._parameters[next(iter(self.sites)) or "weight"])

    def set_base_weight(self, weight_data: Tensor) -> None:
        """Give the frozen layer another weight, in its own layout; a quantised one is quantised as it was."""
        frozen, name = self.frozen, next(iter(self.sites)) or "weight"
        if weights.quantised(frozen, name):
            weights.write(frozen, name, weight_data)
        else:
            frozen._parameters[name].data = weight_data  # type: ignore[union-attr]
        self.changed()

    @torch.no_grad()
    def reset(self, adapter_name: str, init: Any = None) -> None:
        """Start an adapter's tensors here anew.

        Args:
            init: as `init_lora_weights` of a config, if it has that; None: as its own. False leaves them as they are.

        Raises:
            ValueError: a start that is unknown, or that changes the base's weight.
        """
        if adapter_name not in self.adapters or init is False:
            return
        self.bring(adapter_name)
        for method in self.methods[adapter_name]:
            config = method.options
            if init is not None and "init_lora_weights" in config.__dataclass_fields__:
                config = config.copy()
                config.init_lora_weights = init
            if method.mutates(config):
                what = "its config" if init is None else f"init_lora_weights={init!r}"
                raise ValueError(f"The start by {what} changes the base's weight: add '{adapter_name}' anew.")
            method.reset(config)

    def _of_parameter(self, name: str) -> Any:
        """What PEFT's layer around a module whose parameter is adapted by name shows of it."""
        site = self.sites[self.param]

        def get_delta_factors(adapter_name: str) -> tuple[Tensor, Tensor, float]:
            """(B, A, scale) of an adapter whose change is scale · B A (experts, ...)."""
            self.bring(adapter_name)
            method: Any = self.methods[adapter_name][0]
            A, B = method.matrices
            return B, A, method.scaling

        shown: dict[str, Any] = {"parameter_name": self.param, "num_experts": site.batch[0] if site.batch else 1}
        # Of a stack of experts (E, in, out), whose first size after E PEFT once took for the outputs' number.
        shown |= {"_did_swap_in_out_features": bool(site.batch)}
        shown |= {"get_param": lambda: self.frozen._parameters[self.param], "get_delta_factors": get_delta_factors}
        return shown[name]

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: Any = None) -> None:
        """Bring an adapter's tensors here to where the frozen layer's are, or to `device`."""
        if adapter_name not in self.adapters:
            return
        self.bring(adapter_name)
        held = [v for v in self.frozen._parameters.values() if v is not None and v.device.type != "meta"]
        where = device if device is not None else next((v.device for v in held), None)
        for method in self.methods[adapter_name] if where is not None else ():
            for leaf in method.declared:
                tensor = method.tensor(leaf)
                if tensor.device.type != "meta":
                    tensor.data = tensor.data.to(where)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether a LoRA can stand for an adapter's change of this layer."""
        if adapter_name in self.adapters:
            self.bring(adapter_name)
        methods = self.methods.get(adapter_name, ())
        return bool(methods) and all(m.mergeable and m.site.kind in CONVERTED for m in methods)

    def extra_repr(self) -> str:
        """The adapters and their methods."""
        return ", ".join(f"{n}: {' + '.join(type(m).__name__ for m in ms)}" for n, ms in self.methods.items())
