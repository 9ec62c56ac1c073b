"""Routers among adapters: those they need are loaded with them, and act while a router does, as strongly as it says."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from trimtab.core.model_method import Mixture
from trimtab.errors import AdapterNameError
from trimtab.files import store
from trimtab.files.codec import whole_model
from trimtab.files.finding import is_adapter
from trimtab.graft.graft import Graft
from trimtab.layer.plan import Plan
from trimtab.methods import method_class


def router_class(config: Any) -> type[Mixture] | None:
    """The method a config asks for, if it is a router among other adapters."""
    method: Any = method_class(config)
    return method if issubclass(method, Mixture) else None


def prepare(
    model_id: str | os.PathLike[str], config: Any, tensors: dict[str, Any], overrides: Mapping[str, Any]
) -> None:
    """Complete what was read of a router from what lies beside it in its folder.

    The adapters it works among are taken from there rather than from where its config says, unless the caller says.
    PEFT's copies are parts of the whole model, from which the adapters cannot be had.
    """
    router = router_class(config)
    if router is None:
        return

    def beside(name: str) -> Path | None:
        own = Path(model_id) / name
        return own if own.is_dir() and is_adapter(own) else None

    router.mend(tensors, lambda name: store.load_peft_weights(own) if (own := beside(name)) else {})
    among = router.among(config)
    for name in () if router.field in overrides else among:
        own = beside(name)
        if own is not None and not whole_model(store.load_shapes(own)):
            among[name] = str(own)


@contextlib.contextmanager
def watching(model: nn.Module, extras: Sequence[Mapping[str, Any]], plan: Plan | None = None) -> Iterator[None]:
    """Inside the block methods that watch see each call of the model: generation makes many.

    Args:
        extras: of each group of the plan, which sees its own rows; of the one call where there is none.
    """
    seen = [(i, value) for i, own in enumerate(extras) for name, value in own.items() if name.endswith(".seen")]
    if not seen:
        yield
        return
    names = list(inspect.signature(model.forward).parameters)

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        inputs = {**dict(zip(names, args, strict=False)), **kwargs}
        length = getattr(inputs.get("past_key_values"), "get_seq_length", int)  # layers will have added to it
        for group, value in seen:
            value |= {"inputs": plan.part(inputs, group) if plan else inputs, "start": int(length())}

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def active_router(graft: Graft) -> Any:
    """The adapter that is a router and active in this thread, or None."""
    route = graft.board.route_here(quiet=True)
    active = [graft.adapters[n] for n in route.active if n in graft.adapters] if route.enabled else []
    found = [a for a in active if isinstance(a.prompt, Mixture)]
    if found and len(active) > 1:
        raise ValueError(f"A router among adapters is active alone, not beside others: {list(route.active)}.")
    return found[0] if found else None


class Around:
    """What stands around a model's own `forward`, and so around every step of generation, while any thread is inside.

    What it does follows the calling thread's route.
    """

    def __init__(self, graft: Graft) -> None:
        model: Any = graft.model
        self.graft, self.inside, self.own = graft, 0, "forward" in model.__dict__
        self.plain: Callable[..., Any] = model.forward
        self.names = list(inspect.signature(self.plain).parameters)
        self.settings = getattr(model, "generation_config", None)
        self.cached = getattr(self.settings, "use_cache", None)

        @functools.wraps(self.plain)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self.call(args, kwargs)

        model.forward = forward
        if self.settings is not None:
            self.settings.use_cache = False

    def take_off(self) -> None:
        """The model's own forward is its forward again."""
        if self.settings is not None:
            self.settings.use_cache = self.cached
        if self.own:
            self.graft.model.forward = self.plain
        else:
            del self.graft.model.forward

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's output as the router makes it."""
        graft, adapter = self.graft, active_router(self.graft)
        if adapter is None:  # another thread's call
            return self.plain(*args, **kwargs)
        inputs = {**dict(zip(self.names, args, strict=False)), **kwargs}
        if (cache := inputs.get("past_key_values")) is not None and cache.get_seq_length():
            raise ValueError("A router reads whole sequences: generate with use_cache=False.")
        among, call = tuple(adapter.method.among(adapter.config)), graft.board.route_here(quiet=True).call
        for name in among:
            graft.require(name)
        graft.residents.bring(among)

        def routed(strengths: Mapping[str, Any], inputs: dict[str, Any]) -> Any:
            extras = {**call.extras, **{f"{name}.strength": strengths[name] for name in among}}
            with graft.board.using(active=among, call=replace(call, extras=extras)):
                return self.plain(**inputs)

        return adapter.prompt.around(routed, inputs, call)


LOCK = threading.Lock()
KEY = "_trimtab_around"


@contextlib.contextmanager
def surrounding(graft: Graft) -> Iterator[None]:
    """Inside the block the model's forward is what the active router makes of it, if one is active."""
    if active_router(graft) is None:
        yield
        return
    held = graft.model.__dict__
    with LOCK:
        around: Around = held.get(KEY) or held.setdefault(KEY, Around(graft))
        around.inside += 1
    try:
        yield
    finally:
        with LOCK:
            around.inside -= 1
            if not around.inside:
                held.pop(KEY).take_off()


def show(graft: Graft, name: str) -> Any:
    """What a router or another method shows of its own under a name as the model's, or None."""
    for adapter in graft.adapters.values():
        if isinstance(adapter.prompt, Mixture) and name in adapter.prompt.views:
            return getattr(adapter.prompt, name)
        if adapter.prompt is None and name in adapter.method.acts:
            return functools.partial(
                getattr(adapter.method, name), functools.partial(_acting, graft, name), graft.model
            )
    return None


def _acting(graft: Graft, act: str, name: str | None = None) -> Sequence[Any]:
    """The methods of an adapter that can do `act`; of the active one by default."""
    able = [a.name for a in graft.adapters.values() if a.prompt is None and act in a.method.acts]
    active = [n for n in graft.board.route_here(quiet=True).active if n in able]
    chosen = name or next(iter([*active, *able]))
    if chosen not in able:
        raise AdapterNameError(f"Adapter '{chosen}' has no `{act}`: {able} have.")
    graft.residents.bring([chosen])
    return graft.adapters[chosen].formulas


def place(graft: Graft, tuner: nn.Module) -> None:
    """Keep the routers' tensors in the module tree of the tuner."""
    held = {a.prompt.place: a.prompt for a in graft.adapters.values() if isinstance(a.prompt, Mixture)}
    for key, module in list(tuner._modules.items()):
        if isinstance(module, Mixture) and key not in held:
            del tuner._modules[key]
    tuner._modules.update(held)
