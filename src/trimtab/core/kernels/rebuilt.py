"""Activations that are formed anew in the backward pass from what the autograd graph keeps anyway.

The input of an adapted layer is often a product of two tensors that are saved already: a norm's output is the weight
times the normalised states, the input of `down_proj` is `act(gate) * up`. An adapter that saves its input pays for a
second copy; one that keeps the node which made it, and multiplies again, does not. The rules below do what the node
did, operation by operation, so the tensor that comes back is the same bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

Recipe = Callable[[], Tensor]
DEPTH = 4  # how many nodes a recipe may go back


class Rebuilt:
    """A tensor that can be had again by all layers it is an input of; formed once for those that ask in a row."""

    known: WeakValueDictionary[int, Rebuilt] = WeakValueDictionary()  # by the node that made the tensor

    def __init__(self, node: Any, recipe: Recipe) -> None:
        self.node, self.recipe = node, recipe  # the node stays alive, and its id its own, as long as this object
        self.users = 0  # that have not asked yet
        self.value: Tensor | None = None

    def take(self) -> Tensor:
        """The tensor, for one of its users."""
        value = self.recipe() if self.value is None else self.value
        self.users -= 1
        self.value = value if self.users > 0 and not value.requires_grad else None
        return value


def rebuilt(x: Tensor) -> Rebuilt | None:
    """How to have `x` again in the backward pass, or None where it must be saved.

    It must be where the graph does not keep what it was made of, and where hooks pack the saved tensors (checkpointing,
    offloading): those are to be unpacked once.
    """
    node = x.grad_fn
    if node is None or not torch.is_grad_enabled() or packed():
        return None
    found = Rebuilt.known.get(id(node))
    if found is None:
        recipe = _recipe(node, DEPTH)
        if recipe is None:
            return None
        found = Rebuilt.known[id(node)] = Rebuilt(node, recipe)
    found.users += 1
    return found


def packed() -> bool:
    """Whether hooks pack the tensors that are saved now."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def _recipe(node: Any, depth: int) -> Recipe | None:
    rule = RULES.get(node.name())
    return None if rule is None or depth == 0 else rule(node, depth - 1)


def _saved(node: Any, name: str) -> Recipe | None:
    """What a node has saved under a name, as it is: not packed by a hook, which might unpack it once only."""
    raw = getattr(node, f"_raw_saved_{name}")
    if getattr(raw, "unpack_hook", raw) is not None or raw.data is None:  # an older torch does not tell: it saves
        return None
    return lambda: getattr(node, f"_saved_{name}")


def _operand(node: Any, i: int, name: str, depth: int) -> Recipe | None:
    """The i-th operand of a node: saved, or to be formed by a recipe of its own."""
    before = node.next_functions[i][0]
    return _saved(node, name) or (None if before is None else _recipe(before, depth))


def _product(node: Any, depth: int) -> Recipe | None:
    a, b = _operand(node, 0, "self", depth), _operand(node, 1, "other", depth)
    return None if a is None or b is None else lambda: a() * b()


def _cast(node: Any, depth: int) -> Recipe | None:
    made, before = getattr(node, "_input_metadata", None), node.next_functions[0][0]
    inner = None if before is None else _recipe(before, depth)
    if not made or inner is None:
        return None
    device, dtype = made[0].device, made[0].dtype
    return lambda: inner().to(device, dtype)


def _activation(name: str, function: Callable[[Tensor, Any], Tensor]) -> Callable[[Any, int], Recipe | None]:
    """The rule of a node that has saved its operand or its result."""

    def rule(node: Any, depth: int) -> Recipe | None:
        saved = _saved(node, name)
        return None if saved is None else lambda: function(saved(), node)

    return rule


RULES: dict[str, Callable[[Any, int], Recipe | None]] = {
    "MulBackward0": _product,
    "ToCopyBackward0": _cast,
    "SiluBackward0": _activation("self", lambda x, _: F.silu(x)),
    "GeluBackward0": _activation("self", lambda x, node: F.gelu(x, approximate=node._saved_approximate)),
    "ReluBackward0": _activation("result", lambda x, _: x),
}
