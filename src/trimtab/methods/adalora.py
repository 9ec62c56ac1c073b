"""AdaLoRA (Zhang et al. 2023, https://arxiv.org/abs/2303.10512, eq. 3).   W' = W + s B diag(E) A.

s = alpha / r with the rank at the start. Training adds γ times the mean of ||A Aᵀ - I|| and ||Bᵀ B - I|| (eq. 4,
without the squares) to the loss and, step by step, sets the E_i of least importance to zero (eq. 6 to 11) until the
budget is reached: call `update_and_allocate(step)` after every optimiser step, before its gradients are cleared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.core.architectures import ATTENTION
from trimtab.core.config import PeftType, help_field
from trimtab.core.families import wide
from trimtab.core.fields import default_of
from trimtab.core.method import Call, Leaf, Leaves, Method, require_rank
from trimtab.core.report import warn
from trimtab.core.site import Site
from trimtab.errors import ConfigError
from trimtab.methods import config_class

AS_USUAL = (
    "gpt2 gpt_bigcode bloom gptj gpt_neox gpt_neo llama llama4 bert deberta gemma gemma2 gemma3_text gemma4 qwen2 "
    "qwen3 nemotron_h"
).split()
TARGETS = {
    **{model: ATTENTION[model] for model in AS_USUAL},
    "t5": ["q", "k", "v", "o", "wi", "wo"],
    "mt5": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
    "bart": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "roberta": ["query", "key", "value", "dense"],
    "deberta-v2": ["query_proj", "key_proj", "value_proj", "dense"],
}
IGNORED = ("r", "use_rslora", "alpha_pattern", "lora_bias")  # as PEFT ignores them


AVERAGES = ("sensitivity", "uncertainty")
LoraConfig: Any = config_class("LORA")  # as in PEFT, this method's config is a LoRA's and more


@dataclass
class AdaLoraConfig(LoraConfig):
    """The configuration of an AdaLoRA adapter; of LoRA's fields `r` gives way to `init_r` and `target_r`."""

    target_r: int = help_field("The average rank at the end.", 8)
    init_r: int = help_field("The rank of every layer at the start.", 12)
    tinit: int = help_field("Steps before ranks are cut.", 0)
    tfinal: int = help_field("Steps at the end with the ranks as they are.", 0)
    deltaT: int = help_field("Steps between two cuts.", 1)
    beta1: float = help_field("How much of the old sensitivity its average keeps.", 0.85)
    beta2: float = help_field("How much of the old uncertainty its average keeps.", 0.85)
    orth_reg_weight: float = help_field("The weight γ of the penalty.", 0.5)
    total_step: int | None = help_field("The number of steps of the whole training.", None)
    rank_pattern: dict[str, list[bool]] | None = help_field(  # type: ignore[assignment]
        "{layer's lora_E: which of its triplets are left}; filled in training.", None
    )

    patterns: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.ADALORA
        if self.use_dora:
            raise ConfigError(f"{self.peft_type} does not support DoRA.")
        if self.init_lora_weights == "loftq":
            raise ConfigError(f"{self.peft_type} does not support LoftQ.")
        if self.total_step is None or self.total_step <= 0:
            raise ConfigError("AdaLoRA does not work when `total_step` is None, supply a value > 0.")
        if self.tinit >= self.total_step - self.tfinal:
            raise ConfigError(
                "The supplied schedule values don't allow for a budgeting phase. Decrease `tfinal`/`tinit` or increase "
                "`total_step`."
            )
        fields = self.__dataclass_fields__
        if unread := [name for name in IGNORED if getattr(self, name) != default_of(fields[name])]:
            names = ", ".join(f"`{name}`" for name in unread)
            message = f"Note that {names} is not used in AdaLora and will be ignored; the initial rank is `init_r`."
            warn(message, UserWarning)

    def resolve(self, name: str) -> AdaLoraConfig:
        """This config itself: the ranks of all modules are kept in it."""
        return self


class AdaLora(Method):
    """A singular value decomposition whose values E are cut by importance."""

    when = "a budget of ranks is to be dealt among layers in training"
    example = {"total_step": 1000}
    config, prefix, targets = AdaLoraConfig, "lora_", TARGETS
    kinds = fused = frozenset({"linear", "conv"})
    views = ("r", "lora_alpha", "scaling")
    settings = ("lora_dropout", "ranknum")

    @classmethod
    def leaves(cls, site: Site, config: Any, shared: Leaves) -> Leaves:
        require_rank(config.init_r, "init_r")
        left = (config.rank_pattern or {}).get(f"{site.name}.lora_E")
        r = config.init_r if left is None else sum(left)
        factors = {
            "lora_A": Leaf((r, site.fan_in)),  # (r, in)
            "lora_B": Leaf((site.fan_out, r)),  # (out, r)
            "lora_E": Leaf((r, 1)),  # (r, 1)
        }
        averages = {  # the sensitivity I and the uncertainty U of each
            f"{average}_{name[-1]}": Leaf(leaf.shape, train=False, file=False, state=True, buffer=True)  # (...)
            for name, leaf in factors.items()
            for average in AVERAGES
        }
        return factors | {"ranknum": Leaf((1,), train=False, file=False, dtype=torch.int64)} | averages  # (1,)

    def setup(self, config: Any) -> None:
        self.key = f"{self.site.name}.lora_E"
        self.lora_alpha = config.lora_alpha
        self.scaling = self.unit = config.lora_alpha if config.lora_alpha > 0 else float(config.init_r)

    def reset(self, config: Any) -> None:
        self.ranknum.fill_(config.init_r)
        for name in ("A", "B", "E"):
            for average in AVERAGES:
                self.tensor(f"{average}_{name}").zero_()
        A, E, B = self.lora_A, self.lora_E, self.lora_B
        for tensor in (A, E, B, torch.empty(1)):  # the fourth draw is as PEFT's
            tensor.normal_()
        if config.init_lora_weights:
            E.zero_()
            A.normal_(0, 0.02)
            B.normal_(0, 0.02)

    @property
    def r(self) -> int:
        """How many triplets are here."""
        return len(self.lora_E)

    def s(self) -> Tensor:
        """alpha over the rank at the start (1,)."""
        scale: Tensor = self.scaling / (self.ranknum.to(wide(self.lora_E).dtype) + 1e-5)
        return scale

    def weight(self, W: Tensor) -> Tensor:
        return W + self.s() * (wide(self.lora_B) @ (wide(self.lora_A) * self.lora_E))

    def after(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        x = call.drop(self, x, self.options.lora_dropout)
        EA = (self.s() * self.lora_E * self.lora_A).to(x.dtype)
        return self.site.add(y, self.site.apply(x, EA), self.lora_B.to(x.dtype))

    @classmethod
    def penalty(cls, methods: Sequence[Any], config: Any) -> Tensor | None:
        products = [P for m in methods for P in (m.lora_A @ m.lora_A.T, m.lora_B.T @ m.lora_B)]
        norms = [torch.linalg.norm(P - torch.eye(len(P), device=P.device, dtype=P.dtype)) for P in products]
        weight: float = config.orth_reg_weight
        return weight * torch.stack([n.to(norms[0].device) for n in norms]).mean() if norms and weight > 0 else None

    # ------------------------------------------------------------------ the budget
    @classmethod
    def step(cls, methods: Sequence[Any], config: Any, t: int) -> None:
        end = config.total_step - config.tfinal
        if t < end:
            for m in methods:
                m.observe(config.beta1, config.beta2)
        budget, due = cls.budget(methods, config, t)
        if t > end:
            cls.mask(methods, config)
        elif due:
            cls.cut(methods, config, budget)

    @classmethod
    def budget(cls, methods: Sequence[Any], config: Any, t: int) -> tuple[int, bool]:
        """(how many triplets are left at step `t`, whether it is one at which they are cut)."""
        first, last = sum(len(m.lora_E) for m in methods), config.target_r * len(methods)
        end = config.total_step - config.tfinal
        if t <= config.tinit:
            return first, False
        if t >= end:
            return last, True
        ratio = 1 - (t - config.tinit) / (end - config.tinit)
        return int((first - last) * ratio**3 + last), t % config.deltaT == 0  # appendix A: it falls as a cubic

    @classmethod
    def cut(cls, methods: Sequence[Any], config: Any, budget: int) -> None:
        """Leave the `budget` triplets of most importance."""
        scores = [m.importance() for m in methods]
        out = sum(map(len, scores)) - budget
        if out > 0:
            limit = torch.cat(scores).kthvalue(out).values
            config.rank_pattern = {m.key: (s > limit).tolist() for m, s in zip(methods, scores, strict=True)}
            cls.mask(methods, config)

    @torch.no_grad()
    def observe(self, beta1: float, beta2: float) -> None:
        """Take the last gradient into the averages I (eq. 9) and U (eq. 10)."""
        for name in ("A", "E", "B"):
            w, I, U = (self.tensor(leaf) for leaf in (f"lora_{name}", f"sensitivity_{name}", f"uncertainty_{name}"))
            now = torch.zeros_like(w) if w.grad is None else (w * w.grad).abs()
            I.mul_(beta1).add_(now, alpha=1 - beta1)
            U.mul_(beta2).add_((now - I).abs(), alpha=1 - beta2)

    def importance(self) -> Tensor:
        """S (r,) of each triplet: that of E_i, and the means of those of row A_i and column B_i (eq. 7 and 11)."""
        A, E, B = (self.tensor(f"sensitivity_{n}") * self.tensor(f"uncertainty_{n}") for n in "AEB")
        return E.flatten() + torch.stack([A.mean(1), B.mean(0)], 1).sum(1)

    @staticmethod
    @torch.no_grad()
    def mask(methods: Sequence[Any], config: Any) -> None:
        """Set to zero what the pattern leaves out, where it has not been cut off already."""
        for m in methods:
            left = (config.rank_pattern or {}).get(m.key, [])
            if len(left) == len(m.lora_E):
                m.lora_E.masked_fill_(~torch.tensor(left, device=m.lora_E.device)[:, None], 0)

    @torch.no_grad()
    def shrink(self, left: Sequence[bool]) -> None:
        """Keep just the triplets of a pattern, in new tensors; s stays that of the rank at the start."""
        keep = torch.tensor(left)
        for name in [n for n in self.declared if n != "ranknum"]:
            holder, key = self.place_of(name)
            old = holder[key]
            on = keep.to(old.device)
            new = old[:, on] if name.endswith("_B") else old[on]  # (out, r') or (r', ...)
            if isinstance(old, nn.Parameter):
                new = nn.Parameter(new, requires_grad=old.requires_grad)
            holder[key] = new
            self.declared = {**self.declared, name: replace(self.declared[name], shape=tuple(new.shape))}

    # ------------------------------------------------------------------ the file has what is left
    def pack(self, name: str, tensor: Tensor) -> Tensor:
        left = (self.options.rank_pattern or {}).get(self.key, [])
        if name == "ranknum" or len(left) != len(self.lora_E):
            return tensor
        keep = torch.tensor(left, device=tensor.device)
        return tensor[:, keep] if name == "lora_B" else tensor[keep]

    def unpack(self, name: str, value: Tensor) -> Tensor:
        r, axis = len(self.lora_E), 1 if name == "lora_B" else 0
        k = value.shape[axis] if value.ndim == 2 else r
        if k >= r:
            return value
        if value.device.type != "meta":  # an earlier state comes back: the first k triplets, and nothing else
            self.options.rank_pattern = {**(self.options.rank_pattern or {}), self.key: [i < k for i in range(r)]}
        return F.pad(value, (0, r - k) if axis else (0, 0, 0, r - k))
