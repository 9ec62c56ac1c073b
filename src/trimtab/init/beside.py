"""The small model beside a base model: one of transformers, some blocks of a Flux2, or a network of single tokens."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from trimtab.core.site import Site
from trimtab.errors import ConfigError
from trimtab.init.flux import FluxMirror, is_flux
from trimtab.init.mirror import Mirror, facts_of
from trimtab.init.tokens import Tokens


class Small(Protocol):
    """A small model beside the blocks of another.

    Attributes:
        module: it. Its parameters may have no numbers: `say` is handed them.
        width: of what it says.
        frozen: the parameters that are never trained, by name.
    """

    @property
    def module(self) -> nn.Module: ...
    @property
    def width(self) -> int: ...
    @property
    def frozen(self) -> Collection[str]: ...

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of the parameters that are its own, by name."""

    def values(self, model: nn.Module) -> Mapping[str, Tensor]:
        """What they start from, as far as that is not drawn anew; `model` is the base."""

    def project(self, W: Tensor) -> Tensor:
        """Give a projection W (dim, width) of what it says its starting values."""

    def say(
        self, tensors: Mapping[str, Tensor], h: Tensor, given: Mapping[str, Any], seen: Mapping[str, Any], site: Site
    ) -> Tensor:
        """What it says first (rows, tokens, width).

        Args:
            tensors: its parameters.
            h: what the first block reads (rows, tokens, dim).
            given: what else that block is called with.
            seen: the fact "seen" of methods that watch.
            site: of that block.
        """


def beside(config: Any, sites: Sequence[Site], model: nn.Module, inside: bool = False) -> Any:
    """The small model (`Small`) that a config has beside the blocks at `sites` of a base model.

    Args:
        inside: it is to be called in the base's forward, and to share its cache.

    Raises:
        ConfigError: the blocks are of several widths, or what the config asks for does not fit the base.
    """
    block, widths = sites[0].layer, {site.fan_in for site in sites}
    if len(widths) > 1:
        raise ConfigError(f"One shadow goes along blocks of one width, not of {sorted(widths)}: name fewer of them.")
    if facts_of(block) is not None:
        return Mirror(config, block, inside)
    if config.task_type == "SEQ_CLS":
        raise ConfigError(f"{type(model).__name__} is no classifier of transformers.")
    return FluxMirror(config, block, model) if is_flux(model) else Tokens(config, widths.pop())
