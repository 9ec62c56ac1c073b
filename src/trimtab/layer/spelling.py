"""How a layer computes what a stack of methods says: in one fused step, by edits of input and output, by the weight."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from trimtab.core.method import Call, Method, overrides
from trimtab.core.site import Site
from trimtab.errors import RouteError

Stack = Sequence[Method]  # of one site, innermost first
Spelling = Literal["base", "around", "through", "fused", "weight"]


def pick(stack: Stack) -> Spelling:
    """The cheapest spelling of a stack: a function of its methods and their site alone."""
    if not stack:
        return "base"
    if stack[0].around is not None:
        return "around"
    if not all(is_fused(m) for m in stack):
        return "weight"
    return "through" if len(stack) == 1 and type(stack[0]).through is not None else "fused"


def is_fused(method: Method) -> bool:
    """Whether a method edits the input and output of its site."""
    return method.site.fused and method.site.kind in method.fused


def scaled(method: Method, scale: float) -> Method:
    """The method with its update scaled, as a row of a mixed batch may ask for it."""
    if scale == 1:
        return method
    if "scaling" not in method.views:
        raise RouteError(
            f"{type(method).__name__} at '{method.site.name}' has no scale: a row of `adapter_names` can only name it."
        )
    own = copy.copy(method)
    own.scaling = method.scaling * scale
    return own


class Edits:
    """The befores and afters of a stack.

    Attributes:
        edits: whether any method edits the input.
    """

    def __init__(self, stack: Stack) -> None:
        self.stack = tuple(stack)
        self.edits = [overrides(type(m), "before") for m in self.stack]
        self.plain = not any(self.edits)

    def before(self, x: Tensor, call: Call) -> list[Tensor]:
        """What the base layer is given, then what each method sees as its input, innermost first."""
        if self.plain:
            return [x] * (len(self.stack) + 1)
        inputs = [x]
        for method, edits in zip(reversed(self.stack), reversed(self.edits), strict=True):
            inputs.append(method.before(inputs[-1], call) if edits else inputs[-1])
        inputs.reverse()
        if inputs[0].dtype != x.dtype:
            inputs[0] = inputs[0].to(x.dtype)
        return inputs

    def after(self, y: Any, inputs: Sequence[Tensor], call: Call) -> Any:
        """The base layer's output as the stack edits it; of several outputs the first."""
        if isinstance(y, tuple):
            return (self.after(y[0], inputs, call), *y[1:])
        dtype = y.dtype
        for method, x in zip(self.stack, inputs[1:], strict=True):
            y = method.after(y, x, call)
        return y if y.dtype == dtype else y.to(dtype)


def fold(stack: Stack) -> dict[Site, tuple[Tensor, Tensor | None]]:
    """The weights (in fp32 at least) and biases that a stack makes of the originals, site by site."""
    folded: dict[Site, tuple[Tensor, Tensor | None]] = {}
    for method in stack:
        site = method.site
        if site not in folded:
            W = site.matrix()
            folded[site] = (W if W.dtype == torch.float64 else W.float(), site.bias())
        W, b = folded[site]
        folded[site] = (method.weight(W), method.bias(b))
    return folded


def weighed(stack: Stack, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The layer run with the stack's weights: the spelling that every method has."""
    stands = [m for m in stack if m.standing is not None]
    with stands[-1].standing() if stands else contextlib.nullcontext():  # type: ignore[misc]
        ((site, (W, b)),) = fold(stack).items()
        return site.run(W, b, *args, **kwargs)


def surrounded(stack: Stack, base: Callable[..., Any], call: Call, *args: Any, **kwargs: Any) -> Any:
    """A module's call inside those of a stack's methods, the first innermost."""
    run = base
    for method in stack:
        run = partial(method.around, run, call)  # type: ignore[arg-type, misc]
    return run(*args, **kwargs)


def spelled(
    stack: Stack, below: Stack, base: Callable[..., Any], call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The layer's output with a stack on it.

    Args:
        below: the methods that are merged into the layer, which the weight spelling starts from.
        base: the frozen layer.
    """
    how = pick(stack)
    if how == "base":
        return base(*args, **kwargs)
    if how == "weight":
        return weighed([*below, *stack], args, kwargs)
    x, args, kwargs = first_input(args, kwargs)
    if how == "through" and not args and not kwargs and not below:
        y = stack[0].through(x, call)  # type: ignore[misc]
        if y is not None:
            return y
    edits = Edits(stack)
    inputs = edits.before(x, call)
    return edits.after(base(inputs[0], *args, **kwargs), inputs, call)


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Split a layer's arguments into (its input, the rest), however the input was passed."""
    if args:
        return args[0], args[1:], kwargs
    name = next(iter(kwargs))
    return kwargs[name], (), {k: v for k, v in kwargs.items() if k != name}
