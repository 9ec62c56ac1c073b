"""Layers that are called with one and the same input, one after another (q, k and v; gate and up), stepped together.

Which they are is not configured but seen: when layers were called with the very same tensor in a row, the first of them
computes for all of them the next time, and the others take what is theirs. What a layer takes is checked to be what it
would have computed: the input is the same object and nobody has written into it, the adapters, the weights, autocast
and the grad mode are the same. Where the others do not come as they did, that group is never formed again.

A forward that is repeated, recorded or transformed (checkpointing, compilers, `torch.func`), or whose saved tensors are
packed, is stepped layer by layer: a repetition must do what the first forward did. So is one in evaluation mode, where
the same input must give the same output to the bit, the first time as well; and one without gradients: for the few rows
of a step of generation, finding and keeping what belongs together costs more than it saves.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trimtab.core.kernels.rebuilt import packed
from trimtab.core.kernels.usual import autocasts, recorded
from trimtab.core.method import Call, Method


class Through:
    """The step of a layer whose only method does layer and adapter in one.

    Args:
        layer: the layer, an AdaptedLayer; its board knows the route and what this thread called last.
        otherwise: the step by single operations, for calls that the method declines.
    """

    def __init__(self, layer: Any, method: Method, call: Call, otherwise: Callable[..., Any]) -> None:
        self.layer, self.method, self.call, self.otherwise = layer, method, call, otherwise
        self.through: Callable[..., Tensor | None] = method.through  # type: ignore[assignment]
        self.last: Last = layer.board.last_call
        self.groups = type(method).together is not None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs:
            return self.otherwise(*args, **kwargs)
        grouped = self.groups and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        y = self._together(args[0]) if grouped else None
        if y is None:
            y = self.through(args[0], self.call)
        return self.otherwise(*args) if y is None else y

    def _together(self, x: Tensor) -> Tensor | None:
        """The output, where the layers of this input are stepped together."""
        if not self.method.training or type(x) is not Tensor or x.is_inference() or not _usual():
            return None
        last = self.last
        if last.met(x):
            if last.outputs:
                return last.take(self, x)
            leader = last.leader()
            if leader is not None and leader is not self.layer:
                leader.join(self.layer)
            return None
        last.begin(self.layer, x)
        if not self.layer.company:
            return None
        route = self.layer.board.now()
        steps = [self, *(s for other in self.layer.company if self._goes_with(s := other.step(route)))]
        outputs = type(self.method).together([s.method for s in steps], x, self.call)  # type: ignore[misc]
        if outputs is None:
            return None
        last.keep(x, steps[1:], outputs[1:])
        y: Tensor = outputs[0]
        return y

    def _goes_with(self, other: Any) -> bool:
        return type(other) is Through and type(other.method) is type(self.method) and other.call is self.call


class Last(threading.local):
    """What a thread last called a layer with, and outputs that others of that input have not taken yet.

    Attributes:
        x: the input, a weak reference; `version` counts the writes into it.
        leader: the first layer that was called with it, a weak reference.
        outputs: for each step that is to come, its output and what that was computed from.
    """

    x: Any = None
    version = 0
    leader: Any = None
    mode: Any = None
    outputs: dict[Through, tuple[Tensor, Any]] | None = None

    def met(self, x: Tensor) -> bool:
        """Whether the last layer was called with `x`, too, as it is."""
        return self.x is not None and self.x() is x and self.version == x._version

    def begin(self, layer: Any, x: Tensor) -> None:
        """Note that `layer` is the first to be called with `x`."""
        self.forget()
        self.x, self.version, self.leader = weakref.ref(x), x._version, weakref.ref(layer)

    def keep(self, x: Tensor, steps: list[Through], outputs: Any) -> None:
        """Keep the outputs of steps that are to come."""
        self.mode = _mode(x)
        self.outputs = {s: (y, _made_of(s.method)) for s, y in zip(steps, outputs, strict=True)}

    def take(self, step: Through, x: Tensor) -> Tensor | None:
        """A step's output, or None where it is not what the step would compute now."""
        y, before = self.outputs.pop(step, (None, None)) if self.outputs else (None, None)
        if y is None or before is None or self.mode != _mode(x) or not _same(before, _made_of(step.method)):
            self.forget()
            return None
        return y

    def forget(self) -> None:
        """Drop outputs that nobody came for; their group is not formed again."""
        if self.outputs:
            leader = self.leader()
            if leader is not None:
                leader.part()
        self.outputs = None


def _usual() -> bool:
    """Whether this forward is an ordinary one, that nothing records or will repeat."""
    return not recorded() and not packed() and torch._C._current_graph_task_id() == -1


def _mode(x: Tensor) -> Any:
    """What else an output depends on."""
    return autocasts(x) and torch.get_autocast_dtype(x.device.type)


def _made_of(method: Method) -> tuple[list[Any], Any]:
    """What an output is computed from beside the input: tensors, and their versions and the scale."""
    tensors = [*(method.site.plain() or ()), *(holder[key] for holder, key in method.places.values())]
    versions = [-1 if t is None or t.is_inference() else t._version for t in tensors]
    return tensors, (getattr(method, "scaling", None), method.training, versions)


def _same(a: tuple[list[Any], Any], b: tuple[list[Any], Any]) -> bool:
    return a[1] == b[1] and all(s is t for s, t in zip(a[0], b[0], strict=True))
