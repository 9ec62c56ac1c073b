"""The small model beside a base model: one of transformers, some blocks of a Flux2, or a network of single tokens."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from trimtab.core.site import Site
from trimtab.errors import ConfigError, RouteError
from trimtab.init.beside.flux import FluxMirror, is_flux
from trimtab.init.beside.mirror import Mirror, facts_of
from trimtab.init.beside.tokens import Tokens


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

    def head(self, model: nn.Module) -> Mapping[str, tuple[int, ...]]:
        """Shapes of what makes labels of what it says, by name."""

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

    def loss(
        self, s: Tensor, head: Mapping[str, Tensor] | None, inputs: Mapping[str, Any], model: nn.Module
    ) -> Tensor | None:
        """A loss of s by itself, of what the model is called with; None: there is none."""


def beside(config: Any, sites: Sequence[Site], model: nn.Module, inside: bool = False) -> Small:
    """The small model that a config has beside the blocks at `sites` of a base model.

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


def start(small: Small, model: nn.Module, tensors: Mapping[str, Tensor], projection: Tensor | None) -> None:
    """Give a small model's tensors, a projection of what it says and other tensors beside them their values."""
    values = small.values(model)
    for name, tensor in tensors.items():
        value = values.get(name)
        if value is not None and value.shape == tensor.shape:
            tensor.copy_(value)
        else:
            tensor.normal_(std=0.02)
    if projection is not None:
        small.project(projection)


def alone(small: Small, *of: Any) -> Any:
    """A small model by itself, of what `Mirror.parts` takes: a model of transformers."""
    if not isinstance(small, Mirror):
        raise NotImplementedError("The shadow of such a model is no model by itself: it reads hidden states.")
    from trimtab.init.beside.apart import DetachedShadowModel

    return DetachedShadowModel(*small.parts(*of))


def hidden(out: Any, h: Tensor, given: Mapping[str, Any]) -> Tensor:
    """The hidden states among what a block returns: of h's shape; a diffusion model's text may go beside them."""
    found = [out] if isinstance(out, Tensor) else list(out.values() if isinstance(out, Mapping) else out)
    alike = [x for x in found if isinstance(x, Tensor) and x.shape == h.shape]
    text = given.get("encoder_hidden_states")
    if not alike or (len(alike) > 1 and isinstance(text, Tensor) and text.shape == h.shape):
        raise RouteError(
            "Which of the things that a block returns are its hidden states cannot be told by their shape."
        )
    return alike[0]
