"""Prefixes in the cache: started from what a model made of a text, and joined."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.core.config import PeftConfig
from trimtab.core.model_method import PROMPT
from trimtab.errors import AdapterFileError, ArgumentError, ConfigError
from trimtab.files import store


def prompt_embeddings_from_past_key_values(past_key_values: Any, *, num_virtual_tokens: int) -> Tensor:
    """The first tokens of a cache, as a prefix has them: (tokens, layers · 2 · heads · head dim).

    Raises:
        ValueError: the cache has fewer tokens.
    """
    cache = getattr(past_key_values, "self_attention_cache", past_key_values)
    pairs = [(x.keys, x.values) for x in cache.layers] if hasattr(cache, "layers") else [x[:2] for x in cache]
    held = pairs[0][0].shape[-2]
    if held < num_virtual_tokens:
        raise ArgumentError(f"Need at least {num_virtual_tokens} cached tokens, got {held}.")
    # (layers · 2, heads, tokens, head dim) of the first row
    parts = torch.stack([t[0, :, :num_virtual_tokens].detach() for pair in pairs for t in pair])
    return parts.permute(2, 0, 1, 3).flatten(1)


def initialize_kv_prefix_from_past_key_values(
    model: Any, *, adapter_name: str | None = None, past_key_values: Any, num_virtual_tokens: int | None = None
) -> Tensor:
    """Start an adapter that is a prefix (the active one by default) from the first tokens of a cache.

    Raises:
        ValueError: the adapter is no prefix, comes out of a network, or has more tokens than the cache.
    """
    name = adapter_name or model.active_adapters[0]
    adapter = model.graft.require(name)
    method: Any = adapter.prompt
    if not getattr(method, "cached", False):
        raise ArgumentError(
            f"Adapter '{name}' must be a CARTRIDGE or PREFIX_TUNING adapter (got {adapter.config.peft_type})."
        )
    if getattr(method, "projected", False):
        raise ArgumentError(
            "Initialization from KV cache is not supported for prefix tuning with `prefix_projection=True`."
        )
    count = adapter.config.num_virtual_tokens
    if num_virtual_tokens not in (None, count):
        raise ArgumentError(f"The adapter has {count} virtual tokens, not {num_virtual_tokens}.")
    prompt = prompt_embeddings_from_past_key_values(past_key_values, num_virtual_tokens=count)
    method.restore(PROMPT, prompt)
    return prompt


@torch.no_grad()
def initialize_kv_prefix_from_text(
    model: Any,
    tokenizer: Any,
    *,
    text: str,
    adapter_name: str | None = None,
    num_virtual_tokens: int | None = None,
    use_chat_template: bool = True,
    max_length: int | None = None,
) -> Tensor:
    """Start an adapter that is a prefix from the keys and values of a text's first tokens.

    Args:
        text: what the prefix is to know; it needs at least as many tokens as the prefix has.
        use_chat_template: the text is a conversation's system message; else it stands as it is.
        max_length: read only so many tokens of the text.
    """
    if use_chat_template:
        messages = [{"role": "system", "content": text}]
        asked = {"tokenize": True, "add_generation_prompt": False, "return_dict": False, "return_tensors": "pt"}
        ids = tokenizer.apply_chat_template(messages, **asked)
    else:
        ids = tokenizer(text, return_tensors="pt", truncation=max_length is not None, max_length=max_length)
        ids = ids["input_ids"]
    ids = ids[:, :max_length].to(model.get_input_embeddings().weight.device)
    with model.disable_adapter():
        cache = model.get_base_model()(input_ids=ids, use_cache=True).past_key_values
    return initialize_kv_prefix_from_past_key_values(
        model, adapter_name=adapter_name, past_key_values=cache, num_virtual_tokens=num_virtual_tokens
    )


def compose_cartridge_adapters(
    adapter_paths: Sequence[str | os.PathLike[str]],
    *,
    output_path: str | os.PathLike[str],
    safe_serialization: bool = True,
) -> None:
    """Join saved cartridges, one behind the other, into one that knows what each of them knew.

    Raises:
        ValueError: there are fewer than two, they are no cartridges, or of models of other sizes.
    """
    if len(adapter_paths) < 2:
        raise ArgumentError("Need at least 2 adapters to compose.")
    configs: list[Any] = [PeftConfig.from_pretrained(path) for path in adapter_paths]
    others = [str(p) for p, c in zip(adapter_paths, configs) if c.peft_type != configs[0].peft_type]
    if others or not hasattr(configs[0], "num_frozen_tokens"):
        raise ConfigError(f"Only cartridges can be joined: {', '.join(others or map(str, adapter_paths))} is none.")
    prompts = [store.load_peft_weights(str(path), device="cpu")[PROMPT] for path in adapter_paths]
    if len({p.shape[1] for p in prompts}) > 1:
        raise AdapterFileError(f"The cartridges are of models of other sizes: {[tuple(p.shape) for p in prompts]}.")
    config = configs[0].copy()
    config.num_virtual_tokens = sum(map(len, prompts))
    store.save(store.writers(Path(output_path), config, {PROMPT: torch.cat(prompts)}, safe_serialization, None))
