"""The contract: what a method is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from trimtab.core.config import PeftConfig
from trimtab.core.site import Site
from trimtab.errors import ConfigError

INPUT_EMBEDDING = "(input embedding)"  # a default target: wherever the model looks up its tokens
ADAPTER = "{}"  # where an adapter's name stands in the path of a leaf


def leaf_template(leaf: str) -> str:
    """Where a tensor lives below its layer: "lora_A.weight" -> "lora_A.{}.weight", "lora_E" -> "lora_E.{}"."""
    if ADAPTER in leaf:
        return leaf
    first, _, rest = leaf.partition(".")
    return f"{first}.{ADAPTER}.{rest}" if rest else f"{first}.{ADAPTER}"


def leaf_alias(leaf: str) -> str:
    """The name a formula calls a tensor by: "lora_A.weight" -> lora_A, "lora_B.bias" -> lora_B_bias."""
    container, _, rest = leaf_template(leaf).partition(f".{ADAPTER}")
    return (container.rpartition(".")[2] + rest.removesuffix(".weight")).replace(".", "_")


class Method:
    """The formula of one adapter at one site.

    `weight` and `bias` define the method: how it changes the layer's parameters. A `fused` method says the same thing
    as an edit of the layer's input (`before`) and output (`after`), which costs no full-size weight. Its tensors live
    in the layer; the formula reads them through it at each use, by name (`self.lora_A`), since engines swap parameters.

    Subclasses override hooks at most once and never call super().
    """

    config: ClassVar[type[PeftConfig]] = PeftConfig
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    fused: bool = False
    mergeable: bool = True
    views: ClassVar[tuple[str, ...]] = ()  # attributes that the layer shows as {adapter: value}, as PEFT's layers do
    targets: ClassVar[Mapping[str, Any]] = {}  # model_type ("*": any) -> default target_modules
    frozen: ClassVar[frozenset[str]] = frozenset()  # leaves that are kept but never trained
    defaults: ClassVar[
        Mapping[str, Mapping[str, Any]]
    ] = {}  # other fields that follow from the model_type, the same way
    scaling: float  # the scale of the update, of methods that have one
    unit: float  # the scale the config gives, which `set_scale` multiplies
    tied: ClassVar[bool] = False  # the tensors at one layer serve every layer that is tied to it

    def __init__(
        self, layer: Any, site: Site, adapter: str, config: Any, commons: Mapping[str, Any] | None = None
    ) -> None:
        self.layer, self.site, self.adapter = layer, site, adapter
        self.home = layer  # the layer that keeps the tensors: another one's where two tied layers share them
        self.options = config  # the config as it holds for this site
        self.commons = {} if commons is None else commons  # name -> {adapter: shared tensor}
        self._leaves: dict[str, str] = {}  # alias -> template

    # ------------------------------------------------------------------ to override
    def build(self, site: Site, config: Any) -> dict[str, Tensor]:
        """The adapter's tensors by leaf name, empty, each with its shape in a comment; `self.empty` makes them.

        Floating-point tensors become trainable parameters, except the leaves in `frozen`; others become buffers.
        """
        raise NotImplementedError

    def reset(self, config: Any) -> Tensor | None:
        """Give the tensors their starting values. An initialisation that changes the base returns the new W."""
        raise NotImplementedError

    def weight(self, W: Tensor) -> Tensor:
        """W (..., out, in) -> the adapted W."""
        return W

    def bias(self, b: Tensor | None) -> Tensor | None:
        """b (out,) -> the adapted b."""
        return b

    def before(self, x: Tensor) -> Tensor:
        """The layer's input -> what the layer is given instead."""
        return x

    def after(self, y: Tensor, x: Tensor, call: Any) -> Tensor:
        """The layer's output y and this method's own input x -> the adapted output; `call` holds per-row extras."""
        return y

    def pack(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor `name` -> what of it goes into the file."""
        return tensor

    def unpack(self, name: str, value: Tensor) -> Tensor:
        """A value from the file -> the tensor `name`. A value on the meta device is a question about its shape only."""
        return value

    @classmethod
    def admit(cls, config: Any, others: list[Any]) -> None:
        """Raise where a model whose other adapters of this method have the configs `others` cannot take one more."""

    @classmethod
    def share(cls, config: Any, sites: list[Site]) -> dict[str, Tensor]:
        """Tensors an adapter keeps once for all its sites, with their values; a formula reads them by `self.shared`."""
        return {}

    @classmethod
    def stored(cls, config: Any, name: str) -> bool:
        """Whether a tensor goes into the adapter's file; one that does not is made anew on load."""
        return True

    @classmethod
    def penalty(cls, methods: list[Any], config: Any) -> Tensor | None:
        """A term of the loss in training, from all the methods of one adapter."""
        return None

    @classmethod
    def step(cls, methods: list[Any], config: Any, t: int) -> None:
        """What an adapter does after optimiser step `t` (rank schedules); it may change `config`."""

    @classmethod
    def mutates(cls, config: Any) -> bool:
        """Whether this config's initialisation changes the base's weights (PiSSA ...)."""
        return False

    # ------------------------------------------------------------------ for formulas
    def leaf(self, name: str) -> str:
        """Note a leaf and return its template."""
        template = leaf_template(name)
        self._leaves[leaf_alias(name)] = template
        return template

    def empty(self, *shape: int) -> Tensor:
        """An uninitialised tensor on the device and in the number format that adapters of this layer have."""
        return torch.empty(*shape, **self.layer.factory)

    def shared(self, name: str) -> Tensor:
        """A tensor that `share` made for this adapter."""
        tensor: Tensor = self.commons[name][self.adapter]
        return tensor

    @property
    def training(self) -> bool:
        """Whether the layer is in training mode (dropout)."""
        mode: bool = self.layer.training
        return mode

    def __getattr__(self, name: str) -> Any:
        # Reached only for names that are no attribute: the adapter's tensors.
        leaves = self.__dict__.get("_leaves", {})
        if name not in leaves:
            raise AttributeError(f"{type(self).__name__} has neither an attribute nor a tensor named '{name}'")
        return self.home.tensor(leaves[name], self.adapter)


class PromptMethod(torch.nn.Module):
    """A prompt in front of the model: the site is the model itself.

    A plain prompt (n, dim) goes before the input's embeddings; a `cached` one (n, layers · 2 · dim) stands in every
    layer's cache of keys and values. The tensors are the module's own parameters.
    """

    config: ClassVar[type[PeftConfig]] = PeftConfig
    kinds: ClassVar[frozenset[str]] = frozenset({"model"})
    cached: ClassVar[bool] = False
    fused, mergeable = False, False

    def build(self, config: Any) -> None:
        """Make the parameters, empty, each with its shape in a comment; `config` is complete."""
        raise NotImplementedError

    def reset(self, config: Any, base: Any) -> None:
        """Give them their starting values; `base` is the model (its embeddings may be looked at)."""
        raise NotImplementedError

    def prompt(self) -> Tensor:
        """The prompt: (virtual tokens, dim), or (virtual tokens, layers · 2 · dim) where `cached`."""
        raise NotImplementedError

    def restore(self, prompt: Tensor) -> None:
        """Take a saved prompt as the parameters."""
        raise NotImplementedError

    @classmethod
    def admit(cls, config: Any, others: list[Any]) -> None:
        """Prompts stand beside one another."""

    @classmethod
    def mutates(cls, config: Any) -> bool:
        """Prompts leave the base alone."""
        return False

    @classmethod
    def penalty(cls, methods: list[Any], config: Any) -> Tensor | None:
        """A term of the loss in training."""
        return None

    @classmethod
    def step(cls, methods: list[Any], config: Any, t: int) -> None:
        """What an adapter does after optimiser step `t`."""


def require_rank(r: Any, name: str = "r") -> None:
    """Raise `ConfigError` unless `r` is a positive whole number."""
    if not isinstance(r, int) or r <= 0:
        raise ConfigError(f"`{name}` should be a positive integer value but the value passed is {r}")
