"""Gradient checkpointing: a layer that is recomputed in the backward pass follows the route of the forward it repeats.

All checkpointing that torch's own function does, whoever calls it, comes by one of two places in it; there the function
to be repeated is wrapped, once for the process. Other checkpointing is recognised and raises where it could be wrong
(`Board.now`).
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from typing import TYPE_CHECKING, Any

import torch.utils.checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable

boards: weakref.WeakSet[Any] = weakref.WeakSet()  # of all models that have adapters


class Repeated:
    """A function that is run again in the backward pass, with every model routed as when it was wrapped."""

    def __init__(self, run: Callable[..., Any]) -> None:
        self.run = run
        self.routes = [(board, board.route_here()) for board in boards]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as stack:
            for board, route in self.routes:
                stack.enter_context(board.repeating(route))
            return self.run(*args, **kwargs)


@functools.cache
def watch() -> None:
    """Wrap what torch's checkpointing repeats, from now on."""
    module = torch.utils.checkpoint
    generator = getattr(module, "_checkpoint_without_reentrant_generator", None)
    if generator is not None:

        @functools.wraps(generator)
        def not_reentrant(fn: Any, *args: Any, **kwargs: Any) -> Any:
            return generator(Repeated(fn) if boards else fn, *args, **kwargs)

        module._checkpoint_without_reentrant_generator = not_reentrant  # type: ignore[attr-defined]
    forward = module.CheckpointFunction.forward

    @functools.wraps(forward)
    def reentrant(ctx: Any, run_function: Any, *args: Any) -> Any:
        return forward(ctx, Repeated(run_function) if boards else run_function, *args)

    module.CheckpointFunction.forward = staticmethod(reentrant)  # type: ignore[method-assign]
