"""A small Flux2 transformer beside a large one: some of its blocks, cut to fewer heads and narrower feed-forward parts.

Imports diffusers when one is made.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from trimtab.core.site import Site
from trimtab.errors import ConfigError, RouteError
from trimtab.formats import weights

# What turns the model's inputs into hidden states, and tells it the time.
STEM = ("x_embedder", "context_embedder", "time_guidance_embed", "pos_embed")
# Axes of weights that are several parts one after another: (whose, which axis, parts: h as wide as the model, m as the
# inside of its feed-forward parts). A smaller model has the first rows or columns of each part.
PARTS = (
    ("_modulation_img.linear.weight", 0, "hhhhhh"),
    ("_modulation_txt.linear.weight", 0, "hhhhhh"),
    ("single_stream_modulation.linear.weight", 0, "hhh"),
    ("norm_out.linear.weight", 0, "hh"),
    ("linear_in.weight", 0, "mm"),
    ("attn.to_qkv_mlp_proj.weight", 0, "hhhmm"),
    ("attn.to_out.weight", 1, "hm"),
)
# Of a model that is there already: what must be as the base has it.
SAME = (
    "attention_head_dim", "axes_dims_rope", "in_channels", "out_channels", "joint_attention_dim",
    "timestep_guidance_channels", "guidance_embeds",
)  # fmt: skip


def is_flux(model: nn.Module) -> bool:
    """Whether a model is a Flux2 transformer of diffusers."""
    return any(cls.__name__ == "Flux2Transformer2DModel" for cls in type(model).__mro__)


def width(config: Mapping[str, Any]) -> int:
    """How wide its hidden states are."""
    return int(config["num_attention_heads"] * config["attention_head_dim"])


def inside(config: Mapping[str, Any]) -> int:
    """How wide its feed-forward parts are inside."""
    return int(width(config) * config["mlp_ratio"])


def reduced(
    base: Mapping[str, Any], layers: int, singles: int, dim: int | None, heads: int | None, inner: int | None
) -> dict[str, Any]:
    """The config of a smaller model; None: as the base.

    Raises:
        ConfigError: it would be no part of the base.
    """
    head = base["attention_head_dim"]
    if dim is not None and dim % head:
        raise ConfigError(f"`shadow_hidden_size` ({dim}) is no multiple of a head's width in the base ({head}).")
    heads = heads or (base["num_attention_heads"] if dim is None else dim // head)
    if dim not in (None, heads * head):
        raise ConfigError(f"`shadow_hidden_size` ({dim}) is not that of {heads} heads ({heads * head}).")
    inner = inner or inside(base)
    made = {**base, "num_layers": layers, "num_single_layers": singles, "num_attention_heads": heads}
    made["mlp_ratio"] = inner / width(made)
    if inside(made) < inner:  # the quotient was rounded down
        made["mlp_ratio"] = math.nextafter(made["mlp_ratio"], math.inf)
    fits(base, made)
    return made


def fits(base: Mapping[str, Any], small: Mapping[str, Any]) -> None:
    """Raise `ConfigError` where the small model has more of anything than the base."""
    for name in ("num_layers", "num_single_layers", "num_attention_heads"):
        if not 1 <= small[name] <= base[name]:
            raise ConfigError(f"The small Flux2 model has {small[name]} {name}: of the base's there are {base[name]}.")
    if not 1 <= inside(small) <= inside(base):
        raise ConfigError(
            f"The small Flux2 model's feed-forward parts are {inside(small)} wide inside: the base's {inside(base)}."
        )


def agree(base: Mapping[str, Any], small: Mapping[str, Any]) -> None:
    """Raise `ConfigError` where a model cannot be the small one beside the base."""
    plain = lambda value: list(value) if isinstance(value, list | tuple) else value
    for name in SAME:
        if plain(small[name]) != plain(base[name]):
            raise ConfigError(f"The small Flux2 model's `{name}` is {small[name]}: here it must be {base[name]}.")
    fits(base, small)


def chosen(total: int, count: int) -> list[int]:
    """Which of `total` blocks a model of `count` has: from first to last, evenly; the last one where it is alone."""
    return [total - 1] if count == 1 else [round(i * (total - 1) / (count - 1)) for i in range(count)]


def cut(name: str, W: Tensor, shape: tuple[int, ...], sizes: Mapping[str, tuple[int, int]]) -> Tensor:
    """What a smaller model has of a weight; sizes: {"h", "m": in the base, in the smaller one}."""
    for ending, axis, parts in PARTS:
        if name.endswith(ending):
            pieces = W.split([sizes[part][0] for part in parts], axis)
            W = torch.cat([x.narrow(axis, 0, sizes[p][1]) for p, x in zip(parts, pieces, strict=True)], axis)
    return W[tuple(map(slice, shape))]


def of_base(small: Any, base: Any) -> Iterator[tuple[str, Tensor]]:
    """(name, value) of every parameter of a smaller model, out of the base."""
    own, around = small.config, re.compile(r"\.(base_layer|original_module)(?=\.|$)")  # other adapters
    layers = {around.sub("", path): layer for path, layer in base.named_modules()}
    sizes = {"h": (width(base.config), width(own)), "m": (inside(base.config), inside(own))}
    rows = {"transformer_blocks": "num_layers", "single_transformer_blocks": "num_single_layers"}
    places = {stack: chosen(base.config[count], own[count]) for stack, count in rows.items()}
    for name, parameter in small.named_parameters():
        first, _, rest = name.partition(".")
        place, _, last = rest.partition(".")
        source = f"{first}.{places[first][int(place)]}.{last}" if first in places else name
        path, _, kind = source.rpartition(".")
        W = weights.read(layers[path], layers[path]._parameters[kind])
        yield name, cut(name, W.detach(), tuple(parameter.shape), sizes)


class Outside(nn.Module):
    """A module of another model, called as this one's own: its parameters stay the other's."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.__dict__["shared_module"] = module  # past nn.Module's setattr: it is no child

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returns."""
        return self.__dict__["shared_module"](*args, **kwargs)


class DetachedFluxShadowModel(nn.Module):
    """What the single-stream blocks of a small Flux2 transformer make of a larger one's hidden states.

    Args:
        model: the small transformer, whole.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    @property
    def config(self) -> Any:
        """Of the small transformer."""
        return self.model.config

    @classmethod
    def from_base(
        cls,
        base_model: Any,
        *,
        num_layers: int,
        num_single_layers: int,
        share_embeddings: bool,
        hidden_size: int | None = None,
        num_attention_heads: int | None = None,
        intermediate_size: int | None = None,
    ) -> DetachedFluxShadowModel:
        """One out of a base model's blocks; where it is as wide, it may read the base's stem.

        Raises:
            ConfigError: it would have more of anything than the base.
        """
        sizes = (num_layers, num_single_layers, hidden_size, num_attention_heads, intermediate_size)
        config = reduced(base_model.config, *sizes)
        made = cls(type(base_model).from_config(config))
        made.model.load_state_dict(dict(of_base(made.model, base_model)), strict=False)
        if share_embeddings and width(config) == width(base_model.config):
            for name in STEM:
                setattr(made.model, name, Outside(getattr(base_model, name)))
        return made

    def forward(
        self,
        input_ids: Any = None,
        inputs_embeds: Tensor | None = None,
        block_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> SimpleNamespace:
        """inputs_embeds (rows, tokens, at least dim) -> `last_hidden_state` (rows, tokens, dim).

        Args:
            block_kwargs: what the base's block is called with; its modulation may be wider as well.
        """
        given = dict(block_kwargs or {})
        if inputs_embeds is None or given.get("temb_mod") is None:
            raise ConfigError("A small Flux2 model needs `inputs_embeds`, and `temb_mod` among its `block_kwargs`.")
        dim = width(self.config)
        mod = given["temb_mod"].unflatten(-1, (3, -1))[..., :dim].flatten(-2)  # shift, scale, gate
        passed = {name: given.get(name) for name in ("image_rotary_emb", "joint_attention_kwargs")}
        x = inputs_embeds[..., :dim]
        for block in self.model.single_transformer_blocks:
            x = block(hidden_states=x, encoder_hidden_states=None, temb_mod=mod, **passed)
        return SimpleNamespace(last_hidden_state=x, past_key_values=None)


class FluxMirror:
    """A `DetachedFluxShadowModel` beside a Flux2 transformer. It has no numbers of its own: they are handed to it."""

    project = staticmethod(nn.init.eye_)

    def __init__(self, config: Any, block: nn.Module, model: Any) -> None:
        if "temb_mod" not in inspect.signature(block.forward).parameters:
            raise ConfigError("The shadow of a Flux2 transformer goes along its `single_transformer_blocks`.")
        self.ready = None if config.shadow_model == "mirror" else config.shadow_model
        if self.ready is None:
            layers = config.shadow_num_hidden_layers or 1
            sizes = (config.shadow_hidden_size, config.shadow_num_attention_heads, config.shadow_intermediate_size)
            own = reduced(model.config, layers, 2 * layers, *sizes)
        else:
            own = facts_at(type(model), self.ready)
            agree(model.config, own)
        with torch.device("meta"):
            self.module = DetachedFluxShadowModel(type(model).from_config(own))
        self.width = width(own)
        self.shares = config.share_embeddings and self.ready is None and self.width == width(model.config)
        self.frozen = frozenset(n for n in self.shapes() if in_stem(n) and self.ready is not None)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of its parameters, by name; those of a stem that is the base's are not among them."""
        own = self.module.named_parameters()
        return {name: tuple(p.shape) for name, p in own if not (self.shares and in_stem(name))}

    def values(self, model: nn.Module) -> dict[str, Tensor]:
        """What they start from."""
        if self.ready is not None:
            read: Any = type(model)
            return dict(DetachedFluxShadowModel(read.from_pretrained(self.ready)).named_parameters())
        return {f"model.{name}": value for name, value in of_base(self.module.model, model)}

    def head(self, model: nn.Module) -> dict[str, tuple[int, ...]]:
        """It has none."""
        return {}

    def say(self, tensors: Mapping[str, Tensor], h: Tensor, given: Mapping[str, Any], seen: Any, site: Site) -> Tensor:
        """The first state (rows, tokens, width), of the hidden states that the first block reads."""
        if (given.get("joint_attention_kwargs") or {}).get("kv_cache_mode"):
            raise RouteError("A shadow keeps no cache of reference images: call the model without `kv_cache_mode`.")
        called = {"inputs_embeds": h, "block_kwargs": given}
        said: Tensor = functional_call(self.module, dict(tensors), (), called).last_hidden_state
        return said

    def loss(self, *of: Any) -> None:
        """None: what it says has no labels."""


def in_stem(name: str) -> bool:
    """Whether a parameter of a `DetachedFluxShadowModel` is one of its stem."""
    return name.split(".")[1] in STEM


def facts_at(cls: Any, model_id: str) -> dict[str, Any]:
    """The config of a model in a folder or on the Hub.

    Raises:
        ConfigError: there is none.
    """
    try:
        return dict(cls.load_config(model_id))
    except (OSError, ValueError) as error:
        raise ConfigError(f"There is no model at '{model_id}': {error}") from error
