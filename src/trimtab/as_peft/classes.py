"""peft's layer classes: here there is one class of adapted layer, so that these answer `isinstance` by its methods."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn

from trimtab.layer.adapted import AdaptedLayer
from trimtab.methods import config_class


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


class ByMethod(type):
    """A class whose instances are the adapted layers that have a certain method on a certain kind of layer."""

    peft_type: str
    bases: tuple[type[nn.Module], ...]

    def __instancecheck__(cls, instance: Any) -> bool:
        if not isinstance(instance, AdaptedLayer):
            return False
        if cls.bases and not isinstance(instance.base_layer, cls.bases):
            return False
        wanted = config_class(cls.peft_type)
        return any(isinstance(method.options, wanted) for methods in instance.methods.values() for method in methods)

    def __subclasscheck__(cls, subclass: type) -> bool:
        if isinstance(subclass, ByMethod):
            return subclass.peft_type == cls.peft_type and (
                not cls.bases or set(subclass.bases) <= set(cls.bases) != set()
            )
        return super().__subclasscheck__(subclass)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            f"{cls.__name__} cannot be built by itself: trimtab's layers are made by get_peft_model or "
            "inject_adapter_in_model (see docs/differences-names.txt)."
        )


def base_of(prefix: str, name: str) -> tuple[type[nn.Module], ...] | None:
    """The base layers that a method's layer class `name` is for, or None where it is no such class."""
    kind = BASES.get(name) or BASES.get(name.removeprefix(prefix))
    return kind() if kind else None


@cache
def layer_class(peft_type: str, name: str, bases: tuple[type[nn.Module], ...]) -> type:
    """The stand-in for one of peft's layer classes."""
    module = f"peft.tuners.{peft_type.lower()}.layer"
    return ByMethod(
        name, (), {"peft_type": peft_type, "bases": bases, "__module__": module, "__doc__": f"{name} of peft."}
    )


class TokensWrapper(metaclass=ByMethod):
    """peft's wrapper around an embedding some of whose rows an adapter trains."""

    peft_type = "TRAINABLE_TOKENS"
    bases = (nn.Embedding, nn.Linear)
