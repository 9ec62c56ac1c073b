"""The contract: what a method is."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from trimtab.core.config import PeftConfig
from trimtab.core.dropout import Dropout, mixed, rows_of
from trimtab.core.site import Site, Sites
from trimtab.errors import ConfigError, ReadOnlyWeight

INPUT_EMBEDDING = "(input embedding)"  # a default target: wherever the model looks up its tokens
BIASED = "(layers with a bias)"  # another: every layer of the method's kinds that has one
ADAPTER = "{}"  # where an adapter's name stands in the path of a leaf


@lru_cache(1024)
def leaf_template(leaf: str) -> str:
    """Where a tensor lives below its layer: "lora_A.weight" -> "lora_A.{}.weight", "lora_E" -> "lora_E.{}"."""
    if ADAPTER in leaf:
        return leaf
    first, _, rest = leaf.partition(".")
    return f"{first}.{ADAPTER}.{rest}" if rest else f"{first}.{ADAPTER}"


@lru_cache(1024)
def leaf_alias(leaf: str) -> str:
    """The name a formula calls a tensor by: "lora_A.weight" -> lora_A, "lora_B.bias" -> lora_B_bias."""
    container, _, rest = leaf_template(leaf).partition(f".{ADAPTER}")
    return (container.rpartition(".")[2] + rest.removesuffix(".weight")).replace(".", "_")


@dataclass(frozen=True)
class Leaf:
    """A tensor that an adapter has at a site, declared: it can be checked, counted and laid out before it is made.

    Attributes:
        shape: its shape; a comment beside it names the axes.
        train: it is trained.
        file: it goes into the adapter's file; what does not is made anew on load.
        state: it is part of the state of training: kept in checkpoints, not in what is shared.
        buffer: what is not trained is a buffer, not a frozen parameter.
        dtype: its number format; None: the one that adapters of the layer have. Whole numbers are buffers.
    """

    shape: tuple[int, ...]
    train: bool = True
    file: bool = True
    state: bool = False
    buffer: bool = False
    dtype: torch.dtype | None = None


Leaves = dict[str, Leaf]


@dataclass(frozen=True, eq=False)
class Call:
    """What one forward hands to the formulas of one adapter, cut to its rows once a forward.

    Attributes:
        extras: arguments of the forward that formulas read, by name (task ids, offsets); tensors have the rows cut.
        seed: what random numbers are drawn from; None: from torch's own generator, once a layer.
        keys: the rows' names for the generator, one a row; None: 0, 1, 2 ...
        lengths: the tokens of each row, where an input (1, tokens, d) holds several rows; None: a row is an entry of
            the first axis.
        name: what the adapter is called in random numbers, so that it has the same under another name; None: its own
            name.
    """

    extras: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    keys: tuple[int, ...] | None = None
    lengths: tuple[int, ...] | None = None
    name: str | None = None

    def drop(self, method: Method, x: Tensor, p: float) -> Tensor:
        """`x` after dropout with probability `p`, in training; indices have none.

        A row's mask depends on the seed, the adapter, the site and the row, never on the rows beside it.
        """
        if not p or not method.training or not x.is_floating_point():
            return x
        if torch.compiler.is_compiling():  # lists of places would break the graph
            return torch.nn.functional.dropout(x, p)
        return self.dropout(method, x, p)(x)

    def dropout(self, method: Method, x: Tensor, p: float, salt: str = "") -> Dropout:
        """The dropout that `drop` does, as what a fused step takes."""
        return Dropout(p, self.key(method, salt), rows_of(x, self.keys, self.lengths))

    def mask(self, method: Method, x: Tensor, p: float, salt: str = "") -> Tensor:
        """Which entries of `x` dropout keeps, as bools of its shape."""
        return self.dropout(method, x, p, salt).kept(x)

    def key(self, method: Method, salt: str = "") -> int:
        """A number for a generator: a function of the seed, the adapter, the site and `salt`."""
        seed = int(torch.randint(1 << 62, ())) if self.seed is None else self.seed
        adapter = method.adapter if self.name is None else self.name
        return mixed(seed, zlib.crc32(f"{adapter}/{method.site.name}/{salt}".encode()))

    def generator(self, method: Method, salt: str = "", device: Any = "cpu") -> torch.Generator:
        """A generator of random numbers that belong to no row."""
        return torch.Generator(device).manual_seed(self.key(method, salt))

    def strength(self, method: Method) -> Any:
        """How strongly each token takes the method's update (rows, tokens, 1), or a number; None: as it is."""
        if not self.extras:
            return None
        found = self.extras.get(f"{method.adapter}.strength")
        return found[method.site.name] if isinstance(found, Mapping) else found

    def begins(self, method: Method, known: int, given: int) -> int:
        """Which token of the `known` ones that its `facts` looked at is the first of the `given` ones of a pass.

        Generation makes many passes: of the whole prompt, of what comes after a cache, of all tokens so far. The method
        must watch.
        """
        seen = self.fact(method, "seen")
        if not seen or "start" not in seen or _encodes(seen["model"]):
            return 0 if given == known else known
        # A forward is given what follows the cache, generation all tokens, those in the cache included.
        seen.setdefault("before", seen["start"] if given == known else 0)
        begin: int = seen["start"] - seen["before"]
        return begin

    def fact(self, method: Method, name: str) -> Any:
        """What the method's `facts` found for this forward under `name`, or None."""
        return self.extras.get(f"{method.adapter}.{name}")


def _encodes(model: Any) -> bool:
    """Whether the model has an encoder and a decoder, which see different tokens."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


class Method:
    """The formula of one adapter at one site.

    `weight` and `bias` define the method: how it changes the layer's parameters. At the kinds of sites in `fused` it
    says the same thing as an edit of the layer's input (`before`) and output (`after`), which costs no full-size
    weight. Its tensors live in the layer; the formula reads them at each use, by name (`self.lora_A`), since engines
    swap parameters.

    Subclasses override hooks at most once and never call super().
    """

    when: ClassVar[str] = ""  # what it is for, in a few words
    example: ClassVar[
        Mapping[str, Any]
    ] = {}  # fields that it needs, or that choose it, as the table of methods has them
    config: ClassVar[type[PeftConfig]] = PeftConfig
    prefix: ClassVar[str] = ""  # what the names of its tensors start with
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    fused: ClassVar[frozenset[str]] = frozenset()
    mergeable: bool = True  # of the class; one of its methods may say no, by its config
    reads: bool = False  # its forward reads the frozen weight, beside the layer's own product (of the class, as above)
    padded: bool = False  # it holds its tensors in more room than they need, for hot-swapping (of an object)
    weighed: bool = False  # its update can be weighed for each token, by `Call.strength`
    views: ClassVar[tuple[str, ...]] = ()  # attributes that the layer shows as {adapter: value}, as PEFT's layers do
    settings: ClassVar[tuple[str, ...]] = ()  # what PEFT's layers list beside these: fields of the config, and tensors
    elsewhere: ClassVar[tuple[str, ...]] = ()  # what holds the tensors it has at layers of other kinds: empty here
    targets: ClassVar[Mapping[str, Any]] = {}  # model_type ("*": any) -> default target_modules
    # other fields that follow from the model_type, the same way
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    listed: ClassVar[str] = ""  # what PEFT lists below a layer that has nothing but this method
    # kinds of site whose tensors serve every layer that is tied to it
    tied: ClassVar[frozenset[str]] = frozenset()
    partial: ClassVar[bool] = False  # changes some rows of an embedding: its file never has the base's along with them
    echoes: ClassVar[bool] = False  # those layers have them in the file as well, if it is the adapter's own method
    extras: ClassVar[tuple[str, ...]] = ()  # arguments of the forward that are for the formula, not for the model
    told: ClassVar[tuple[str, ...]] = ()  # arguments of a layer's own call that are for the formula, as hooks give them
    # Formulas see the model's calls: the fact "seen" has "model", "inputs", and "start", the tokens the cache has then.
    watches: ClassVar[bool] = False
    # Static methods that the model shows: (what gives an adapter's methods by its name or those of the active one, the
    # model, what the caller gives)
    acts: ClassVar[tuple[str, ...]] = ()
    scaling: float  # the scale of the update, of methods that have one
    unit: float  # the scale the config gives, which `set_scale` multiplies

    def __init__(self, layer: Any, site: Site, adapter: str, config: Any) -> None:
        self.layer, self.site, self.adapter = layer, site, adapter
        self.home = layer  # the layer that keeps the tensors: another one's where two tied layers share them
        self.options = config  # the config as it holds for this site
        self.places: dict[str, tuple[dict[str, Any], str]] = {}  # alias -> (where the tensor is registered, its name)
        self.declared: Leaves = {}  # the tensors it has
        self.templates: dict[str, str] = {}  # leaf -> where it lives below `home`
        self.trained: tuple[str, ...] = ()  # the leaves that are trained
        self.commons: Mapping[str, Any] = {}  # name -> {adapter: shared tensor}
        self.peers: Sequence[Site] = ()  # the sites of the whole adapter, in the model's order
        self.position = 0  # of this site among them
        self.setup(config)

    # ------------------------------------------------------------------ to override
    @classmethod
    def share(cls, config: Any, sites: Sites) -> Leaves:
        """Tensors an adapter keeps once for all its sites; a formula reads them by `self.shared`."""
        return {}

    @classmethod
    def start_shared(cls, config: Any, sites: Sites, shared: Mapping[str, Tensor]) -> None:
        """Give the shared tensors their starting values."""

    @classmethod
    def leaves(cls, site: Site, config: Any, shared: Leaves) -> Leaves:
        """The adapter's tensors at a site by leaf name, each shape with a comment that names its axes."""
        raise NotImplementedError

    @classmethod
    def joint(cls, config: Any, sites: Sequence[Site]) -> Mapping[str, Sequence[int]]:
        """leaf -> for each of an adapter's sites which of them keeps its tensor, where sites share one: the first."""
        return {}

    @classmethod
    def chosen(cls, config: Any, kinds: Mapping[str, str | None]) -> list[str] | None:
        """The paths it adapts, of {path: kind of site}, where not by the common rules of `target_modules`."""
        return None

    def setup(self, config: Any) -> None:
        """Note what the formula needs beside its tensors (rank, scale)."""

    def reset(self, config: Any) -> Tensor | None:
        """Give the tensors their starting values. An initialisation that changes the base returns the new W."""
        raise NotImplementedError

    def follow(self, config: Any) -> None:
        """Find anew what is not in a file but follows from what is: called when a file's values have come in."""

    def weight(self, W: Tensor) -> Tensor:
        """W (..., out, in) -> the adapted W."""
        return W

    def bias(self, b: Tensor | None) -> Tensor | None:
        """b (out,) -> the adapted b."""
        return b

    def before(self, x: Tensor, call: Call) -> Tensor:
        """The layer's input -> what the layer is given instead."""
        return x

    def after(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        """The layer's output y and this method's own input x -> the adapted output."""
        return y

    # The whole layer in one step, (self, x, call) -> y, or None where it does not apply; see `Site.plain`.
    through: ClassVar[Callable[..., Tensor | None] | None] = None
    # The same for several layers of one input, (methods, x, call) -> their outputs, or None.
    together: ClassVar[Callable[..., Sequence[Tensor] | None] | None] = None
    # At a site that is a module as a whole: its call, (self, run, call, *args, **kwargs) -> what it returns instead.
    around: ClassVar[Callable[..., Any] | None] = None
    # Where the layer keeps more than its parameters: (self) -> a block in which it runs with what the method has of it.
    standing: ClassVar[Callable[..., AbstractContextManager[None]] | None] = None
    # `through` with rows of several adapters, where gradients are wanted: (stacks, x, cut, calls) -> y, or None.
    mixed: ClassVar[Callable[..., Tensor | None] | None] = None
    # All rows of a mixed batch at once, (stacks, y, x, cut, calls) -> y, or None: then groups are taken in turn.
    rows: ClassVar[Callable[..., Tensor | None] | None] = None
    # Several adapters as one of them, (methods, weights, recipe, rank) -> {alias: tensor}, where not by their deltas.
    combine: ClassVar[Callable[..., dict[str, Tensor]] | None] = None
    # What completes their config, a copy of the first one's that selects the layers of all: (the method, config, the
    # adapters' configs, {path of a layer: its rank}).
    combined_config: ClassVar[Callable[..., None] | None] = None

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
    def facts(cls, config: Any, inputs: Mapping[str, Any], training: bool) -> dict[str, Any]:
        """What an adapter's formulas must know of a forward beside their own input, found once from its arguments.

        Formulas read it by `call.fact`; a tensor's first axis is the batch's rows.
        """
        return {}

    @classmethod
    def penalty(cls, methods: Sequence[Any], config: Any) -> Tensor | None:
        """A term of one adapter's loss in training, from all its methods."""
        return None

    @classmethod
    def reported(cls, term: Tensor, config: Any) -> Mapping[str, Tensor]:
        """What the outputs show of that term, as attributes: {name: value}."""
        return {}

    @classmethod
    def begin(cls, methods: Sequence[Any], config: Any, t: int) -> None:
        """What an adapter does before optimiser step `t` (1, 2 ...), its gradients there."""

    @classmethod
    def step(cls, methods: Sequence[Any], config: Any, t: int) -> None:
        """What an adapter does after optimiser step `t`, its gradients still there; it may change `config`."""

    @classmethod
    def mutates(cls, config: Any) -> bool:
        """Whether this config's initialisation changes the base's weights (PiSSA ...)."""
        return False

    # ------------------------------------------------------------------ where its tensors are
    def register(self, leaf: str, place: tuple[dict[str, Any], str]) -> None:
        """Note where a leaf's tensor is registered."""
        self.places[leaf_alias(leaf)] = place

    def place_of(self, leaf: str) -> tuple[dict[str, Any], str]:
        """Where a leaf's tensor is registered: (parameters or buffers of a module, its key there)."""
        return self.places[leaf_alias(self.source(leaf))]

    def source(self, leaf: str) -> str:
        """The leaf of the layer which keeps the tensors that is this layer's `leaf`."""
        return leaf

    def tensor(self, leaf: str) -> Any:
        """A leaf's tensor as it is registered now."""
        holder, key = self.place_of(leaf)
        return holder[key]

    def twin(self, adapter: str, options: Any) -> Any:
        """The same formula at the same site for another adapter of the same config, still without tensors."""
        method = object.__new__(type(self))  # what copy.copy does, at a tenth of the time
        method.__dict__.update(self.__dict__, adapter=adapter, options=options, places={})
        return method

    # ------------------------------------------------------------------ for formulas
    def shared(self, name: str) -> Tensor:
        """A tensor that the adapter keeps once."""
        container, _, rest = name.partition(".")
        found = self.commons[container][self.adapter]
        tensor: Tensor = getattr(found, rest) if rest else found
        return tensor

    @property
    def training(self) -> bool:
        """Whether the layer is in training mode (dropout)."""
        mode: bool = self.layer.training
        return mode

    def __getattr__(self, name: str) -> Any:
        # Reached only for names that are no attribute: the adapter's tensors.
        try:
            holder, key = self.__dict__["places"][name]
        except KeyError:
            raise AttributeError(
                f"{type(self).__name__} has neither an attribute nor a tensor named '{name}'"
            ) from None
        return holder[key]


def overrides(cls: type, hook: str) -> bool:
    """Whether a method says something of its own by a hook."""
    own, default = getattr(cls, hook, None), getattr(Method, hook)
    return own is not None and getattr(own, "__func__", own) is not getattr(default, "__func__", default)


def no_weight(method: Method) -> ReadOnlyWeight:
    """The error of a method that is no change of the weight, where one is asked for."""
    return ReadOnlyWeight(
        f"{type(method).__name__} at '{method.site.name}' is no change of the layer's weight: it cannot be merged, nor "
        "stacked with an adapter that edits the weight only."
    )


def require_rank(r: Any, name: str = "r") -> None:
    """Raise `ConfigError` unless `r` is a positive whole number."""
    if not isinstance(r, int) or r <= 0:
        raise ConfigError(f"`{name}` should be a positive integer value but the value passed is {r}")


__all__ = [
    "BIASED",
    "INPUT_EMBEDDING",
    "Call",
    "Leaf",
    "Leaves",
    "Method",
    "leaf_alias",
    "leaf_template",
    "no_weight",
    "overrides",
    "require_rank",
]
