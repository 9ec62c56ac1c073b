"""peft's layer classes: here there is one class of adapted layer, so that these answer `isinstance` by its methods."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

from torch import nn

from trimtab.as_peft import replaced
from trimtab.as_peft.quantised import BACKENDS, LAYERS
from trimtab.layer.adapted import AdaptedLayer
from trimtab.layer.foreign import Foreign, ForeignLinear
from trimtab.layer.views import listed
from trimtab.methods import METHODS, config_class, load, prefix_of
from trimtab.shell.status import quantization_backend
from trimtab.shell.tasks import inject_adapter_in_model


def _conv1d() -> type[nn.Module]:
    from transformers.pytorch_utils import Conv1D

    return Conv1D


# What stands at the end of a layer class's name: the base layers it is for.
BASES: dict[str, Any] = {
    "Linear": lambda: (nn.Linear, _conv1d()),
    "Embedding": lambda: (nn.Embedding,),
    "Conv1d": lambda: (nn.Conv1d,),
    "Conv2d": lambda: (nn.Conv2d,),
    "Conv3d": lambda: (nn.Conv3d,),
    "MultiheadAttention": lambda: (nn.MultiheadAttention,),
}


# The trained tensors of methods whose layers have other ones from kind to kind of base layer.
LORA = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
LEAVES = {
    "LORA": LORA,
    "ADALORA": LORA,
    "IA3": ("ia3_l",),
    "LN_TUNING": ("ln_tuning_layers",),
    "LOHA": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    "LOKR": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    "OFT": ("oft_R", "oft_embedding_R"),
    "TRAINABLE_TOKENS": ("trainable_tokens_delta",),
    "VERA": ("vera_lambda_b", "vera_lambda_d"),
}


class ByMethod(type):
    """A class whose instances are the adapted layers that have a certain method on a certain kind of layer."""

    peft_type: str
    bases: tuple[type[nn.Module], ...]

    @property
    def adapter_layer_names(cls) -> tuple[str, ...]:
        """The names of the method's tensors that are trained."""
        return LEAVES.get(cls.peft_type, (prefix_of(cls.peft_type),))

    @property
    def other_param_names(cls) -> tuple[str, ...]:
        """The names of its settings that a layer shows."""
        file, method, _ = METHODS[cls.peft_type]
        return listed(load(file, method))

    def __getattr__(cls, name: str) -> Any:
        try:
            return replaced.found(cls, name)
        except AttributeError:
            if not can_make(cls):
                raise
        return getattr(_behind(cls), name)

    def __setattr__(cls, name: str, value: Any) -> None:
        if not replaced.replace(cls, name, value):
            super().__setattr__(name, value)

    def __delattr__(cls, name: str) -> None:
        if not replaced.restore(cls, name):
            super().__delattr__(name)

    def __new__(mcls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **kwargs: Any) -> Any:
        """A stand-in; or a user's class that inherits from one, which is a module like any other."""
        behind = tuple(_behind(base) if can_make(base) else base for base in bases)
        if behind == bases:
            return super().__new__(mcls, name, bases, namespace, **kwargs)
        return type(name, behind, namespace, **kwargs)

    def __instancecheck__(cls, instance: Any) -> bool:
        if isinstance(instance, Foreign):
            return can_make(cls) and isinstance(instance, _behind(cls))
        if not isinstance(instance, AdaptedLayer):
            return False
        if cls.__name__ == "ParamWrapper" and not instance.param:
            return False
        if cls.__name__ in LAYERS and quantization_backend(instance.base_layer) != LAYERS[cls.__name__]:
            return False
        if cls.bases and not isinstance(instance.base_layer, cls.bases):
            return False
        wanted = config_class(cls.peft_type)
        return any(isinstance(method.options, wanted) for methods in instance.methods.values() for method in methods)

    def __subclasscheck__(cls, subclass: type) -> bool:
        if issubclass(subclass, Foreign):
            return can_make(cls) and issubclass(subclass, _behind(cls))
        if isinstance(subclass, ByMethod):
            return subclass.peft_type == cls.peft_type and (
                not cls.bases or set(subclass.bases) <= set(cls.bases) != set()
            )
        return super().__subclasscheck__(subclass)

    def __call__(
        cls, base_layer: nn.Module, adapter_name: str, *rest: Any, config: Any = None, **fields: Any
    ) -> AdaptedLayer:
        """An adapted layer by itself; what is not in `config` is given by name."""
        named = list(rest)
        parameter = ""
        if cls.__name__ == "ParamWrapper":
            parameter = str(fields.pop("parameter_name") if "parameter_name" in fields else named.pop(0))
        config = named.pop(0) if named and config is None else config
        return alone(cls.peft_type, base_layer, adapter_name, parameter, config, *named, **fields)


def can_make(cls: Any) -> bool:
    """Whether users' classes can inherit from one of the stand-ins: from LoRA's layers, in general and of matrices."""
    made = isinstance(cls, ByMethod) and cls.peft_type == "LORA"
    return made and cls.__name__ in ("LoraLayer", "Linear", "Linear4bit", "Linear8bitLt")


@cache
def _behind(cls: type) -> type[Any]:
    """What a user's class inherits from in the place of a stand-in."""
    if cls.__name__ == "LoraLayer":
        return Foreign
    return type(cls.__name__, (ForeignLinear,), {"__module__": cls.__module__})


def _begin(cls: type) -> Any:
    """The `__init__` of a stand-in, which users' classes call by the name of that."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        _behind(cls).__init__(self, *args, **kwargs)

    return __init__


def base_of(prefix: str, name: str) -> tuple[type[nn.Module], ...] | None:
    """The base layers that a method's layer class `name` is for, or None where it is no such class."""
    kind = BASES.get(name) or BASES.get(name.removeprefix(prefix)) or BASES.get(name.removeprefix("SVD"))
    return kind() if kind else None


def alone(
    peft_type: str,
    base_layer: nn.Module,
    adapter_name: str,
    parameter: str,
    config: Any = None,
    r: int = 0,
    lora_alpha: float | None = None,
    **fields: Any,
) -> AdaptedLayer:
    """A layer with an adapter, in no model; the frozen layer's own parameters train as before.

    Args:
        parameter: the parameter to adapt, where it is not the layer as a whole.
        config: the adapter's config; `r`, `lora_alpha` and fields given by name stand in front of it.
    """
    if isinstance(config, int):  # (layer, name, r, alpha), as before PEFT 0.18
        r, lora_alpha, config = config, r or None, None
    given: dict[str, Any] = {"r": r or None, "lora_alpha": lora_alpha, **fields}
    own: Any = config.copy() if config is not None else config_class(peft_type)()
    for name, value in given.items():
        if value is not None and name in own.__dataclass_fields__:
            setattr(own, name, value)
    own.target_modules = [] if parameter else ["layer"]
    if "target_parameters" in own.__dataclass_fields__:
        own.target_parameters = [f"layer.{parameter}"] if parameter else None
    own.modules_to_save, own.bias = None, "none"
    own.rank_pattern, own.alpha_pattern = {}, {}
    holder, free = nn.Module(), [p for p in base_layer.parameters() if p.requires_grad]
    holder.layer = base_layer
    inject_adapter_in_model(own, holder, adapter_name)
    for original in free:
        original.requires_grad_(True)
    layer: Any = holder.layer
    return layer  # type: ignore[no-any-return]


def dispatcher(peft_type: str, name: str) -> Any:
    """One of peft's dispatchers: an adapted layer around a target whose weight its backend holds, else None."""
    return partial(_dispatch, peft_type, BACKENDS[name.removeprefix("dispatch_")])


def _dispatch(
    peft_type: str, backend: str | None, target: nn.Module, adapter_name: str, config: Any = None, **kwargs: Any
) -> AdaptedLayer | None:
    base: Any = target.base_layer if isinstance(target, AdaptedLayer) else target
    if config is None:
        config = next(value for name, value in kwargs.items() if name.endswith("_config"))
    fits = hasattr(base, "weight") and quantization_backend(base) == backend
    return alone(peft_type, target, adapter_name, "", config) if fits else None


class ParamWrapper(metaclass=ByMethod):
    """peft's layer around a module one of whose parameters is adapted by name."""

    peft_type, bases = "LORA", ()


@cache
def layer_class(peft_type: str, name: str, bases: tuple[type[nn.Module], ...]) -> type:
    """The stand-in for one of peft's layer classes."""
    module = f"peft.tuners.{peft_type.lower()}.layer"
    cls: type = ByMethod(
        name, (), {"peft_type": peft_type, "bases": bases, "__module__": module, "__doc__": f"{name} of peft."}
    )
    if can_make(cls):
        type.__setattr__(cls, "__init__", _begin(cls))
    return cls


class AdaptedAttention(metaclass=ByMethod):
    """peft's attention with an adaption prompt."""

    peft_type, bases = "ADAPTION_PROMPT", ()


class TokensWrapper(metaclass=ByMethod):
    """peft's wrapper around an embedding some of whose rows an adapter trains."""

    peft_type = "TRAINABLE_TOKENS"
    bases = (nn.Embedding, nn.Linear)
