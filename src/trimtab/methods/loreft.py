"""LoReFT (Wu et al. 2024, https://arxiv.org/abs/2404.03592, eq. 2).   h' = h + s Rᵀ(W h + b - R h),   R Rᵀ = I.

It edits the hidden states that a block gives (or any linear layer), at chosen tokens of the prompt: those of the first
and last positions that are no padding. In training with `labels` the prompt of a row ends where they begin; what is
generated is not edited.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.core.config import LayerConfig, PeftType, help_field
from trimtab.core.families import wide
from trimtab.core.method import Call, Leaf, Leaves, Method, no_weight, require_rank
from trimtab.core.site import Site
from trimtab.errors import ConfigError

LAYERS = "llama mistral mixtral gemma gemma2 gemma3_text qwen2 qwen3 stablelm phi opt gpt_neox nemotron_h".split()
# The layers of the residual stream.
TARGETS: dict[str, Any] = {
    **dict.fromkeys(LAYERS, r".*\.layers\.\d+"),
    **dict.fromkeys("bert roberta xlm-roberta electra layoutlm deberta deberta-v2".split(), r".*\.layer\.\d+"),
    **dict.fromkeys("gpt2 gpt_bigcode gptj gpt_neo bloom falcon".split(), r".*\.h\.\d+"),
}
EVERYWHERE = "all"


@dataclass
class LoReFTConfig(LayerConfig):
    """The configuration of LoReFT."""

    r: int = help_field("The rank of the subspace that is edited.", 4)
    positions: str = help_field('"all", or the first and last tokens of the prompt: "f7+l7", "f1", "l3".', "f7+l7")
    scaling: float = help_field("s.", 1.0)
    init_weights: bool = help_field("Start from W = R and b = 0, where nothing changes; else W random.", True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LOREFT
        if self.positions != EVERYWHERE and not re.fullmatch(r"f\d+(\+l\d+)?|l\d+", self.positions):
            raise ConfigError(
                f'`positions` should be "all" or the like of "f7+l7", "f7", "l7", not {self.positions!r}.'
            )


class LoReFT(Method):
    """A subspace R (r, d) of the hidden states, and what they are there, W h + b."""

    when = "edits of hidden states at a few positions"
    config, prefix, targets = LoReFTConfig, "loreft_", TARGETS
    kinds = fused = frozenset({"block", "linear"})
    mergeable, watches = False, True
    views = ("r", "scaling")

    @classmethod
    def leaves(cls, site: Site, config: Any, shared: Leaves) -> Leaves:
        require_rank(config.r)
        if config.r > site.fan_out:
            raise ConfigError(f"`r` ({config.r}) is more than the width of '{site.name}' ({site.fan_out}).")
        return {
            "loreft_R": Leaf((config.r, site.fan_out)),  # (r, d): R is this, its rows made orthonormal
            "loreft_W.weight": Leaf((config.r, site.fan_out)),  # (r, d)
            "loreft_W.bias": Leaf((config.r,)),  # (r,)
        }

    def setup(self, config: Any) -> None:
        self.r, self.scaling, self.unit = config.r, config.scaling, config.scaling
        self.dynamic = config.positions != EVERYWHERE

    def reset(self, config: Any) -> None:
        nn.init.orthogonal_(self.loreft_R)
        self.loreft_W.copy_(self.R())
        if not config.init_weights:
            self.loreft_W.normal_(std=self.site.fan_out**-0.5)
        self.loreft_W_bias.zero_()

    def R(self) -> Tensor:
        """Orthonormal rows (r, d)."""
        Q, triangle = torch.linalg.qr(wide(self.loreft_R).mT)
        return (Q * triangle.diagonal().sign()).mT

    @classmethod
    def facts(cls, config: Any, inputs: Mapping[str, Any], training: bool) -> dict[str, Any]:
        first = next((t for k in ("input_ids", "inputs_embeds") if (t := inputs.get(k)) is not None), None)
        if config.positions == EVERYWHERE or first is None:
            return {}
        mask, labels = inputs.get("attention_mask"), inputs.get("labels")
        shown = torch.ones(first.shape[:2], dtype=torch.bool, device=first.device)
        if mask is not None and mask.ndim == 2:
            if mask.shape != shown.shape:  # the prompt lies in a cache
                return {"edited": shown[:, :0]}
            shown = mask.bool()
        if labels is not None and inputs.get("logits_to_keep") is not None:  # labels are those of the last tokens
            labels = F.pad(labels, (shown.shape[1] - labels.shape[1], 0), value=-100)
        if labels is not None and labels.shape == shown.shape:
            shown = shown & (labels != -100).cumsum(1).eq(0)
        count = shown.cumsum(1)
        sizes = {part[0]: int(part[1:]) for part in config.positions.split("+")}
        at_start, at_end = count <= sizes.get("f", 0), count > count[:, -1:] - sizes.get("l", 0)
        return {"edited": shown & (at_start | at_end)}

    def weight(self, W: Tensor) -> Tensor:
        raise no_weight(self)

    def after(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        R = self.R().to(y.dtype)
        edit = F.linear(y, self.loreft_W.to(y.dtype) - R, self.loreft_W_bias.to(y.dtype)) @ R
        edited = call.fact(self, "edited") if self.dynamic else None
        if edited is None:
            return y + self.scaling * edit
        if y.ndim < 3:
            return y
        known, given = edited.shape[1], y.shape[1]
        begin = call.begins(self, known, given)
        if begin >= known:  # what follows the prompt
            return y
        edited = F.pad(edited, (0, given))[:, begin : begin + given]
        edited = edited.repeat_interleave(len(y) // len(edited), 0)  # beams
        return y + self.scaling * edit * edited[..., None].to(y.dtype)
