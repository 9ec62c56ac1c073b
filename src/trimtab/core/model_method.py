"""The contract of methods whose site is the model itself: prompts, mixtures around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.core.config import PeftConfig
from trimtab.core.method import Call

PROMPT = "prompt_embeddings"  # the key of a prompt in a file


class ModelMethod(nn.Module):
    """The formula of one adapter whose site is the model itself: a prompt before it, a mixture around it.

    The tensors are the module's own parameters.
    """

    when: ClassVar[str] = ""
    example: ClassVar[Mapping[str, Any]] = {}
    reads: ClassVar[bool] = False
    weighed: ClassVar[bool] = False
    config: ClassVar[type[PeftConfig]] = PeftConfig
    prefix: ClassVar[str] = ""
    kinds: ClassVar[frozenset[str]] = frozenset({"model"})
    fused: ClassVar[frozenset[str]] = frozenset()
    mergeable: ClassVar[bool] = False
    extras: ClassVar[tuple[str, ...]] = ()  # arguments of the forward that are for the formula, not for the model
    watches: ClassVar[bool] = False
    frozen: ClassVar[tuple[str, ...]] = ()  # parameters that are never trained

    def build(self, config: Any) -> None:
        """Make the parameters, empty, each with its shape in a comment; `config` is complete."""
        raise NotImplementedError

    def reset(self, config: Any, base: Any) -> None:
        """Give them their starting values; `base` is the model (its embeddings may be looked at)."""
        raise NotImplementedError

    def before(self, inputs: dict[str, Any], call: Call) -> dict[str, Any]:
        """A forward's arguments -> what the model is given instead."""
        return inputs

    def around(self, forward: Callable[..., Any], inputs: dict[str, Any], call: Call) -> Any:
        """The forward itself, once or several times."""
        return forward(**inputs)

    @classmethod
    def admit(cls, config: Any, others: list[Any]) -> None:
        """Methods of the model stand beside one another."""

    @classmethod
    def mutates(cls, config: Any) -> bool:
        """They leave the base alone."""
        return False

    @classmethod
    def penalty(cls, methods: Sequence[Any], config: Any) -> Tensor | None:
        """A term of the loss in training."""
        return None

    @classmethod
    def reported(cls, term: Tensor, config: Any) -> Mapping[str, Tensor]:
        """What the outputs show of that term."""
        return {}

    @classmethod
    def begin(cls, methods: Sequence[Any], config: Any, t: int) -> None:
        """What an adapter does before optimiser step `t`."""

    @classmethod
    def step(cls, methods: Sequence[Any], config: Any, t: int) -> None:
        """What an adapter does after optimiser step `t`."""


class Mixture(ModelMethod):
    """A router among other adapters of the model, which act while it is active, each as strongly as it says.

    Its tensors stand beside the model, under `place`, in memory as in the file.

    Attributes:
        field: the field of its config that names those adapters: {name: folder or Hub id}. They are loaded with it.
        sites: the paths of the layers that those adapters have, in the model's order.
        width: the size of the model's hidden states, where its config tells it.
    """

    place: ClassVar[str] = ""
    field: ClassVar[str] = ""
    views: ClassVar[tuple[str, ...]] = ()  # methods of its own that the model shows as its
    sites: tuple[str, ...] = ()
    width: int | None = None

    @classmethod
    def among(cls, config: Any) -> dict[str, str]:
        """The adapters it works among: {name: folder or Hub id}."""
        named: dict[str, str] = getattr(config, cls.field)
        return named

    @classmethod
    def trains(cls, config: Any) -> bool:
        """Whether those are trained along with it."""
        return False

    @classmethod
    def mend(cls, tensors: dict[str, Tensor], read: Callable[[str], dict[str, Tensor]]) -> None:
        """Put what a file lacks into `tensors`, by `read`, which gives the file of an adapter saved beside it."""

    def around(self, forward: Callable[..., Any], inputs: dict[str, Any], call: Call) -> Any:
        """The forward itself, by `forward(strengths, inputs)`: adapter -> what `Call.strength` gives its methods."""
        raise NotImplementedError


class PromptMethod(ModelMethod):
    """A prompt in front of the model.

    A plain prompt (n, dim) goes before the input's embeddings; a `cached` one (n, layers · 2 · dim) stands in every
    layer's cache of keys and values.
    """

    cached: ClassVar[bool] = False
    unfinished: str = ""  # while the prompt comes out of a network: how one trains on from a file, which lacks that

    def prompt(self, call: Call) -> Tensor:
        """The prompt: (virtual tokens, dim), or (virtual tokens, layers · 2 · dim) where `cached`.

        Where rows have prompts of their own: (rows, virtual tokens, dim).
        """
        raise NotImplementedError

    def saved(self) -> dict[str, Tensor]:
        """What goes into the file, by key: the finished prompt, whatever it came out of, without dropout."""
        training = self.training
        try:
            return {PROMPT: self.eval().prompt(Call())}
        finally:
            self.train(training)

    def restore(self, name: str, value: Tensor) -> None:
        """Take what a file has under a key as the parameters; a network it came out of is let go."""
        raise NotImplementedError


def last_tokens(logits: Tensor, ids: Tensor | None, pad: int | None, mask: Tensor | None = None) -> Tensor:
    """Of each row of logits (rows, tokens, labels) those at its last token that is no padding (rows, labels)."""
    rows, tokens = logits.shape[:2]
    there = (ids != pad) if ids is not None and pad is not None else mask
    last = torch.full((rows,), tokens - 1, device=logits.device)
    if there is not None:
        last = torch.where(there.bool(), torch.arange(tokens, device=there.device), -1).amax(1).to(logits.device)
    return logits[torch.arange(rows, device=logits.device), last]
