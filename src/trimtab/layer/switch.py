"""What our modules in a model have in common: they follow the model's route, and can be switched by themselves."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from trimtab.layer.plan import Board


class Switched(nn.Module):
    """A module of the base with something of adapters in it; the board's current route says of which.

    Subclasses are final; they say which `adapters` they hold and how those are made trainable.
    """

    board: Board

    @property
    def adapters(self) -> list[str]:
        """The adapters that have something here."""
        raise NotImplementedError

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Make adapters trainable or frozen here."""
        raise NotImplementedError

    def unpark(self, adapter: str) -> None:
        """Bring an adapter that was parked back into the module tree."""

    @property
    def active_adapters(self) -> list[str]:
        """The adapters in use here, innermost first."""
        return list(self.board.route.at(id(self))[0])

    @property
    def active_adapter(self) -> str | list[str]:
        """The adapter in use here, or the list of them where there are several."""
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    @property
    def disable_adapters(self) -> bool:
        """Whether the adapters are switched off here."""
        return not self.board.route.at(id(self))[1]

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Switch this module by itself; the model's own `set_adapter` makes it follow again."""
        names = (adapter_names,) if isinstance(adapter_names, str) else tuple(adapter_names)
        for name in names:
            self.unpark(name)
        for name in self.adapters:
            self.set_requires_grad(name, name in names and not inference_mode)
        self.board.override(id(self), names, not self.disable_adapters)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the adapters here on or off, and with them whether they train."""
        self.set_requires_grad(self.active_adapters, enabled)
        self.board.override(id(self), tuple(self.active_adapters), enabled)
