"""aLoRA (Greenewald et al. 2025, https://arxiv.org/abs/2504.12397, eq. 3).   W' = W + s B A from the invocation on.

Tokens before the last occurrence of the invocation tokens are the base model's, so that its cache of them can be used;
rows without an invocation are the base model's altogether.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trimtab.core.families import LowRank
from trimtab.core.method import Call, Leaves, no_weight
from trimtab.core.site import Site
from trimtab.errors import ConfigError, RouteError
from trimtab.init import mutates, start


def invoked(ids: Tensor, tokens: Tensor) -> Tensor:
    """How many tokens at the end of each row (rows, tokens) the adapter acts on: (rows,), 0 without an invocation."""
    n, length = len(tokens), ids.shape[1]
    if n > length:
        return torch.zeros(len(ids), dtype=torch.long, device=ids.device)
    found = (ids.unfold(1, n, 1) == tokens.to(ids.device)).all(-1)  # (rows, starts)
    count = length - torch.arange(found.shape[1], device=ids.device)
    last = torch.where(found, count, length + 1).amin(1)
    return torch.where(found.any(1), last, 0)


class ALora(LowRank):
    """A low-rank change of what comes after its invocation."""

    when = "adapters invoked in a conversation that keep the base's cache"
    example = {"alora_invocation_tokens": [1]}
    prefix, watches, told = "lora_", True, ("alora_offsets",)
    kinds = fused = frozenset({"linear"})
    mergeable = False

    @classmethod
    def leaves(cls, site: Site, config: Any, shared: Leaves) -> Leaves:
        if mutates(config.init_lora_weights):
            raise ConfigError(f"aLoRA does not go with init_lora_weights={config.init_lora_weights!r}.")
        return cls.pair(site, config.r, config.lora_bias)

    def setup(self, config: Any) -> None:
        self.scale(config.r, config.lora_alpha, config.scaling(), config.lora_dropout)

    def reset(self, config: Any) -> Tensor | None:
        return start(config.init_lora_weights, self)

    @classmethod
    def facts(cls, config: Any, inputs: Mapping[str, Any], training: bool) -> dict[str, Any]:
        ids = inputs.get("input_ids")
        if ids is None:  # models of other kinds call their tokens otherwise
            given = [v for v in inputs.values() if isinstance(v, Tensor) and v.ndim == 2 and not v.is_floating_point()]
            ids = given[0] if given else None
        if ids is None:
            raise ConfigError("aLoRA finds its invocation among token ids: `input_ids` is needed.")
        return {"invoked": invoked(ids, torch.tensor(config.alora_invocation_tokens)), "length": ids.shape[1]}

    def weight(self, W: Tensor) -> Tensor:
        raise no_weight(self)

    def after(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        count, known = call.fact(self, "invoked"), call.fact(self, "length")
        if (offsets := call.extras.get("alora_offsets")) is not None:  # a hook says it, of the tokens of this pass
            count, known = torch.tensor([n or 0 for n in offsets]), None
        h, B = self.update(call.drop(self, x, self.dropout))
        if count is None:  # the layer is called by itself
            return self.site.add(y, h, B, shift=self.shift)
        if h.ndim != 3 or len(h) % len(count):
            raise RouteError(f"aLoRA at '{self.site.name}' sees an input {list(x.shape)} whose tokens cannot be told.")
        count = count.repeat_interleave(len(h) // len(count))  # beams
        given = h.shape[1]
        begin, known = (0, given) if known is None else (call.begins(self, known, given), known)
        places = torch.arange(given, device=h.device) + begin
        count = count[:, None].to(h.device)
        acts = ((count > 0) & (places >= known - count))[..., None].to(h.dtype)
        y = self.site.add(y, h * acts, B)
        return y if self.shift is None else y + (acts * self.shift).to(y.dtype)
