"""Shadow (Li et al. 2026, https://arxiv.org/abs/2604.19254).   h' = h + α U D (h - s);   s' = g T(o) + (1 - g) s.

A small trained model, of the base's kind or one that is there already, reads the same tokens: what it says is the first
shadow state s. It goes along the blocks: each gets its input h drawn towards it or away, and turns it by its own output
o, with g = σ(G(o)). T and G are two linear layers with a GELU between them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.core.config import LayerConfig, PeftType, help_field
from trimtab.core.kernels import linear_cross_entropy
from trimtab.core.method import Call, Leaf, Leaves, Method, require_rank
from trimtab.core.model_method import last_tokens
from trimtab.core.site import Site
from trimtab.core.targets import blocks, matches
from trimtab.errors import ConfigError, RouteError
from trimtab.init.mirror import facts_at, facts_of, mirror, read, room

BACKBONE, PROJECTION, HEAD = "shadow_backbone", "shadow_projection.weight", "shadow_head.weight"


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
        if self.task_type not in (None, "CAUSAL_LM", "SEQ_CLS"):
            raise ConfigError(f"Shadow is for causal language models and classifiers here, not for {self.task_type}.")


class Shadow(Method):
    """D (r, dim), U (dim, r), T and G (dim, hidden) (hidden, dim) of a block; the small model is the adapter's."""

    when = "a small network beside the model that can be kept apart"
    config, prefix, mergeable, watches = ShadowConfig, "shadow_", False, True
    kinds = frozenset({"block"})
    acts = ("unload_shadow",)
    targets = {"*": ()}

    @classmethod
    def chosen(cls, config: Any, kinds: Mapping[str, str | None]) -> list[str] | None:
        if config.target_modules != set():
            return None
        found = blocks(kinds)  # every one
        config.target_modules = set(found)
        only = config.layers_to_transform
        wanted = {only} if isinstance(only, int) else set(only or found.values())
        return [p for p, i in found.items() if i in wanted and matches(config.exclude_modules, p) is None]

    @classmethod
    def share(cls, config: Any, sites: Sequence[Site]) -> Leaves:
        model, base = small(config, sites), facts_of(sites[0].layer)
        leaves = {f"{BACKBONE}.{name}": Leaf(tuple(p.shape)) for name, p in model.named_parameters()}  # (as it has it)
        name = next(n for n, m in model.named_modules() if m is model.get_input_embeddings())
        if config.shadow_model != "mirror":
            read = f"{BACKBONE}.{name}.weight"
            leaves[read] = replace(leaves[read], train=False)
        elif shares(config, base):
            del leaves[f"{BACKBONE}.{name}.weight"]
            if name != "embed_tokens":  # which PEFT leaves out of its files, and no other
                leaves[f"{BACKBONE}.{name}.weight"] = Leaf((base.vocab_size, base.hidden_size))  # (vocabulary, dim)
        if model.config.hidden_size != base.hidden_size:
            leaves[PROJECTION] = Leaf((base.hidden_size, model.config.hidden_size))  # (dim, its width)
        if config.task_type == "SEQ_CLS":
            leaves[HEAD] = Leaf((base.num_labels, base.hidden_size))  # (labels, dim)
        return leaves

    @classmethod
    def start_shared(cls, config: Any, sites: Sequence[Site], shared: Mapping[str, Tensor]) -> None:
        ready = config.shadow_model != "mirror"
        own = dict((read(config.shadow_model) if ready else small(config, sites)).named_parameters())
        for name, tensor in shared.items():
            drawn = own.get(name.removeprefix(f"{BACKBONE}."))
            if drawn is not None and drawn.shape == tensor.shape:
                tensor.copy_(drawn)
            elif name == PROJECTION:
                nn.init.kaiming_uniform_(tensor, a=5**0.5)
            else:
                tensor.normal_(std=0.02)

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
        given = {**dict(zip(inspect.signature(self.site.layer.forward).parameters, args, strict=False)), **kwargs}
        h, config = given.pop("hidden_states"), self.options
        if self.position == 0:
            seen["s"] = self.first(seen, h, given.get("past_key_values"))
        s = seen["s"].to(h.dtype)
        down, up = self.shadow_down.to(h.dtype), self.shadow_up.to(h.dtype)
        h = h + config.shadow_alpha * F.linear(F.linear(call.drop(self, h - s, config.shadow_dropout), down), up)
        out = run(h, **given)
        o = out[0] if isinstance(out, tuple) else out
        g = torch.sigmoid(self.network("shadow_update_gate", o))
        seen["s"] = g * self.network("shadow_update_transform", o) + (1 - g) * s
        return out

    def network(self, name: str, x: Tensor) -> Tensor:
        """T or G of x."""
        W1, b1, W2, b2 = (getattr(self, name + part).to(x.dtype) for part in ("_0", "_0_bias", "_2", "_2_bias"))
        return F.linear(F.gelu(F.linear(x, W1, b1)), W2, b2)

    def first(self, seen: dict[str, Any], h: Tensor, cache: Any) -> Tensor:
        """The first shadow state (rows, tokens, dim); in training its own loss is noted."""
        inputs, model, base = seen["inputs"], seen["model"], facts_of(self.site.layer)
        if self.small is None:
            self.small = small(self.options, self.peers, base.num_hidden_layers)
        given = {k: inputs[k] for k in ("attention_mask", "position_ids") if inputs.get(k) is not None}
        if shares(self.options, base):
            ready = inputs.get("inputs_embeds")
            given["inputs_embeds"] = model.get_input_embeddings()(inputs["input_ids"]) if ready is None else ready
        elif inputs.get("input_ids") is None:
            raise ConfigError("A shadow with embeddings of its own needs `input_ids`.")
        else:
            given["input_ids"] = inputs["input_ids"]
        cache = room(cache, h, self.site.layer, self.small)
        own = dict(self.commons[BACKBONE][self.adapter].named_parameters())
        tensors = {n: p.to(h.dtype) for n, p in own.items()}
        tensors |= {n: b.to(h.device) for n, b in self.small.named_buffers()}
        given |= {"past_key_values": cache, "use_cache": cache is not None}
        out = torch.func.functional_call(self.small.train(self.training), tensors, (), given)
        s: Tensor = out.last_hidden_state
        if "shadow_projection" in self.commons and self.adapter in self.commons["shadow_projection"]:
            s = F.linear(s, self.shared(PROJECTION).to(s.dtype))
        self.term = None
        if self.training and self.options.auxiliary_loss_weight and inputs.get("labels") is not None:
            if self.options.task_type == "SEQ_CLS":
                loss = class_loss(F.linear(s, self.shared(HEAD).to(s.dtype)), inputs, model)
            else:
                loss = own_loss(s, inputs, model.get_output_embeddings())
            self.term = self.options.auxiliary_loss_weight * loss
        return s

    @staticmethod
    def unload_shadow(of: Callable[..., Any], model: Any, adapter_name: str | None = None, copy: bool = False) -> Any:
        """The small model by itself: what it says of a text, or of its class, without the base.

        Args:
            adapter_name: whose; the active adapter's by default.
            copy: of tensors of its own; else they are the adapter's and, of embeddings and head, the model's.
        """
        from trimtab.init.apart import DetachedShadowModel

        method = of(adapter_name)[0]
        config, own = method.options, lambda part: deepcopy(part) if copy else part
        backbone, base = small(config, method.peers), facts_of(method.site.layer)
        for name, tensor in method.commons[BACKBONE][method.adapter].named_parameters():
            place, _, last = name.rpartition(".")
            backbone.get_submodule(place)._parameters[last] = own(tensor)
        head, projection = model.get_output_embeddings(), None
        if shares(config, base):
            backbone.set_input_embeddings(own(model.get_input_embeddings()))
            for field in ("vocab_size", "pad_token_id"):
                setattr(backbone.config, field, getattr(base, field))
        if method.adapter in method.commons.get("shadow_projection", ()):
            projection = linear_of(own(method.shared(PROJECTION)))
        if classifies := config.task_type == "SEQ_CLS":
            head = linear_of(method.shared(HEAD))
        return DetachedShadowModel(backbone.train(model.training), projection, own(head), classifies)

    @classmethod
    def penalty(cls, methods: Sequence[Any], config: Any) -> Tensor | None:
        term, methods[0].term = methods[0].term, None  # no graph is kept
        return term  # type: ignore[no-any-return]


def own_loss(s: Tensor, inputs: Mapping[str, Any], head: Any) -> Tensor:
    """The cross-entropy of what the model's head makes of s, at the places that the call has labels for."""
    kept = inputs.get("logits_to_keep", 0)
    s = s[:, kept] if isinstance(kept, Tensor) else s[:, -kept:] if kept else s
    labels = F.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
    if type(head) is nn.Linear:
        return linear_cross_entropy(s, head.weight, labels, bias=head.bias)
    return F.cross_entropy(head(s).flatten(0, 1).float(), labels.flatten())


def class_loss(logits: Tensor, inputs: Mapping[str, Any], model: Any) -> Tensor:
    """The model's own loss of logits (rows, tokens, labels), each row's at its last token that is no padding."""
    pooled = last_tokens(logits, inputs.get("input_ids"), model.config.pad_token_id)
    loss: Tensor = model.loss_function(
        logits=logits, labels=inputs["labels"], pooled_logits=pooled, config=model.config
    )
    return loss


def shares(config: Any, base: Any) -> bool:
    """Whether the small model reads the base's embeddings."""
    own = config.shadow_model != "mirror" or config.shadow_hidden_size not in (None, base.hidden_size)
    return bool(config.share_embeddings) and not own


def small(config: Any, sites: Sequence[Site], before: int = 0) -> Any:
    """The small model of a config."""
    if config.shadow_model != "mirror":
        return mirror(facts_at(config.shadow_model), {}, True, before)
    base = facts_of(sites[0].layer)
    sizes = {
        "num_hidden_layers": config.shadow_num_hidden_layers or 1,
        "hidden_size": config.shadow_hidden_size,
        "num_attention_heads": config.shadow_num_attention_heads,
        "intermediate_size" if hasattr(base, "intermediate_size") else "n_inner": config.shadow_intermediate_size,
    }
    return mirror(base, sizes, not shares(config, base), before)


def linear_of(W: Tensor) -> nn.Linear:
    """A linear layer without bias that has W (out, in) for its weight."""
    layer = nn.Linear(W.shape[1], W.shape[0], bias=False, device="meta")
    layer.weight = W  # type: ignore[assignment]
    return layer
