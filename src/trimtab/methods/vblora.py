"""VB-LoRA (Li et al. 2024, https://arxiv.org/abs/2405.15179, section 3).   W' = W + B A, pieced together from a bank.

Every piece of a row of A and of a column of B is a sum of the k vectors of one shared bank with the largest logits,
weighed by the softmax of those.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.architectures import ATTENTION
from trimtab.core.config import LayerConfig, PeftType, help_field
from trimtab.core.families import wide
from trimtab.core.method import Call, Leaf, Leaves, Method, require_rank
from trimtab.core.site import Site
from trimtab.errors import ConfigError

AS_USUAL = (
    "gpt2 gpt_bigcode bloom gptj gpt_neox gpt_neo llama llama4 bert roberta deberta gemma gemma2 gemma3_text gemma4 "
    "qwen2 qwen3 nemotron_h"
).split()
TARGETS = {
    **{model: ATTENTION[model] for model in AS_USUAL},
    "t5": ["q", "k", "v", "o", "wi", "wo"],
    "mt5": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
    "bart": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "deberta-v2": ["query_proj", "key_proj", "value_proj", "dense"],
}
INDICES, WEIGHTS = "_topk_indices", "_topk_weights"  # what stands for logits in a file with only the k largest


@dataclass
class VBLoRAConfig(LayerConfig):
    """The configuration of a VB-LoRA adapter."""

    r: int = help_field("The rank.", 4)
    num_vectors: int = help_field("How many vectors the bank has; more for larger models.", 256)
    vector_length: int = help_field("Their length, which divides the sides of every adapted layer.", 256)
    topk: int = help_field("How many of them make up a piece.", 2)
    save_only_topk_weights: bool = help_field("A small file, for inference and merging: not to train on.", False)
    vblora_dropout: float = help_field("Dropout on the adapter's input, in training.", 0.0)
    fan_in_fan_out: bool = help_field("The weight is stored (in, out), as in GPT-2; found out by itself.", False)
    bias: str = help_field("Which biases of the base are trained too: none, all or vblora_only.", "none")
    init_vector_bank_bound: float = help_field("The bank starts uniform within this bound; not 0.", 0.02)
    init_logits_std: float = help_field("The logits start normal with this standard deviation.", 0.1)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.VBLORA


class VBLoRA(Method):
    """Logits that choose vectors of a bank, which an adapter keeps once and trains."""

    when = "many adapters kept: they share one bank of vectors"
    example = {"vector_length": 64}
    config, prefix, targets = VBLoRAConfig, "vblora_", TARGETS
    kinds = fused = frozenset({"linear"})
    views = ("r", "topk")
    settings = ("vblora_dropout",)
    acts = ("get_nb_savable_parameters", "print_savable_parameters")

    @classmethod
    def share(cls, config: Any, sites: Sequence[Site]) -> Leaves:
        require_rank(config.num_vectors, "num_vectors")
        require_rank(config.vector_length, "vector_length")
        return {"vblora_vector_bank": Leaf((config.num_vectors, config.vector_length))}  # (num_vectors, vector_length)

    @classmethod
    def start_shared(cls, config: Any, sites: Sequence[Site], shared: Mapping[str, Tensor]) -> None:
        shared["vblora_vector_bank"].uniform_(-config.init_vector_bank_bound, config.init_vector_bank_bound)

    @classmethod
    def leaves(cls, site: Site, config: Any, shared: Leaves) -> Leaves:
        require_rank(config.r)
        require_rank(config.topk, "topk")
        r, n, b, k = config.r, config.num_vectors, config.vector_length, config.topk
        if k > n:
            raise ConfigError(f"`topk` is {k}, but the bank has only {n} vectors (`num_vectors`)")
        for name, size in (("in_features", site.fan_in), ("out_features", site.fan_out)):
            if size % b:
                raise ConfigError(f"`{name}` {size} must be divisible by `vector_length` {b} ('{site.name}')")
        few = config.save_only_topk_weights
        leaves = {
            "vblora_logits_A": Leaf((r, site.fan_in // b, n), file=not few),  # (r, in / vector_length, num_vectors)
            "vblora_logits_B": Leaf((site.fan_out // b, r, n), file=not few),  # (out / vector_length, r, num_vectors)
        }
        for name, logits in [*leaves.items()] if few else ():
            whole = next(t for t in (torch.uint8, torch.int16, torch.int32) if n <= torch.iinfo(t).max)
            leaves[name + INDICES] = Leaf((*logits.shape[:2], k), train=False, buffer=True, dtype=whole)  # (m, n, topk)
            leaves[name + WEIGHTS] = Leaf((*logits.shape[:2], k - 1), train=False, buffer=True)  # (m, n, topk - 1)
        return leaves

    def setup(self, config: Any) -> None:
        self.r, self.topk = config.r, config.topk

    def reset(self, config: Any) -> None:
        self.vblora_logits_A.normal_(0, config.init_logits_std)
        self.vblora_logits_B.normal_(0, config.init_logits_std)

    # ------------------------------------------------------------------ the formula
    def pieces(self, logits: Tensor) -> Tensor:
        """The vectors (..., length) that logits (..., vectors) choose, in fp32 at least."""
        best, which = wide(logits).topk(self.topk, -1)
        return (best.softmax(-1)[..., None] * wide(self.shared("vblora_vector_bank"))[which]).sum(-2)

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """(A (r, in), B (out, r))."""
        A, B = self.vblora_logits_A, self.vblora_logits_B
        if self.options.save_only_topk_weights and self.training and A.isinf().any():
            raise RuntimeError(
                "Found infinity values in VB-LoRA logits. Ensure training was not resumed from a "
                "`save_only_topk_weights` model."
            )
        return self.pieces(A).flatten(1), self.pieces(B).mT.flatten(0, 1)

    def weight(self, W: Tensor) -> Tensor:
        A, B = self.factors
        return W + B @ A

    def after(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        A, B = self.factors
        x = call.drop(self, x, self.options.vblora_dropout)
        return y + self.site.mix(self.site.apply(x, A.to(x.dtype)), B.to(x.dtype))

    # ------------------------------------------------------------------ the file with only the k largest
    def pack(self, name: str, tensor: Tensor) -> Tensor:
        if not name.endswith((INDICES, WEIGHTS)):
            return tensor
        best, which = self.tensor(name.removesuffix(INDICES).removesuffix(WEIGHTS)).topk(self.topk, -1)
        return which.to(tensor.dtype) if name.endswith(INDICES) else best.softmax(-1)[..., :-1].contiguous()

    def unpack(self, name: str, value: Tensor) -> Tensor:
        if name.endswith(WEIGHTS) and value.device.type != "meta":  # the indices before it are there by now
            leaf = name.removesuffix(WEIGHTS)
            which = self.tensor(leaf + INDICES).to(value.device, torch.long)
            weights = torch.cat([value, 1 - value.sum(-1, keepdim=True)], -1)
            holder, key = self.place_of(leaf)
            logits = value.new_full(self.declared[leaf].shape, -torch.inf).scatter(-1, which, weights.log())
            if holder[key].device.type == "meta":
                holder[key] = nn.Parameter(logits, holder[key].requires_grad)
            else:
                holder[key].copy_(logits)
        return value

    # ------------------------------------------------------------------ how large that file is
    @staticmethod
    def get_nb_savable_parameters(of: Callable[..., Any], model: Any, adapter: str | None = None) -> tuple[int, int]:
        """The numbers that an adapter's file has, counted as fp32: (VB-LoRA's, those that are trained beside it).

        Args:
            adapter: whose; the active adapter's by default.
        """
        methods = of(adapter)
        bank = methods[0].shared("vblora_vector_bank").numel()
        leaves = [leaf for method in methods for leaf in method.declared.values() if leaf.file]
        own = sum(math.prod(leaf.shape) * (leaf.dtype.itemsize / 4 if leaf.dtype else 1) for leaf in leaves)
        beside = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "vblora_" not in n)
        return int(bank + own), beside

    @staticmethod
    def print_savable_parameters(of: Callable[..., Any], model: Any, adapter: str | None = None) -> None:
        """Print how many numbers an adapter's file has."""
        own, beside = VBLoRA.get_nb_savable_parameters(of, model, adapter)
        print(
            f"VB-LoRA params to-be-saved (float32-equivalent): {own:,d} || total params to-be-saved: {own + beside:,d}"
        )
