"""Steps by which PEFT's tuners choose and build their layers: other libraries replace them, and are asked then."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from trimtab.core.targets import Target, selects
from trimtab.errors import ArgumentError
from trimtab.graft.graft import Graft
from trimtab.graft.selection import kind
from trimtab.layer.adapted import AdaptedLayer


class Choice:
    """An adapter that is being added by steps others have replaced.

    Attributes:
        name, config: the adapter's.
        autocast: whether its tensors are kept in fp32 where the layers' are in half precision.
        default: the targets its config selects.
        chosen: those that the steps took.
    """

    def __init__(self, name: str, config: Any, autocast: bool) -> None:
        self.name, self.config, self.autocast = name, config, autocast
        self.default: list[Target] = []
        self.chosen: list[Target] = []


class Choosing(nn.Module):
    """What a tuner does at these steps where nobody replaced them. A replaced one may call the step it stands for."""

    graft: Graft
    choice: Choice | None = None

    # ------------------------------------------------------------------ the steps, under PEFT's names
    @staticmethod
    def _check_target_module_exists(config: Any, key: str) -> bool:
        return selects(config, key)

    def _check_target_module_compatiblity(self, peft_config: Any, model: nn.Module, target_name: str) -> None:
        """Nothing to do: a kind of layer that the method cannot adapt raises when all targets are known."""

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str | None = None,
        parameter_name: str = "",
        **kwargs: Any,
    ) -> None:
        """Take a module, or a parameter of it, as a target; it is built when all are known."""
        if self.choice is None:
            raise ArgumentError("_create_and_replace(...) is for steps of adding an adapter: call `add_adapter`.")
        base = self.graft.base
        sought = target.frozen if isinstance(target, AdaptedLayer) else target
        path = next((path for path, module in base.modules.items() if module is sought), None)
        if path is None:
            raise ArgumentError(f"The target at '{current_key}' is no module of the model: {target}.")
        name = f"{path}.{parameter_name}" if parameter_name else path
        why = next((t.why for t in self.choice.default if t.name in (name, current_key)), name)
        what = "parameter" if parameter_name else kind(sought)
        self.choice.chosen.append(Target(name, what, why, parameter_name))

    def _inject_parameters(
        self, peft_config: Any, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool = False
    ) -> None:
        """Take the parameters that the config names."""
        for target in self.choice.default if self.choice is not None else ():
            if target.param:
                self._take(target)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Say whether an adapter is kept in fp32 where its layers are in half precision."""
        if self.choice is None:
            raise ArgumentError("_cast_adapter_dtype(...) is for steps of adding an adapter: see `cast_adapter_dtype`.")
        self.choice.autocast = autocast_adapter_dtype

    # ------------------------------------------------------------------ asking them
    def _take(self, target: Target) -> None:
        assert self.choice is not None
        module = self.graft.model.get_submodule(target.module)
        parent, _, name = target.module.rpartition(".")
        named = {"parameter_name": target.param} if target.param else {}
        self._step("_create_and_replace")(
            self.choice.config,
            self.choice.name,
            module,
            name,
            self.graft.model.get_submodule(parent),
            current_key=target.name,
            **named,
        )

    def _step(self, name: str) -> Callable[..., Any]:
        """A step of the class that PEFT has for the adapter's method, which need not be this tuner's own."""
        assert self.choice is not None
        found = getattr(self._class_of(self.choice.config), name)
        return found if name == "_check_target_module_exists" else partial(found, self)

    def _class_of(self, config: Any) -> type[Choosing]:
        raise NotImplementedError

    def _pick(self, config: Any, targets: list[Target]) -> list[Target]:
        """The targets that replaced steps take, among those that the config selects and all other modules."""
        assert self.choice is not None
        choice, modules = self.choice, self.graft.base.modules
        cls = self._class_of(config)
        choice.config, self.graft.configs[choice.name] = config, config
        if replaced(cls, "_check_target_module_exists"):
            own = {t.name: t for t in targets if not t.param}
            check = self._step("_check_target_module_exists")
            keys = [key for key in modules if key and check(config, key)]
            targets = [own.get(key) or Target(key, kind(modules[key]), key) for key in keys] + [
                t for t in targets if t.param
            ]
        choice.default = targets
        for target in targets:
            if not target.param:
                self._take(target)
        if getattr(config, "target_parameters", None):
            self._step("_inject_parameters")(config, self.graft.model, choice.name, False)
        return choice.chosen

    @contextmanager
    def _choosing(self, name: str, config: Any, autocast: bool) -> Iterator[dict[str, Any]]:
        """In the block an adapter is added, with these arguments for `Graft.add`: nobody's steps are left out."""
        cls = self._class_of(config)
        picks = any(replaced(cls, step) for step in CHOICE)
        casts = replaced(cls, "_cast_adapter_dtype")
        if not (picks or casts):
            yield {"autocast": autocast}
            return
        known = self.graft.configs.get(name)
        self.choice = Choice(name, config, autocast)
        try:
            self.graft.configs[name] = config  # where steps of PEFT's look for it
            if casts:
                self._step("_cast_adapter_dtype")(adapter_name=name, autocast_adapter_dtype=autocast)
            yield {"autocast": self.choice.autocast} | ({"pick": self._pick} if picks else {})
        except BaseException:
            self.graft.configs.pop(name, None)
            if known is not None:
                self.graft.configs[name] = known
            raise
        finally:
            self.choice = None


CHOICE = ("_check_target_module_exists", "_create_and_replace", "_inject_parameters")


def replaced(cls: type[Choosing], step: str) -> bool:
    """Whether a tuner's class has a step of another's."""
    return getattr(cls, step) is not getattr(Choosing, step)
