"""A small model of a base model's kind beside it: built from the base's config, with room in the base's cache."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from trimtab.core.kernels import linear_cross_entropy
from trimtab.core.model_method import last_tokens
from trimtab.core.site import Site
from trimtab.errors import ConfigError, RouteError


def facts_of(block: nn.Module) -> Any:
    """The config of a model of transformers, as the attention in one of its blocks holds it; None of another block."""
    configs = (getattr(module, "config", None) for module in block.modules())
    return next((config for config in configs if hasattr(config, "num_hidden_layers")), None)


def facts_at(model_id: str) -> Any:
    """The config of a model in a folder or on the Hub.

    Raises:
        ConfigError: there is none.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model_id)
    except (OSError, ValueError) as error:
        raise ConfigError(f"There is no model at '{model_id}': {error}") from error


def read(model_id: str) -> Any:
    """A model from a folder or the Hub, without its head and in fp32."""
    from transformers import AutoModel

    return AutoModel.from_pretrained(model_id, dtype=torch.float32)


def mirror(base: Any, sizes: Mapping[str, int | None], embeddings: bool = True, before: int = 0) -> Any:
    """A model of the kind of a config `base`, with numbers of its own and in fp32.

    Args:
        sizes: fields of its config that differ; None leaves one.
        embeddings: False where its own are never read: it has one row of them.
        before: its layers are counted from there on.
    """
    from transformers import AutoModel

    config = copy.deepcopy(base)
    for name, value in sizes.items():
        if value is not None:
            setattr(config, name, value)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    if not embeddings:
        config.vocab_size, config.pad_token_id = 1, None
    try:
        made = AutoModel.from_config(config, dtype=torch.float32)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"There is no small model of these sizes: {error}") from error
    for module in made.modules():
        if isinstance(getattr(module, "layer_idx", None), int):
            module.layer_idx += before
    return made


def room(cache: Any, h: Tensor, block: nn.Module, small: Any) -> Any:
    """The base's cache with room for the layers of the small model behind its own; None where there is none."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    if cache is None:
        return None
    at_start = any(getattr(m, "layer_idx", None) == 0 for m in block.modules())
    if isinstance(cache, DynamicCache) and at_start:
        last = max(m.layer_idx for m in small.modules() if isinstance(getattr(m, "layer_idx", None), int))
        cache.layers += [DynamicLayer() for _ in range(last + 1 - len(cache.layers))]
        return cache
    if cache.get_seq_length() > (0 if at_start else h.shape[1]):
        raise RouteError("A shadow that starts above the first block, or beside such a cache, needs use_cache=False.")
    return None


class Mirror:
    """A small model of transformers beside another one.

    Args:
        block: a block of the other.
        inside: its layers are counted after the other's, in whose cache they have room.
    """

    project = staticmethod(partial(nn.init.kaiming_uniform_, a=5**0.5))

    def __init__(self, config: Any, block: nn.Module, inside: bool = False) -> None:
        base = self.base = facts_of(block)
        before = base.num_hidden_layers if inside else 0
        self.task = config.task_type
        self.ready = None if config.shadow_model == "mirror" else config.shadow_model
        as_wide = self.ready is None and config.shadow_hidden_size in (None, base.hidden_size)
        self.shares = bool(config.share_embeddings) and as_wide  # it reads the base's embeddings
        sizes = {
            "num_hidden_layers": config.shadow_num_hidden_layers or 1,
            "hidden_size": config.shadow_hidden_size,
            "num_attention_heads": config.shadow_num_attention_heads,
            "intermediate_size" if hasattr(base, "intermediate_size") else "n_inner": config.shadow_intermediate_size,
        }
        found = (base, sizes, not self.shares) if self.ready is None else (facts_at(self.ready), {}, True)
        self.module = mirror(*found, before)
        self.width: int = self.module.config.hidden_size
        read = self.module.get_input_embeddings()
        self.reads = next(f"{n}.weight" for n, m in self.module.named_modules() if m is read)
        self.frozen = frozenset() if self.ready is None else frozenset({self.reads})

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of its parameters, by name."""
        found = {name: tuple(p.shape) for name, p in self.module.named_parameters()}
        if self.shares and self.reads == "embed_tokens.weight":  # which PEFT leaves out of its files, and no other
            del found[self.reads]
        elif self.shares:
            found[self.reads] = (self.base.vocab_size, self.base.hidden_size)
        return found

    def values(self, model: nn.Module) -> dict[str, Tensor]:
        """What they start from."""
        return dict((self.module if self.ready is None else read(self.ready)).named_parameters())

    def say(
        self, tensors: Mapping[str, Tensor], h: Tensor, given: Mapping[str, Any], seen: Mapping[str, Any], site: Site
    ) -> Tensor:
        """Its last hidden states (rows, tokens, width), of the tokens that the base is given."""
        inputs = seen["inputs"]
        called = {k: inputs[k] for k in ("attention_mask", "position_ids") if inputs.get(k) is not None}
        ids, embedded = inputs.get("input_ids"), inputs.get("inputs_embeds")
        if ids is None and not (self.shares and embedded is not None):
            raise ConfigError("A shadow with embeddings of its own needs `input_ids`.")
        if self.shares:
            called["inputs_embeds"] = seen["model"].get_input_embeddings()(ids) if embedded is None else embedded
        else:
            called["input_ids"] = ids
        cache = room(given.get("past_key_values"), h, site.layer, self.module)
        called |= {"past_key_values": cache, "use_cache": cache is not None}
        moved = {name: buffer.to(h.device) for name, buffer in self.module.named_buffers()}
        said: Tensor = functional_call(self.module, {**tensors, **moved}, (), called).last_hidden_state
        return said

    def head(self, model: nn.Module) -> dict[str, tuple[int, ...]]:
        """Shapes of the head of a classifier, as the base model has one: a linear layer, with a bias or without.

        Raises:
            ConfigError: its own is another.
        """
        whole = next((h for name in ("score", "classifier") if (h := getattr(model, name, None)) is not None), None)
        whole = getattr(whole, "original_module", whole)  # below a copy that an adapter trains
        if not isinstance(whole, nn.Linear):
            raise ConfigError(f"{type(model).__name__} has no one linear layer for its head: leave out `task_type`.")
        shapes = {"weight": (self.base.num_labels, self.base.hidden_size), "bias": (self.base.num_labels,)}
        return shapes if whole.bias is not None else {"weight": shapes["weight"]}

    def loss(
        self, s: Tensor, head: Mapping[str, Tensor] | None, inputs: Mapping[str, Any], model: Any
    ) -> Tensor | None:
        """The loss of what a head makes of s, of the labels that the model is called with.

        Args:
            head: of a classifier, its weight (labels, dim) and bias (labels,); else None, and the model's.
        """
        if self.task not in ("CAUSAL_LM", "SEQ_CLS"):
            return None
        if head is not None:
            return class_loss(F.linear(s, *(tensor.to(s.dtype) for tensor in head.values())), inputs, model)
        whole = model.get_output_embeddings()
        return None if whole is None else own_loss(s, inputs, whole)

    def parts(
        self,
        tensors: Mapping[str, Tensor],
        projection: Tensor | None,
        head: Mapping[str, Tensor] | None,
        model: Any,
        own: Any,
    ) -> tuple[Any, ...]:
        """What it is made of by itself, with its parameters: `apart.py` puts it together.

        Args:
            head: of a classifier, its weight (labels, dim) and bias (labels,); else None, and the model's.
            own: what a tensor or module that it gets is to be, of the one that there is.
        """
        for name, tensor in tensors.items():
            place, _, last = name.rpartition(".")
            self.module.get_submodule(place)._parameters[last] = own(tensor)
        if self.shares:
            self.module.set_input_embeddings(own(model.get_input_embeddings()))
            for field in ("vocab_size", "pad_token_id"):
                setattr(self.module.config, field, getattr(self.base, field))
        whole = (
            own(model.get_output_embeddings()) if head is None else linear_of(**{k: own(t) for k, t in head.items()})
        )
        projected = None if projection is None else linear_of(own(projection))
        return self.module.train(model.training), projected, whole, head is not None


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


def linear_of(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A linear layer of these (out, in), (out,)."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight, layer._parameters["bias"] = weight, bias  # type: ignore[assignment]
    return layer
