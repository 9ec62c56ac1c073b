"""Prompts in front of the model: how one enters a forward pass, and how `generate` starts from it.

For generation the prompt is run (or written) into the cache first; its places in the ids are filled with tokens that
are cut off again, so that the generation loop itself needs no change.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.method import Call
from trimtab.core.model_method import Mixture, ModelMethod, PromptMethod
from trimtab.errors import ConfigError
from trimtab.graft.adapters import Adapter

Inputs = dict[str, Any]
ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")  # generation that guesses
WIDTHS = ("hidden_size", "n_embd", "d_model")  # what configs call the size of hidden states


def started(
    method: type[ModelMethod], config: Any, model: nn.Module, others: Mapping[str, Adapter] = MappingProxyType({})
) -> ModelMethod:
    """A method of the model, started as the config says.

    Args:
        others: the model's adapters.
    """
    if issubclass(method, PromptMethod):
        complete(config, model, method.cached)
        if method.cached and not config.inference_mode:
            require_cache(config, model)
    made = method()
    if isinstance(made, Mixture):
        facts = getattr(model, "config", None)
        facts = getattr(facts, "text_config", None) or facts
        made.width = next((v for n in WIDTHS if (v := getattr(facts, n, None)) is not None), None)
        made.sites = weighed([others[n] for n in method.among(config)], model)  # type: ignore[attr-defined]
    made.build(config)
    with torch.no_grad():
        made.reset(config, model)
    return made.to(model.get_input_embeddings().weight.device)  # type: ignore[operator]


def require_cache(config: Any, model: Any) -> None:
    """Raise where layers are run again in the backward pass: they get no cache then, which is where a prefix is."""
    if getattr(model, "is_gradient_checkpointing", False):
        raise ConfigError(
            f"{config.peft_type.value} does not work with gradient checkpointing. Its prompt is in the cache, which "
            "checkpointed layers are not given: call `gradient_checkpointing_disable()`."
        )


def weighed(adapters: Sequence[Adapter], model: nn.Module) -> tuple[str, ...]:
    """The paths of the layers that adapters have, in the model's order.

    Raises:
        ConfigError: what they do at a layer cannot be weighed for each token.
    """
    methods = {p.method.site.name: p.method for a in adapters for p in a.layout.places}
    wrong = [p.method for a in adapters for p in a.layout.places if not p.method.weighed]
    if wrong or any(a.prompt or a.saved for a in adapters):
        said = f": '{wrong[0].site.name}' has {type(wrong[0]).__name__}" if wrong else ""
        raise ConfigError(f"A router among adapters takes plain LoRA of linear layers and embeddings only{said}.")
    order = {id(module): i for i, module in enumerate(model.modules())}
    return tuple(sorted(methods, key=lambda path: order[id(methods[path].layer)]))


def complete(config: Any, model: Any, cached: bool) -> None:
    """Fill the fields of a prompt's config that come from the model.

    Raises:
        ConfigError: the model's config does not tell them, or the number of virtual tokens is missing.
    """
    if not config.num_virtual_tokens or config.num_virtual_tokens < 0:
        raise ConfigError(f"`num_virtual_tokens` should be a positive number, not {config.num_virtual_tokens}.")
    facts = getattr(model, "config", None)
    facts = getattr(facts, "text_config", None) or facts

    def fact(field: str, *names: str) -> int:
        value = getattr(config, field)
        if value is None:
            value = next((v for n in names if (v := getattr(facts, n, None)) is not None), None)
        if value is None:
            raise ConfigError(f"Please specify `{field}` in `peft_config`: the model's config does not tell it.")
        return int(value)

    config.num_layers = fact("num_layers", "num_hidden_layers", "num_layers", "n_layer")
    config.token_dim = fact("token_dim", *WIDTHS)
    config.num_attention_heads = fact(
        "num_attention_heads", "num_attention_heads", "n_head", "num_heads", "encoder_attention_heads"
    )
    kv_heads = getattr(facts, "num_key_value_heads", None)
    if cached and isinstance(kv_heads, int):  # what is given may be the model's; a prefix has the cache's
        width = getattr(facts, "head_dim", None) or config.token_dim // config.num_attention_heads
        config.num_attention_heads, config.token_dim = kv_heads, width * kv_heads
    if config.num_transformer_submodules is None:
        config.num_transformer_submodules = 2 if config.task_type == "SEQ_2_SEQ_LM" else 1
    if getattr(config, "encoder_hidden_size", 0) is None:
        config.encoder_hidden_size = config.token_dim


def enter(method: PromptMethod, config: Any, base: Any, inputs: Inputs, call: Call) -> Inputs:
    """A forward call's inputs with the prompt in front."""
    inputs = dict(inputs)
    count, decodes = config.num_virtual_tokens, bool(getattr(base.config, "is_encoder_decoder", False))
    if method.cached or not decodes:  # else the prompt is the encoder's, and the cache the decoder's
        _refuse_tokens(inputs)
    rows, device = _shape(inputs, *(("decoder_input_ids",) if decodes and method.cached else ()))
    if method.cached:
        if base.training:
            require_cache(config, base)
        inputs["past_key_values"] = prefilled(method.prompt(call), config, base, rows)
        _extend(inputs, "decoder_attention_mask" if decodes else "attention_mask", count, 1)
        if inputs.get("position_ids") is not None:  # as the model itself counts on from a cache
            inputs["position_ids"] = inputs["position_ids"] + count
        return inputs
    tokens = inputs.pop("input_ids", None)
    embeds = inputs.get("inputs_embeds")
    if embeds is None:
        embeds = base.get_input_embeddings()(tokens)
    prompt = method.prompt(call)[..., :count, :].to(embeds)
    inputs["inputs_embeds"] = torch.cat([prompt.expand(rows, -1, -1), embeds], 1)
    _extend(inputs, "attention_mask", count, 1)
    _extend(inputs, "token_type_ids", count, 0)
    labels = inputs.get("labels")
    if not decodes and isinstance(labels, Tensor) and labels.shape == embeds.shape[:2]:
        _extend(inputs, "labels", count, -100)
    places = inputs.get("position_ids")
    if places is not None:
        ahead = torch.arange(count, device=device) + places.amin(1, keepdim=True)  # some models count from 2
        inputs["position_ids"] = torch.cat([ahead, places + count], 1)
    return inputs


def prepared(method: PromptMethod, config: Any, base: Any, args: Sequence[Any], kwargs: Inputs, call: Call) -> Inputs:
    """What `base` prepares for the next pass of a generation; the prompt is in it until the cache has it."""
    inputs: Inputs = base.prepare_inputs_for_generation(*args, **kwargs)
    decodes, cache = bool(getattr(base.config, "is_encoder_decoder", False)), inputs.get("past_key_values")
    if decodes and not method.cached:  # the encoder has had it
        return inputs
    held = 0 if cache is None else cache.get_seq_length()
    if not held:
        return ({} if method.cached else {"input_ids": None}) | enter(method, config, base, inputs, call)
    count = config.num_virtual_tokens
    _extend(inputs, "decoder_attention_mask" if decodes else "attention_mask", count, 1)
    if inputs.get("position_ids") is not None:
        inputs["position_ids"] = inputs["position_ids"] + count
    if kwargs.get("next_sequence_length") is None:  # else the model has taken the new tokens
        for name in ("decoder_input_ids",) if decodes else ("input_ids", "position_ids"):
            if inputs.get(name) is not None:
                inputs[name] = inputs[name][:, min(held - count, inputs[name].shape[1] - 1) :]
    return inputs


def generate(method: PromptMethod, config: Any, base: Any, args: Sequence[Any], kwargs: Inputs, call: Call) -> Any:
    """`base.generate` from the prompt on; the ids returned are those of a call without prompt."""
    inputs = dict(kwargs)
    if args:
        inputs["input_ids"] = args[0]
        args = args[1:]
    if "inputs" in inputs:
        inputs["input_ids"] = inputs.pop("inputs")
    decodes, count = bool(getattr(base.config, "is_encoder_decoder", False)), config.num_virtual_tokens
    settings = inputs.get("generation_config") or base.generation_config
    if not decodes and inputs.get("input_ids") is None and inputs.get("inputs_embeds") is None:
        inputs["input_ids"] = _begin(inputs, settings, base, call)
    if not method.cached and (decodes or inputs.get("input_ids") is None):
        rows, device = _shape(inputs)
        ids: Any = inputs.get("input_ids", inputs.get("inputs_embeds"))
        inputs.setdefault("attention_mask", torch.ones(ids.shape[:2], dtype=torch.long, device=device))
        return base.generate(*args, **enter(method, config, base, inputs, call))
    field, mask = ("decoder_input_ids", "decoder_attention_mask") if decodes else ("input_ids", "attention_mask")
    _refuse(inputs, settings)
    rows, device = _shape(inputs)
    embedded = not decodes and inputs.get(field) is None
    if embedded:
        field = "inputs_embeds"
    elif inputs.get(field) is None:  # a decoder starts from its start token
        start = settings.decoder_start_token_id
        start = base.config.decoder_start_token_id if start is None else start
        inputs[field] = torch.full((rows, 1), start, dtype=torch.long, device=device)
    ids = inputs[field]
    if inputs.get(mask) is None:
        inputs[mask] = torch.ones(ids.shape[:2], dtype=torch.long, device=device)
    # Places of the prompt hold a token the row has anyway, so that processors that look at the ids see nothing new.
    inputs[field] = torch.cat([ids[:, -1:].expand(-1, count, *ids.shape[2:]), ids], 1)
    _extend(inputs, mask, count, 1)
    copies = max(_setting("num_beams", inputs, settings), _setting("num_return_sequences", inputs, settings))
    inputs["past_key_values"] = _cache(method, config, base, rows * copies, call)
    inputs["use_cache"] = True  # the prompt is nowhere else
    for name in ("max_length", "min_length"):
        if inputs.get(name) is not None:
            inputs[name] += count
    if inputs.get("generation_config") is not None and inputs["generation_config"].max_new_tokens is None:
        inputs["generation_config"] = changed = copy.deepcopy(inputs["generation_config"])
        if changed.max_length is not None:
            changed.max_length += count
    elif (
        "max_length" not in inputs
        and "max_new_tokens" not in inputs
        and settings.max_new_tokens is None
        and settings.max_length
    ):
        inputs["max_length"] = settings.max_length + count
    out = base.generate(*args, **inputs)
    if embedded:  # what is returned is new altogether
        return out
    if isinstance(out, Tensor):
        return out[:, count:]
    out.sequences = out.sequences[:, count:]
    return out


def _refuse_tokens(inputs: Inputs) -> None:
    """Raise for a cache with tokens in it: the prompt stands before them, and none can be put behind."""
    given = inputs.get("past_key_values")
    if given is not None and getattr(given, "get_seq_length", lambda: 1)():
        raise ValueError(
            "The prompt comes first in the cache: `past_key_values` with tokens in it cannot be passed as well. Use "
            "generate(), or go on by `prepare_inputs_for_generation` and the base model."
        )


def _refuse(inputs: Inputs, settings: Any) -> None:
    """Raise for what cannot go on from a cache that holds the prompt already."""
    _refuse_tokens(inputs)
    for name in ASSISTED:
        if inputs.get(name) is not None or getattr(settings, name, None) is not None:
            raise ValueError(
                f"`{name}` does not work with a prompt: assisted generation takes a cache with tokens in it for an "
                "empty one. Generate without it."
            )


def prefilled(prompt: Tensor, config: Any, base: Any, rows: int) -> Any:
    """A cache of keys and values (n, layers · 2 · heads · head dim) for `rows` rows."""
    from transformers import DynamicCache, EncoderDecoderCache

    shape = (2 * config.num_layers, config.num_attention_heads, -1)
    pairs = prompt.unflatten(1, shape).permute(1, 2, 0, 3)[:, None].expand(-1, rows, -1, -1, -1).to(base.dtype)
    decodes = getattr(base.config, "is_encoder_decoder", False)
    cache = DynamicCache() if decodes else DynamicCache(config=base.config)
    # Where encoder and decoder both count as submodules, PEFT deals four entries a layer out of the prompt repeated
    # twice: two for self-attention, two for the cross-attention that ignores them. Adapters are trained with that.
    each = 2 * config.num_transformer_submodules
    held = len(cache.layers) or config.num_layers  # a config for a deeper model has more
    for layer in range(min(config.num_layers, held)):
        first = each * layer % len(pairs)
        cache.update(pairs[first], pairs[first + 1], layer)
    return EncoderDecoderCache(cache, DynamicCache()) if decodes else cache


@torch.no_grad()
def _cache(method: PromptMethod, config: Any, base: Any, rows: int, call: Call) -> Any:
    """The cache after the prompt: written for a prefix, computed for a prompt of embeddings."""
    if method.cached:
        return prefilled(method.prompt(call), config, base, rows)
    embeds = method.prompt(call)[..., : config.num_virtual_tokens, :].to(base.get_input_embeddings().weight.dtype)
    embeds = embeds if embeds.ndim == 3 else embeds[None]  # (rows with prompts of their own or 1, n, dim)
    cache = base(inputs_embeds=embeds, use_cache=True).past_key_values
    if rows > len(embeds):
        cache.batch_repeat_interleave(rows // len(embeds))
    return cache


def _setting(name: str, inputs: Inputs, settings: Any) -> int:
    value = inputs.get(name)
    return int((getattr(settings, name, None) if value is None else value) or 1)


def _begin(inputs: Inputs, settings: Any, base: Any, call: Call) -> Tensor:
    """The token (rows, 1) that a generation without inputs starts from."""
    token = inputs.get("bos_token_id", settings.bos_token_id)
    if token is None:
        raise ValueError("`bos_token_id` has to be defined when no `input_ids` are provided.")
    tensors = [v for v in (*inputs.values(), *call.extras.values()) if isinstance(v, Tensor) and v.ndim]
    return torch.full((len(tensors[0]) if tensors else 1, 1), token, dtype=torch.long, device=base.device)


def _shape(inputs: Inputs, *others: str) -> tuple[int, torch.device]:
    given = next((inputs[n] for n in ("input_ids", "inputs_embeds", *others) if inputs.get(n) is not None), None)
    if given is None:
        raise ValueError(
            "input_ids must be provided for Peft model generation: a prompt stands in front of them, or of "
            "`inputs_embeds`."
        )
    return len(given), given.device


def _extend(inputs: Inputs, name: str, count: int, value: int) -> None:
    """Put `count` times `value` in front of each row of an input, where it was given."""
    given = inputs.get(name)
    if given is not None:
        inputs[name] = torch.cat([given.new_full((len(given), count), value), given], 1)
