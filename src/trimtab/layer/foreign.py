"""What stands behind the layers that a user's own class makes (`LoraConfig._register_custom_module`)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.report import warn
from trimtab.errors import ConfigError, NotMergeable, RouteError
from trimtab.formats import weights
from trimtab.layer.plan import Board
from trimtab.layer.switch import Following
from trimtab.methods import METHODS, PLAIN, chooses, load

PREFIX = "lora_"  # of the attributes that hold what adapters have
HALF = (torch.float16, torch.bfloat16)
STARTS = (True, False, "gaussian")  # values of `init_lora_weights` that are known here
# Variants of LoRA that are no other formula at one layer, or that `init_lora_weights` chooses.
ALIKE = ("ensure_weight_tying", "init_lora_weights=mica")


class Foreign(Following):
    """PEFT's LoraLayer as the second parent, beside nn.Module, of a user's class; its forward is the user's own.

    What adapters have lies in dicts of modules or parameters under names that begin with `lora_`, by adapter. The
    layer follows the model's route: `active_adapters` and `disable_adapters` say what it is.
    """

    adapter_layer_names: tuple[str, ...] = (
        "lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector",
    )  # fmt: skip
    other_param_names: tuple[str, ...] = (
        "r", "lora_alpha", "scaling", "lora_dropout", "use_dora", "use_rslora", "lora_bias",
    )  # fmt: skip
    cast_input_dtype_enabled = True
    base_layer: nn.Module

    def __init__(self, base_layer: nn.Module, ephemeral_gpu_offload: bool = False, **kwargs: Any) -> None:
        self.board = Board()  # of its own, until it stands in a model
        self.base_layer = base_layer
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.use_dora: dict[str, bool] = {}
        self.use_rslora: dict[str, bool] = {}
        self.lora_bias: dict[str, bool] = {}
        self.lora_variant: dict[str, Any] = {}
        self.lora_dropout = nn.ModuleDict()
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
        self.lora_embedding_A, self.lora_embedding_B = nn.ParameterDict(), nn.ParameterDict()
        self.lora_magnitude_vector = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self.ephemeral_gpu_offload, self.kwargs = ephemeral_gpu_offload, kwargs
        self.in_features, self.out_features = sizes(self.get_base_layer())
        if self.in_features is None:
            warn(
                f"Unsupported layer type '{type(self.get_base_layer())}' encountered, proceed at your own risk.",
                UserWarning,
            )

    # ------------------------------------------------------------------ the frozen layer
    def get_base_layer(self) -> nn.Module:
        """The frozen layer."""
        layer: Any = self.base_layer
        while hasattr(layer, "base_layer"):
            layer = layer.base_layer
        return layer

    @property
    def weight(self) -> Any:
        """The frozen layer's weight."""
        return self.get_base_layer().weight

    @property
    def bias(self) -> Any:
        """The frozen layer's bias."""
        return self.get_base_layer().bias

    def get_base_weight(self) -> Tensor:
        """The frozen layer's weight as it is now; a quantised one dequantised."""
        return weights.read(self.get_base_layer(), self.weight)

    # ------------------------------------------------------------------ adapters
    @property
    def containers(self) -> Iterator[tuple[str, Any]]:
        """(attribute, dict of modules or parameters by adapter) of all that adapters have here."""
        own = self.__dict__["_modules"].items()
        for name, module in own:
            wanted = name.startswith(PREFIX) or name in self.adapter_layer_names
            if wanted and isinstance(module, nn.ModuleDict | nn.ParameterDict):
                yield name, module

    @property
    def adapters(self) -> list[str]:
        """The adapters that have something here."""
        return list(dict.fromkeys(name for _, container in self.containers for name in container))

    def tensors(self, adapter: str) -> Iterator[tuple[str, nn.Module, str]]:
        """(template of its key, holder, name there) of each tensor an adapter has here.

        What is none of the frozen layer's and none of another adapter's is every adapter's: it has no `{}` in its key.
        """
        module: Any = self
        known = {*self.adapters} - {adapter}
        for key in module.state_dict():
            first, *parts = key.split(".")
            if first == "base_layer" or (known & {*parts} and adapter not in parts):
                continue
            path, _, name = key.rpartition(".")
            if adapter in parts:
                parts[parts.index(adapter)] = "{}"
            yield ".".join([first, *parts]), module.get_submodule(path), name

    def adapter_parameters(self, adapter: str) -> Iterator[tuple[None, nn.Parameter]]:
        """(None, parameter) for each parameter of an adapter here, as of an adapted layer."""
        for template, holder, name in self.tensors(adapter):
            parameter = holder._parameters.get(name)
            if "{}" in template and parameter is not None:
                yield None, parameter

    def widen(self, adapter: str) -> None:
        """Keep an adapter's half-precision parameters in fp32."""
        for _, parameter in self.adapter_parameters(adapter):
            if parameter.dtype in HALF:
                parameter.data = parameter.data.float()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Make adapters trainable or frozen."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            for _, parameter in self.adapter_parameters(name):
                if parameter.is_floating_point():
                    parameter.requires_grad_(requires_grad)

    def detach(self, adapter: str) -> None:
        """Take out all that an adapter has here."""
        for holder in (*(c for _, c in self.containers), *(getattr(self, n, None) for n in self.other_param_names)):
            if holder is not None and adapter in holder:
                del holder[adapter]

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter of this layer; if it was in use, the first remaining one takes its place."""
        if adapter_name in self.merged_adapters:
            raise ValueError(f"Adapter '{adapter_name}' is merged into the base: call unmerge_adapter() first.")
        self.detach(adapter_name)
        self.without(adapter_name)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: Any, **kwargs: Any) -> None:
        """Give the layer the tensors of a plain LoRA, as of a linear layer."""
        module: Any = self
        if r <= 0:
            raise ValueError(f"`r` should be a positive integer value but the value passed is {r}")
        others = [field for field in load(METHODS[PLAIN][0], "VARIANTS") if field not in ALIKE]
        if chosen := [field for field in others if chooses(field, vars(config))]:
            raise ConfigError(f"{type(self).__name__} has the tensors of a plain LoRA: it does not know {chosen}.")
        if self.in_features is None or self.out_features is None:
            kind = type(self.get_base_layer()).__name__
            raise ConfigError(f"{type(self).__name__}: the sizes of a {kind} are unknown: write its own update_layer.")
        self.r[adapter_name], self.lora_alpha[adapter_name] = r, lora_alpha
        self.use_rslora[adapter_name], self.use_dora[adapter_name] = bool(config.use_rslora), False
        self.lora_bias[adapter_name] = bool(config.lora_bias)
        p = config.lora_dropout
        self.lora_dropout[adapter_name] = nn.Dropout(p) if p > 0 else nn.Identity()
        self.lora_A[adapter_name] = nn.Linear(self.in_features, r, bias=False)
        self.lora_B[adapter_name] = nn.Linear(r, self.out_features, bias=config.lora_bias)
        self.scaling[adapter_name] = self._own_scale(adapter_name)
        self.reset_lora_parameters(adapter_name, config.init_lora_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.lora_dropout[adapter_name].train(module.training)
        self.set_requires_grad(adapter_name, adapter_name in self.active_adapters)

    @torch.no_grad()
    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: Any) -> None:
        """Start A and B; False leaves them as they are."""
        if init_lora_weights not in STARTS:
            raise ConfigError(
                f"{type(self).__name__} starts by init_lora_weights=True, False or 'gaussian', not "
                f"{init_lora_weights!r}: write its own reset_lora_parameters."
            )
        if init_lora_weights is False or adapter_name not in self.lora_A:
            return
        A, B = (container[adapter_name] for container in (self.lora_A, self.lora_B))
        W: Any = A.weight
        if init_lora_weights == "gaussian":
            nn.init.normal_(W, std=1 / self.r[adapter_name])
        else:
            nn.init.kaiming_uniform_(W, a=math.sqrt(5))
        for parameter in B.parameters():
            nn.init.zeros_(parameter)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: Any = None) -> None:
        """Bring an adapter's tensors to where the frozen layer's are, in its number format if that can be trained."""
        first = next(self.get_base_layer().parameters(), None)
        if first is None or first.device.type == "meta":
            return
        dtype = first.dtype if first.is_floating_point() and first.dtype.itemsize > 1 else None
        for _, container in self.containers:
            if adapter_name not in container:
                continue
            if isinstance(container, nn.ParameterDict):
                container[adapter_name].data = container[adapter_name].to(device or first.device, dtype)
            else:
                container[adapter_name].to(device or first.device, dtype)

    # ------------------------------------------------------------------ scales
    def _own_scale(self, adapter: str) -> float:
        r = self.r[adapter]
        return self.lora_alpha[adapter] / (math.sqrt(r) if self.use_rslora.get(adapter) else r)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set an adapter's scale to `scale` times its own."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self._own_scale(adapter)

    def scale_layer(self, scale: float) -> None:
        """Multiply the scale of the active adapters."""
        for name in self.active_adapters if scale != 1 else ():
            if name in self.scaling:
                self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scale of the active adapters, or without an argument set it back to their own."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] = self._own_scale(name) if scale is None else self.scaling[name] / scale

    # ------------------------------------------------------------------ forward and merging
    def _cast_input_dtype(self, x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """The input in the number format of an adapter."""
        return x if x is None or x.dtype == dtype or not self.cast_input_dtype_enabled else x.to(dtype)

    def _check_forward_args(self, x: Any, *args: Any, **kwargs: Any) -> None:
        """Raise for a batch whose rows go to different adapters."""
        if kwargs.get("adapter_names") is not None:
            raise RouteError(f"{type(self).__name__}, a layer class of its own, takes no `adapter_names`.")

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """False: what its forward computes is not known."""
        return False

    @property
    def merged(self) -> bool:
        """Whether adapters are part of the frozen layer's weight now."""
        return bool(self.merged_adapters)

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Raise: only the user's class knows how."""
        raise NotMergeable(f"{type(self).__name__}, a layer class of its own, has no `merge`.")

    def unmerge(self) -> None:
        """Nothing: nothing was merged."""


class ForeignLinear(nn.Module, Foreign):
    """PEFT's lora.Linear, for a user's class to inherit: y = W x + b + s·B·A·x."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: Any,
        r: int = 0,
        lora_alpha: float = 1,
        is_target_conv_1d_layer: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        Foreign.__init__(self, base_layer, **kwargs)
        self.fan_in_fan_out = type(self.get_base_layer()).__name__ == "Conv1D"  # its weight lies (in, out)
        self._originals: list[nn.Parameter] = []  # the weight's before merges, in no module's sight
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The frozen layer's output and the active adapters' updates, each of the same input."""
        self._check_forward_args(x, *args, **kwargs)
        if self.disable_adapters and self.merged:
            own: Any = {"weight": self._originals[0]}
            return torch.func.functional_call(self.get_base_layer(), own, (x, *args), kwargs)  # type: ignore[no-any-return]
        y: Tensor = self.base_layer(x, *args, **kwargs)
        names = [] if self.disable_adapters or self.merged else self.active_adapters
        dtype = y.dtype
        for name in names:
            if name in self.lora_A:
                A, B, dropout = self.lora_A[name], self.lora_B[name], self.lora_dropout[name]
                y = y + B(A(dropout(self._cast_input_dtype(x, A.weight.dtype)))) * self.scaling[name]  # type: ignore[arg-type]
        return y.to(dtype)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """s·B·A, as the frozen weight lies."""
        A, B = (container[adapter].weight for container in (self.lora_A, self.lora_B))
        delta: Tensor = self.scaling[adapter] * (B @ A)  # type: ignore[operator]
        return delta.T if self.fan_in_fan_out else delta

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Fold adapters (the active ones by default) into the frozen weight; the old weight is held."""
        base: Any = self.get_base_layer()
        names = self.active_adapters if adapter_names is None else adapter_names
        for name in [n for n in names if n in self.lora_A and n not in self.merged_adapters]:
            if self.lora_bias[name]:
                raise NotMergeable(f"{type(self).__name__} cannot merge '{name}': it has a bias on B (`lora_bias`).")
            old = base.weight
            new = weights.read(base, old) + self.get_delta_weight(name).to(old.device)
            if safe_merge and not new.isfinite().all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            weights.write(base, "weight", new)
            self._originals.append(old)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Put the original weight back."""
        if self._originals:
            weights.install(self.get_base_layer(), {"weight": self._originals[0]})
            self._originals.clear()
        self.merged_adapters.clear()


def sizes(layer: nn.Module) -> tuple[Any, Any]:
    """(in, out) of a layer of a kind PEFT knows, or of one that says; else (None, None)."""
    for name_in, name_out in (
        ("in_features", "out_features"), ("in_channels", "out_channels"), ("num_embeddings", "embedding_dim"),
    ):  # fmt: skip
        if isinstance(size := getattr(layer, name_in, None), int):
            return size, getattr(layer, name_out)
    if isinstance(layer, nn.MultiheadAttention):
        return layer.embed_dim, 3 * layer.embed_dim
    if type(layer).__name__ == "Conv1D":
        weight: Any = layer.weight
        return tuple(weight.shape)  # type: ignore[return-value]
    return None, None
