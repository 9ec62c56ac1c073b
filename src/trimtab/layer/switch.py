"""What our modules in a model have in common: they follow the model's route, and can be switched by themselves."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from trimtab.layer.plan import Board, Route


class Following:
    """What follows the model's route, beside being a module: it says which `adapters` it holds, and what they train."""

    board: Board
    own: tuple[int, tuple[str, ...], bool] | None = None  # (epoch, active, enabled) where it was switched by itself

    @property
    def adapters(self) -> list[str]:
        """The adapters that have something here."""
        raise NotImplementedError

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Make adapters trainable or frozen here."""
        raise NotImplementedError

    def bring(self, adapter: str) -> None:
        """Bring an adapter that was parked back into the module tree."""
        if self.board.residents is not None:
            self.board.residents.bring([adapter])

    def changed(self) -> None:
        """What was noted for the current route holds no longer."""

    def standing(self) -> Route:
        """The model's route outside all blocks but this thread's."""
        return self.board.route_here(quiet=True)

    @property
    def outside(self) -> tuple[tuple[str, ...], bool]:
        """(active, enabled) here outside all blocks: what a switch of this module starts from, as it outlives them."""
        return self.board.route.at(self.own)

    @property
    def active_adapters(self) -> list[str]:
        """The adapters in use here, innermost first."""
        return list(self.standing().at(self.own)[0])

    @property
    def active_adapter(self) -> list[str]:
        """The adapters in use here; in PEFT's layers, too, this is a list even of one."""
        return self.active_adapters

    @property
    def disable_adapters(self) -> bool:
        """Whether the adapters are switched off here."""
        return not self.standing().at(self.own)[1]

    # Under the names that scripts read and set on PEFT's modules; whether tensors train is another matter.
    @property
    def _active_adapter(self) -> list[str]:
        return self.active_adapters

    @_active_adapter.setter
    def _active_adapter(self, names: str | Sequence[str]) -> None:
        self.switch((names,) if isinstance(names, str) else names, self.outside[1])

    @property
    def _disable_adapters(self) -> bool:
        return self.disable_adapters

    @_disable_adapters.setter
    def _disable_adapters(self, off: bool) -> None:
        self.switch(self.outside[0], not off)

    def _get_available_adapters(self) -> set[str]:
        return set(self.adapters)

    def _all_available_adapter_names(self) -> list[str]:
        return sorted(self.adapters)

    def switch(self, active: Sequence[str], enabled: bool) -> None:
        """Switch this module by itself; switching the model as a whole makes it follow again."""
        self.own = (self.board.route.epoch or 0, tuple(active), enabled)
        self.changed()

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Use these adapters here; the model's own `set_adapter` makes the module follow again."""
        names = (adapter_names,) if isinstance(adapter_names, str) else tuple(adapter_names)
        for name in names:
            self.bring(name)
        for name in self.adapters:
            self.set_requires_grad(name, name in names and not inference_mode)
        self.switch(names, self.outside[1])

    def left(self, adapter: str, inference_mode: bool = False) -> None:
        """An adapter is gone from the model: a module that was switched to it by itself goes on without."""
        if self.own is not None and self.own[0] == self.board.route.epoch:
            self.without(adapter, inference_mode)

    def without(self, adapter: str, inference_mode: bool = False) -> None:
        """Where an adapter that is gone from here was in use, the others stay or the first comes."""
        active = self.outside[0]
        if adapter in active:
            self.set_adapter([n for n in active if n != adapter] or self.adapters[:1], inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the adapters here on or off, and with them whether they train."""
        active = self.outside[0]
        self.set_requires_grad(active, enabled)
        self.switch(active, enabled)


class Switched(Following, nn.Module):
    """A module of the base with something of adapters in it; the current route says of which.

    Subclasses are final; they say which `adapters` they hold and how those are made trainable.
    """
