"""The log of a router's weights, forward by forward, which its model shows."""

from __future__ import annotations

from torch import Tensor


class Logged:
    """A router that keeps the weights (rows, tokens, layers, adapters) of its last forward, and of all if asked."""

    shown = (
        "enable_scalings_logging", "disable_scalings_logging", "clear_scalings_log", "get_scalings_log",
        "get_bucketed_scalings_log", "get_latest_scalings",
    )  # fmt: skip
    latest: Tensor | None = None
    log: list[Tensor] | None = None
    logging = False

    def note(self, scalings: Tensor) -> None:
        """Take the weights of a forward."""
        self.latest = scalings
        if self.logging:
            self.log = [*(self.log or ()), scalings.detach()]

    def enable_scalings_logging(self) -> None:
        """Keep the weights of every forward from now on."""
        self.logging = True

    def disable_scalings_logging(self) -> None:
        """Keep no more; the log stays."""
        self.logging = False

    def clear_scalings_log(self) -> None:
        """Forget what was kept."""
        self.log = None

    def get_scalings_log(self) -> list[Tensor]:
        """The weights of each forward, (rows, tokens, layers, adapters)."""
        return list(self.log or ())

    def get_bucketed_scalings_log(self) -> dict[int, tuple[list[int], list[Tensor]]]:
        """The log by numbers of tokens: (places in the log, weights)."""
        found: dict[int, tuple[list[int], list[Tensor]]] = {}
        for i, scalings in enumerate(self.log or ()):
            places, kept = found.setdefault(scalings.shape[1], ([], []))
            places.append(i)
            kept.append(scalings)
        return found

    def get_latest_scalings(self) -> Tensor | None:
        """The weights of the last forward, (rows, tokens, layers, adapters); None before the first."""
        return self.latest
