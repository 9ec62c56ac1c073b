"""Bottleneck adapters (Houlsby et al. 2019, https://arxiv.org/abs/1902.00751).   y' = y + s (U f(D h + d) + u).

Serial (h = y): after attention and feed-forward part (Houlsby, section 2.1), or after the latter alone (Pfeiffer et al.
2020, https://arxiv.org/abs/2005.00247, section 4: name that layer only in `target_modules`). Parallel (h = x: He et al.
2021, https://arxiv.org/abs/2110.04366, section 3.3): with `parallel=True` on a whole block, `target_modules=["mlp"]`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.core.config import LayerConfig, PeftType, help_field
from trimtab.core.method import Call, Leaf, Leaves, Method, no_weight, require_rank
from trimtab.core.site import Site

# The layers that end a block's attention and its feed-forward part.
TARGETS: dict[str, Any] = {
    **dict.fromkeys("llama mistral gemma gemma2 gemma3_text qwen2 qwen3 stablelm".split(), ("o_proj", "down_proj")),
    **dict.fromkeys("bert roberta xlm-roberta electra layoutlm".split(), r".*\.output\.dense"),
    **dict.fromkeys(["t5", "mt5"], ("o", "wo")),
    **dict.fromkeys(["bart", "opt"], ("out_proj", "fc2")),
    "gpt2": ["attn.c_proj", "mlp.c_proj"],
    "gptj": ["out_proj", "fc_out"],
    "gpt_neox": ["attention.dense", "dense_4h_to_h"],
    "phi": ["dense", "fc2"],
}


@dataclass
class BottleneckConfig(LayerConfig):
    """The configuration of bottleneck adapters."""

    r: int = help_field("The width of the bottleneck.", 64)
    non_linearity: Literal["relu", "gelu", "silu", "tanh"] = help_field("f.", "relu")
    parallel: bool = help_field("Read the layer's input instead of its output (He et al. 2022).", False)
    scaling: float = help_field("s; He et al. take 4 for parallel ones.", 1.0)
    init_weights: bool = help_field("Start from U = 0, where nothing changes; else random.", True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.BOTTLENECK


class Bottleneck(Method):
    """A network of two small layers beside or behind a frozen one."""

    when = "the classic: a small network after or beside a part; not merged"
    config, prefix, targets = BottleneckConfig, "bottleneck_", TARGETS
    kinds = fused = frozenset({"linear", "block"})
    mergeable = False
    views = ("r", "scaling")

    @classmethod
    def leaves(cls, site: Site, config: Any, shared: Leaves) -> Leaves:
        require_rank(config.r)
        width = site.fan_in if config.parallel else site.fan_out
        return {
            "bottleneck_D.weight": Leaf((config.r, width)),  # (r, in) or (r, out)
            "bottleneck_D.bias": Leaf((config.r,)),  # (r,)
            "bottleneck_U.weight": Leaf((site.fan_out, config.r)),  # (out, r)
            "bottleneck_U.bias": Leaf((site.fan_out,)),  # (out,)
        }

    def setup(self, config: Any) -> None:
        self.r, self.scaling, self.unit = config.r, config.scaling, config.scaling
        self.f = getattr(F, config.non_linearity)

    def reset(self, config: Any) -> None:
        nn.init.kaiming_uniform_(self.bottleneck_D, a=math.sqrt(5))
        if config.init_weights:
            self.bottleneck_U.zero_()
        else:
            nn.init.kaiming_uniform_(self.bottleneck_U, a=math.sqrt(5))
        self.bottleneck_D_bias.zero_()
        self.bottleneck_U_bias.zero_()

    def weight(self, W: Tensor) -> Tensor:
        raise no_weight(self)

    def after(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        h = x if self.options.parallel else y
        z = self.f(F.linear(h, self.bottleneck_D.to(h.dtype), self.bottleneck_D_bias.to(h.dtype)))
        return y + self.scaling * F.linear(z, self.bottleneck_U.to(h.dtype), self.bottleneck_U_bias.to(h.dtype))
