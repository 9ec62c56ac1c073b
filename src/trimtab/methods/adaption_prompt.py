"""LLaMA-Adapter (Zhang et al. 2023, https://arxiv.org/abs/2303.16199, eq. 2 to 8).   y' = y + g W_o softmax(q K_P) V_P.

In the top layers attention also looks at a trained prompt P, through the layer's own projections; the gate g starts
at 0. As in PEFT g is one number a layer, where the paper has tanh(g), one for each head; and GPT-2's attention gets
g softmax(q K_P) V_P itself, without W_o.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from trimtab.core.config import PeftConfig, PeftType, help_field
from trimtab.core.method import Call, Leaf, Leaves, Method, require_rank
from trimtab.core.site import Site
from trimtab.errors import ConfigError


@dataclass
class AdaptionPromptConfig(PeftConfig):
    """The configuration of prompts inside the attention of the top layers."""

    target_modules: str | None = help_field("How the path of an attention ends; by the model's type when None.", None)
    adapter_len: int | None = help_field("The number of prompt tokens in each layer.", None)
    adapter_layers: int | None = help_field("How many layers, from the top.", None)

    modules_to_save: ClassVar[None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.ADAPTION_PROMPT


class AdaptionPrompt(Method):
    """P (1, tokens, dim) and g (1,) of one attention."""

    when = "instruction following with a gate that starts shut; Llama-like attention"
    example = {"adapter_len": 10, "adapter_layers": 30}
    config, prefix, mergeable = AdaptionPromptConfig, "adaption_", False
    kinds = frozenset({"block"})
    targets = {
        "llama": "self_attn", "mistral": "self_attn", "gpt2": "attn", "qwen2": "self_attn", "qwen3": "self_attn",
    }  # fmt: skip

    @classmethod
    def chosen(cls, config: Any, kinds: Mapping[str, str | None]) -> list[str]:
        for name in ("adapter_len", "adapter_layers"):
            require_rank(getattr(config, name), name)
        found = [path for path in kinds if f".{path}".endswith(f".{config.target_modules}")]
        if len(found) < config.adapter_layers:
            raise ConfigError(
                f"Config specifies more adapter layers '{config.adapter_layers}' than the model has '{len(found)}' "
                f"(modules that end in '{config.target_modules}')."
            )
        return found[-config.adapter_layers :]

    @classmethod
    def leaves(cls, site: Site, config: Any, shared: Leaves) -> Leaves:
        if not (packed(site.layer) or (hasattr(site.layer, "q_proj") and hasattr(site.layer, "o_proj"))):
            raise ConfigError(
                f"'{site.name}' ({type(site.layer).__name__}) is no attention with q_proj, k_proj, v_proj and o_proj, "
                "nor GPT-2's with c_attn."
            )
        facts: Any = site.layer.config
        return {
            "adaption_prompt": Leaf((1, config.adapter_len, facts.hidden_size)),  # (1, tokens, dim)
            "adaption_gate": Leaf((1,)),  # (1,)
        }

    def reset(self, config: Any) -> None:
        self.adaption_prompt.normal_()
        self.adaption_gate.zero_()

    def around(self, run: Callable[..., Any], call: Call, *args: Any, **kwargs: Any) -> Any:
        out = run(*args, **kwargs)
        x = args[0] if args else kwargs["hidden_states"]
        whole = isinstance(out, tuple)
        y = out[0] if whole else out
        y = y + self.read(x, kwargs.get("position_embeddings")).to(y.dtype)
        return (y, *out[1:]) if whole else y

    def read(self, x: Tensor, turns: tuple[Tensor, Tensor] | None) -> Tensor:
        """What the prompt adds to the attention's output for the inputs x (rows, tokens, dim)."""
        attention: Any = self.site.layer
        P = self.adaption_prompt.to(x.dtype)
        if packed(attention):
            q, (_, k, v) = attention.c_attn(x).chunk(3, -1)[0], attention.c_attn(P).chunk(3, -1)
        else:
            q, k, v = attention.q_proj(x), attention.k_proj(P), attention.v_proj(P)
        q, k, v = (M.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for M in (q, k, v))
        q, k = getattr(attention, "q_norm", same)(q), getattr(attention, "k_norm", same)(k)
        if turns is not None:
            q = turned(q, *turns)
        k, v = (M.repeat_interleave(q.shape[1] // M.shape[1], 1) for M in (k, v))  # (1, heads, tokens of P, head dim)
        share = torch.softmax(q @ k.mT / attention.head_dim**0.5, -1, dtype=torch.float32).to(x.dtype)
        y = self.adaption_gate.to(x.dtype) * (share @ v).transpose(1, 2).flatten(2)
        return y if packed(attention) else attention.o_proj(y)  # type: ignore[no-any-return]


def packed(attention: Any) -> bool:
    """Whether its projections are one layer, as GPT-2's."""
    return hasattr(attention, "c_attn") and hasattr(attention, "head_dim")


def same(x: Tensor) -> Tensor:
    """x itself."""
    return x


def half_turned(x: Tensor) -> Tensor:
    """(-b, a) of features (..., (a, b)) in halves."""
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


def turned(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries (rows, heads, tokens, head dim) rotated to their positions (RoPE, halves of the features in pairs)."""
    width = cos.shape[-1]
    part, rest = q[..., :width], q[..., width:]
    return torch.cat([part * cos[:, None] + half_turned(part) * sin[:, None], rest], -1)
