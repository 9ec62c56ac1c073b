"""What an adapter trains whole: copies of modules (`modules_to_save`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from trimtab.formats import offload, weights
from trimtab.layer import groups
from trimtab.layer.plan import Board
from trimtab.layer.switch import Switched


class SavedModule(Switched):
    """A module of the base and the copies that adapters train of it; the current route says which one runs."""

    def __init__(self, original_module: nn.Module, name: str, board: Board) -> None:
        super().__init__()
        self.original_module = original_module
        self.modules_to_save = nn.ModuleDict()
        self.name, self.board = name, board

    def attach(self, adapter: str) -> None:
        """Make the adapter's copy."""
        duplicate = weights.plain(offload.copied(self.original_module))  # whole numbers cannot be trained
        duplicate.requires_grad_(True)
        self.modules_to_save[adapter] = duplicate

    def tie(self, adapter: str, keeper: SavedModule) -> None:
        """Give the adapter's copy the parameters of its copy of another module, where the two originals share them."""
        own, kept = self.modules_to_save[adapter], keeper.modules_to_save[adapter]
        for name, parameter in self.original_module._parameters.items():
            for other, shared in keeper.original_module._parameters.items():
                if parameter is shared and parameter is not None:
                    own._parameters[name] = kept._parameters[other]  # type: ignore[union-attr,index]

    def detach(self, adapter: str) -> None:
        """Forget the adapter's copy."""
        if adapter in self.modules_to_save:
            del self.modules_to_save[adapter]

    def chosen(self) -> nn.Module:
        """The module that runs outside mixed batches: the copy of the last active adapter that has one."""
        active, enabled = self.standing().at(self.own)
        for name in reversed(active if enabled else ()):
            if name in self.modules_to_save:
                return self.modules_to_save[name]
        return self.original_module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the copy (or original) that the current route chooses, row by row in a mixed batch."""
        plan = self.board.now().plan
        if plan is None or not any(name in self.modules_to_save for name in plan.adapters):
            return (self.chosen() if plan is None else self.original_module)(*args, **kwargs)
        return groups.dealt(plan, [self._of(group) for group in plan.groups], args, kwargs, self.name)

    def _of(self, group: Sequence[tuple[str, float]]) -> nn.Module:
        """What runs for rows that want these adapters: the copy of the last that has one, as outside mixed batches."""
        names = [name for name, _ in group if name in self.modules_to_save]
        return self.modules_to_save[names[-1]] if names else self.original_module

    @property
    def adapters(self) -> list[str]:
        """The adapters that have a copy."""
        return list(self.modules_to_save)

    @property
    def merged_adapters(self) -> list[str]:
        """Copies are never merged."""
        return []

    def adapter_parameters(self, adapter: str) -> Iterator[tuple[None, nn.Parameter]]:
        """(None, parameter) for each parameter of an adapter's copy, as of an adapted layer."""
        return ((None, p) for p in self.modules_to_save[adapter].parameters())

    @property
    def active_adapters(self) -> list[str]:
        """The adapters in use that have a copy here."""
        return [n for n in self.standing().at(self.own)[0] if n in self.modules_to_save]

    @property
    def active_adapter(self) -> Any:
        """The adapter in use that has a copy here, as PEFT has it: a name, or a list of none or several."""
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    adapter_layer_names = ("modules_to_save",)
    other_param_names = ()

    def adapter_state_dict(self, adapter_name: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of an adapter's copy, of those of this module."""
        copy = self.modules_to_save[adapter_name] if adapter_name in self.modules_to_save else nn.Module()
        return {key: state_dict[f"modules_to_save.{adapter_name}.{key}"] for key in copy.state_dict()}

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: Sequence[str] | None = None
    ) -> nn.Module:
        """What the model has once adapters are gone: with `merge` the active one's copy, else the original."""
        names = self.active_adapters if adapter_names is None else list(adapter_names)
        chosen = [name for name in names if name in self.modules_to_save] if merge else []
        return self.modules_to_save[chosen[-1]] if chosen else self.original_module

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """{key of a tensor on disk: its key in memory}, both below this module."""
        return {key: f"modules_to_save.{adapter_name}.{key}" for key in self.modules_to_save[adapter_name].state_dict()}

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Make copies trainable or frozen."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            if name in self.modules_to_save:
                self.modules_to_save[name].requires_grad_(requires_grad)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "original_module" not in self.__dict__.get("_modules", {}):
                raise
        return getattr(self.chosen(), name)
