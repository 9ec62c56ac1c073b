"""Shadow (Li et al. 2026, https://arxiv.org/abs/2604.19254).   h' = h + α U D (h - s);   s' = g T(o) + (1 - g) s.

A small trained model, of the base's kind or one that is there already, reads the same tokens (beside a diffusion model,
the input of its blocks): what it says is the first shadow state s. It goes along the blocks: each has its input h
drawn towards it or away, and turns it by its output o, with g = σ(G(o)). T and G: two linear layers, a GELU between.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.core.config import LayerConfig, PeftType, help_field
from trimtab.core.method import Call, Leaf, Leaves, Method, require_rank
from trimtab.core.site import Site, Sites
from trimtab.core.targets import blocks, matches
from trimtab.errors import ConfigError, RouteError
from trimtab.init.beside import alone, beside, hidden, start

BACKBONE, PROJECTION, HEAD = "shadow_backbone", "shadow_projection.weight", "shadow_head"


@dataclass
class ShadowConfig(LayerConfig):
    """The configuration of a shadow network."""

    r: int = help_field("The rank of D and U.", 8)
    shadow_alpha: float = help_field("α", 0.1)
    shadow_dropout: float = help_field("Dropout on h - s, in training.", 0.2)
    init_weights: bool = help_field("Start as the identity; False starts U at random.", True)
    shadow_model: str = help_field("mirror: a model of the base's kind; else a folder or Hub id of one.", "mirror")
    shadow_num_hidden_layers: int | None = help_field("Its layers; None: 1.", None)
    shadow_hidden_size: int | None = help_field("Its width; None: the base's.", None)
    shadow_num_attention_heads: int | None = help_field("Its attention heads; None: as the base.", None)
    shadow_intermediate_size: int | None = help_field("The width of its feed-forward parts; None: the base's.", None)
    share_embeddings: bool = help_field("It reads the base's embeddings, where it is as wide.", True)
    update_hidden_size: int | None = help_field("The width inside T and G; None: r.", None)
    auxiliary_loss_weight: float = help_field("The weight of the loss of the first shadow state by itself.", 0.05)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.SHADOW
        sizes = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
        for name in ("r", "update_hidden_size", *(f"shadow_{size}" for size in sizes)):
            if getattr(self, name) is not None:
                require_rank(getattr(self, name), name)
        own = [n for n in (f"shadow_{size}" for size in sizes) if getattr(self, n) is not None]
        if self.shadow_model != "mirror" and own:
            raise ConfigError(f"`shadow_model` names a model, which has sizes of its own: leave out {', '.join(own)}.")
        if self.task_type == "SEQ_2_SEQ_LM":
            raise ConfigError("Shadow is for models of one stack of blocks, not for an encoder and a decoder.")


class Shadow(Method):
    """D (r, dim), U (dim, r), T and G (dim, hidden) (hidden, dim) of a block; the small model is the adapter's."""

    when = "a small network beside the model that can be kept apart"
    config, prefix, mergeable, watches = ShadowConfig, "shadow_", False, True
    kinds, acts, targets = frozenset({"block"}), ("unload_shadow",), {"*": ()}

    @classmethod
    def chosen(cls, config: Any, kinds: Mapping[str, str | None]) -> list[str] | None:
        if config.target_modules != set():
            return None
        if not (found := blocks(kinds)):  # every one
            raise ConfigError("There is no one stack of blocks in the model: name some in `target_modules`.")
        config.target_modules = set(found)
        only = config.layers_to_transform
        wanted = {only} if isinstance(only, int) else set(only or found.values())
        return [p for p, i in found.items() if i in wanted and matches(config.exclude_modules, p) is None]

    @classmethod
    def share(cls, config: Any, sites: Sites) -> Leaves:
        with torch.random.fork_rng([]):  # a second adapter's layout may be taken over: starts must not depend on this
            small = beside(config, sites, sites.model)
        dim, leaves = sites[0].fan_in, {}
        for name, shape in small.shapes().items():
            leaves[f"{BACKBONE}.{name}"] = Leaf(shape, train=name not in small.frozen)  # (as it has it)
        if small.width != dim:
            leaves[PROJECTION] = Leaf((dim, small.width))  # (dim, its width)
        for name, shape in small.head(sites.model).items() if config.task_type == "SEQ_CLS" else ():
            leaves[f"{HEAD}.{name}"] = Leaf(shape)  # (as it has it)
        return leaves

    @classmethod
    def start_shared(cls, config: Any, sites: Sites, shared: Mapping[str, Tensor]) -> None:
        tensors = {name.removeprefix(f"{BACKBONE}."): tensor for name, tensor in shared.items()}
        start(beside(config, sites, sites.model), sites.model, tensors, tensors.pop(PROJECTION, None))

    @classmethod
    def leaves(cls, site: Site, config: Any, shared: Leaves) -> Leaves:
        dim, hidden = site.fan_in, config.update_hidden_size or config.r
        leaves = {
            "shadow_down.weight": Leaf((config.r, dim)),  # (r, in)
            "shadow_up.weight": Leaf((dim, config.r)),  # (in, r)
        }
        for name in ("shadow_update_transform", "shadow_update_gate"):
            leaves |= {
                f"{name}.{{}}.0.weight": Leaf((hidden, dim)),  # (hidden, in)
                f"{name}.{{}}.0.bias": Leaf((hidden,)),  # (hidden,)
                f"{name}.{{}}.2.weight": Leaf((dim, hidden)),  # (in, hidden)
                f"{name}.{{}}.2.bias": Leaf((dim,)),  # (in,)
            }
        return leaves

    def setup(self, config: Any) -> None:
        self.term: Tensor | None = None  # of the loss, of the last forward
        self.small: Any = None

    def reset(self, config: Any) -> None:
        for leaf in self.declared:
            tensor = self.tensor(leaf)
            if leaf == "shadow_up.weight" and config.init_weights:
                tensor.zero_()
            else:  # as a linear layer's
                inputs = self.tensor(leaf.replace(".bias", ".weight")).shape[1]
                tensor.uniform_(-(inputs**-0.5), inputs**-0.5)

    def around(self, run: Callable[..., Any], call: Call, *args: Any, **kwargs: Any) -> Any:
        seen = call.fact(self, "seen")
        if seen is None or "inputs" not in seen:
            raise RouteError("Shadow reads what the model is called with: call the PeftModel, not a part of it.")
        names = list(inspect.signature(self.site.layer.forward).parameters)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        h, config = given.pop(names[0]), self.options
        s = self.state(seen, h, given).to(h.dtype)
        down, up = self.shadow_down.to(h.dtype), self.shadow_up.to(h.dtype)
        h = h + config.shadow_alpha * F.linear(F.linear(call.drop(self, h - s, config.shadow_dropout), down), up)
        out = run(h, **given)
        o = hidden(out, h, given)
        g = torch.sigmoid(self.network("shadow_update_gate", o))
        seen["s"] = g * self.network("shadow_update_transform", o) + (1 - g) * s
        return out

    def network(self, name: str, x: Tensor) -> Tensor:
        """T or G of x."""
        W1, b1, W2, b2 = (getattr(self, name + part).to(x.dtype) for part in ("_0", "_0_bias", "_2", "_2_bias"))
        return F.linear(F.gelu(F.linear(x, W1, b1)), W2, b2)

    def state(self, seen: dict[str, Any], h: Tensor, given: Mapping[str, Any]) -> Tensor:
        """The shadow state that comes to this block; where its forward is repeated, that of the forward."""
        repeated = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
        states = seen.setdefault("states", {})
        if self.position == 0:
            s, term = self.first(seen, h, given)
            self.term = self.term if repeated else term
            return s
        if not repeated:
            states[self.position] = (seen["s"], torch.is_grad_enabled())
        s, graded = states[self.position]
        if repeated and not graded:
            raise RouteError("Whole blocks with a shadow are repeated by checkpointing with use_reentrant=False only.")
        return s

    def first(self, seen: dict[str, Any], h: Tensor, given: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
        """The first shadow state (rows, tokens, dim), and in training its own loss."""
        if self.small is None:
            self.small = beside(self.options, self.peers, seen["model"], inside=True)
        self.small.module.train(self.training)
        tensors = {n: p.to(h.dtype) for n, p in self.commons[BACKBONE][self.adapter].named_parameters()}
        s: Tensor = self.small.say(tensors, h, given, seen, self.site)
        W = self.projection()
        s = s if W is None else F.linear(s, W.to(s.dtype))
        weight, inputs = self.options.auxiliary_loss_weight, seen["inputs"]
        own = self.training and weight and inputs.get("labels") is not None
        loss = self.small.loss(s, self.head(), inputs, seen["model"]) if own else None
        return s, None if loss is None else weight * loss

    def projection(self) -> Tensor | None:
        """Of the small model's width to the blocks' (dim, its width), where they differ."""
        return self.shared(PROJECTION) if self.adapter in self.commons.get("shadow_projection", ()) else None

    def head(self) -> dict[str, Tensor] | None:
        """What makes labels of a state, of a classifier: weight (labels, dim), and where its own has one, bias."""
        return (
            dict(self.commons[HEAD][self.adapter].named_parameters()) if self.options.task_type == "SEQ_CLS" else None
        )

    @staticmethod
    def unload_shadow(of: Callable[..., Any], model: Any, adapter_name: str | None = None, copy: bool = False) -> Any:
        """The small model by itself: what it says of a text, or of its class, without the base.

        Args:
            adapter_name: whose; the active adapter's by default.
            copy: of tensors of its own; else they are the adapter's and, of embeddings and head, the model's.
        """
        method = of(adapter_name)[0]
        tensors = dict(method.commons[BACKBONE][method.adapter].named_parameters())
        small, own = beside(method.options, method.peers, model), deepcopy if copy else lambda part: part
        return alone(small, tensors, method.projection(), method.head(), model, own)

    @classmethod
    def penalty(cls, methods: Sequence[Any], config: Any) -> Tensor | None:
        term, methods[0].term = methods[0].term, None  # no graph is kept
        return term  # type: ignore[no-any-return]

    @classmethod
    def reported(cls, term: Tensor, config: Any) -> Mapping[str, Tensor]:
        return {"shadow_loss": term / config.auxiliary_loss_weight}
