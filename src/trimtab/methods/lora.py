"""LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 4.1).   W' = W + s B A,   s = alpha / r.

rsLoRA (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732): s = alpha / sqrt(r).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from trimtab.core.architectures import ATTENTION
from trimtab.core.config import LayerConfig, PeftType, help_field, match_pattern
from trimtab.core.dropout import Dropout, Several
from trimtab.core.families import LowRank
from trimtab.core.kernels import Layer, fits, layered, lora_linear, lora_linear_group
from trimtab.core.kernels.usual import autocasts
from trimtab.core.method import Call, Leaves, require_rank
from trimtab.core.site import Site
from trimtab.errors import ConfigError
from trimtab.init import complete, mutates, start

# Fields of LoraConfig (or a value of one) that choose another formula, each in a file of its own.
VARIANTS = {
    "use_dora": "dora:Dora",
    "alora_invocation_tokens": "alora:ALora",
    "velora_config": "velora:Velora",
    "monteclora_config": "monteclora:Monteclora",
    "arrow_config": "arrow:Arrow",
    "kasa_config": "kasa:Kasa",
    "use_bdlora": "bdlora:BdLora",
    "use_qalora": "qalora:QaLora",
    "init_lora_weights=mica": "mica:Mica",
    "ensure_weight_tying": "tied:Tied",
}


@dataclass
class LoraRuntimeConfig:
    """Settings of one run, never saved."""

    ephemeral_gpu_offload: bool = help_field("Compute DoRA's norms of offloaded weights on the GPU.", False)


@dataclass
class LoraConfig(LayerConfig):
    """The configuration of a LoRA adapter; every field of PEFT 0.21 is kept through JSON.

    Example:
        >>> from trimtab import LoraConfig
        >>> LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"]).scaling()
        2.0
    """

    r: int = help_field("The rank.", 8)
    lora_alpha: float = help_field("The scale is lora_alpha / r (it does not follow r by itself).", 8)
    lora_dropout: float = help_field("Dropout on the adapter's input, in training.", 0.0)
    fan_in_fan_out: bool = help_field("The weight is stored (in, out), as in GPT-2; found out by itself.", False)
    bias: Literal["none", "all", "lora_only"] = help_field("Which biases of the base are trained too.", "none")
    use_rslora: bool = help_field("The scale is lora_alpha / sqrt(r).", False)
    init_lora_weights: bool | str = help_field(
        "How A and B start: True, False, gaussian, orthogonal, pissa, pissa_niter_[n], olora ...", True
    )
    rank_pattern: dict[str, int] = help_field("Module name or regular expression -> its own rank.", factory=dict)
    alpha_pattern: dict[str, float] = help_field("Module name or regular expression -> its own alpha.", factory=dict)
    megatron_config: dict[str, Any] | None = help_field("Arguments of Megatron's parallel layers.", None)
    megatron_core: str | None = help_field("The module that holds Megatron's parallel layers.", "megatron.core")
    trainable_token_indices: list[int] | dict[str, list[int]] | None = help_field(
        "Rows of an embedding to train as well: indices, or {module: indices}.", None
    )
    loftq_config: Any = help_field("Settings of LoftQ.", factory=dict)
    eva_config: Any = help_field("Settings of EVA.", None)
    corda_config: Any = help_field("Settings of CorDA.", None)
    lora_ga_config: Any = help_field("Settings of LoRA-GA.", None)
    use_dora: bool = help_field("DoRA: train the magnitude and the direction of each row apart.", False)
    alora_invocation_tokens: list[int] | None = help_field("aLoRA: the tokens from which on the adapter acts.", None)
    velora_config: Any = help_field("Settings of VeLoRA.", None)
    kasa_config: Any = help_field("Settings of KaSA.", None)
    monteclora_config: Any = help_field("Settings of MonteCLoRA.", None)
    arrow_config: Any = help_field("Settings of Arrow.", None)
    use_bdlora: Any = help_field("Settings of BD-LoRA.", None)
    use_qalora: bool = help_field("QA-LoRA, for GPTQ layers.", False)
    qalora_group_size: int = help_field("The group size of QA-LoRA.", 16)
    layer_replication: list[tuple[int, int]] | None = help_field("Rebuild the stack from ranges of its layers.", None)
    lora_bias: bool = help_field("A bias on B, too.", False)
    target_parameters: list[str] | None = help_field("Names of parameters (experts) to adapt.", None)
    ensure_weight_tying: bool = help_field("Share the adapter of tied embeddings.", False)
    runtime_config: LoraRuntimeConfig = help_field("Settings of one run, never saved.", factory=LoraRuntimeConfig)

    runtime = frozenset({"runtime_config"})
    nested = {
        "eva_config": "init.eva:EvaConfig",
        "corda_config": "init.corda:CordaConfig",
        "lora_ga_config": "init.lora_ga:LoraGAConfig",
        "velora_config": "methods.velora:VeloraConfig",
        "monteclora_config": "methods.monteclora:MontecloraConfig",
        "arrow_config": "methods.arrow:ArrowConfig",
        "kasa_config": "methods.kasa:KasaConfig",
        "use_bdlora": "methods.bdlora:BdLoraConfig",
    }
    pending = {
        "megatron_config": "Megatron's layers are not supported",
        "megatron_core": "Megatron's layers are not supported",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LORA
        if isinstance(self.runtime_config, dict):
            self.runtime_config = LoraRuntimeConfig(**self.runtime_config)
        complete(self)
        if self.use_dora and self.megatron_config:
            raise ConfigError("DoRA does not support megatron_core, please set `use_dora=False`.")
        if self.lora_bias and self.use_dora:
            raise ConfigError("The argument lora_bias=True is not supported for DoRA, please pass use_dora=False")
        if self.lora_bias and not isinstance(self.init_lora_weights, bool):
            raise ConfigError("The argument lora_bias=True is only supported with init_lora_weights=True or False")
        if self.bias not in ("none", "all", "lora_only"):
            raise ConfigError(f"`bias` should be 'none', 'all' or 'lora_only', not {self.bias!r}")

    def _register_custom_module(self, mapping: dict[type[Any], type[Any]]) -> None:
        """Name classes, {type of a target: class}, that make the layers at targets of these types, instead of ours.

        Each is one of the user's that inherits from nn.Module and PEFT's LoraLayer. No file has them.
        """
        self.__dict__.setdefault("_custom_modules", {}).update(mapping)

    @property
    def custom_modules(self) -> Any:  # type: ignore[override]
        """What was registered; None for methods that only share these fields."""
        return self.__dict__.get("_custom_modules", {}) if self.peft_type == PeftType.LORA else None

    def check(self) -> None:
        """Raise for a field that does not act yet but was set."""
        super().check()
        if self.init_lora_weights != "mica":  # a formula of its own
            mutates(self.init_lora_weights)

    def scaling(self) -> float:
        """s = alpha / r, or alpha / sqrt(r) with `use_rslora`."""
        require_rank(self.r)
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def resolve(self, name: str) -> LoraConfig:
        """This config with the rank and alpha that the patterns give the module `name`."""
        rank, alpha = match_pattern(self.rank_pattern, name), match_pattern(self.alpha_pattern, name)
        if rank is None and alpha is None:
            return self
        own = self.shallow()
        own.r = self.r if rank is None else self.rank_pattern[rank]
        own.lora_alpha = self.lora_alpha if alpha is None else self.alpha_pattern[alpha]
        return own


class Lora(LowRank):
    """W' = W + s·B·A."""

    when = "the first choice: understood, fast, served everywhere"
    config, prefix, targets = LoraConfig, "lora_", ATTENTION
    kinds = frozenset({"linear", "embedding", "conv", "attention", "parameter"})
    fused = frozenset({"linear", "embedding", "conv"})
    weighed = True
    mutates = staticmethod(lambda config: mutates(config.init_lora_weights))
    combine, combined_config, bias = LowRank.combined, LowRank.settle, LowRank.lifted

    @classmethod
    def leaves(cls, site: Site, config: Any, shared: Leaves) -> Leaves:
        return cls.pair(site, config.r, config.lora_bias)

    def setup(self, config: Any) -> None:
        self.scale(config.r, config.lora_alpha, config.scaling(), config.lora_dropout)
        self.biased = config.lora_bias
        self.weighed = not self.biased and self.site.kind in ("linear", "embedding")

    def reset(self, config: Any) -> Tensor | None:
        return start(config.init_lora_weights, self)

    def weight(self, W: Tensor) -> Tensor:
        return self.plus_delta(W)

    def beside(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor, float] | None:
        """W, b, A, B and s as a fused step takes them; None where the layer has no plain weight."""
        plain = self.site.plain()
        if plain is None or self.biased or (self.dropout and self.training and torch.compiler.is_compiling()):
            return None
        (pa, ka), (pb, kb) = self.places.values()
        return (*plain, pa[ka], pb[kb], self.scaling)

    def dropping(self, x: Tensor, call: Call) -> Dropout | None:
        """What drops entries of its input in this forward."""
        return call.dropout(self, x, self.dropout) if self.dropout and self.training else None

    def through(self, x: Tensor, call: Call) -> Tensor | None:
        layer = self.beside() if call.strength(self) is None else None
        return None if layer is None else lora_linear(x, *layer, self.dropping(x, call))

    @staticmethod
    def together(methods: Sequence[Any], x: Tensor, call: Call) -> Sequence[Tensor] | None:
        layers = [Layer(*layer) for m in methods if (layer := m.beside()) is not None]
        if len(layers) < len(methods) or not fits(x, layers) or any(call.strength(m) is not None for m in methods):
            return None
        drops = [m.dropping(x, call) for m in methods]
        return lora_linear_group(x, [layer._replace(drop=d) for layer, d in zip(layers, drops, strict=True)])

    @staticmethod
    def mixed(stacks: Sequence[Sequence[Any]], x: Tensor, cut: Any, calls: Sequence[Call]) -> Tensor | None:
        whose = [(m, call) for stack, call in zip(stacks, calls, strict=True) for m in stack]
        if (
            cut.rows is None
            or not x.numel()
            or any(m.beside() is None or call.strength(m) is not None for m, call in whose)
        ):
            return None
        drop, gains = None, dict.fromkeys((m for m, _ in whose), 1.0)
        if any(m.dropout and m.training for m, _ in whose):
            if not cut.sorted or any(len(stack) != 1 for stack in stacks):  # each sees an input of its own
                return None
            parts = [(m.dropping(part, call), part) for (m, call), part in zip(whose, cut.deal(x), strict=True)]
            drop = Several(tuple((own, part.numel() // part.shape[-1]) for own, part in parts))
            gains = {m: own.gain if own else 1.0 for (m, _), (own, _) in zip(whose, parts, strict=True)}
        W, b, *_ = whose[0][0].beside()
        updates = [[(*m.beside()[2:4], m.scaling * gains[m]) for m in stack] for stack in stacks]
        formats = {t.dtype for update in updates for A, B, _ in update for t in (A, B)}
        if len(formats) > 1 or not (x.dtype in formats or autocasts(x)):  # fp32 beside bf16: no faster so (docs/log.md)
            return None
        layer = Layer(W, b, *layered(updates, cut.pieces), drop)
        return lora_linear_group(x, [layer])[0] if fits(x, [layer]) else None

    @staticmethod
    def rows(stacks: Sequence[Sequence[Any]], y: Tensor, x: Tensor, cut: Any, calls: Sequence[Call]) -> Tensor | None:
        methods = [m for stack in stacks for m in stack]
        if methods[0].site.kind != "linear" or cut.rows is None or any(m.biased for m in methods):
            return None
        if not methods[0].training or not any(m.dropout for m in methods):
            return LowRank.added(stacks, y, x, cut)
        if any(len(stack) > 1 for stack in stacks):  # each of them sees an input of its own
            return None

        def dropped(x: Tensor) -> Tensor:
            parts = cut.deal(x)
            for i, (stack, call) in enumerate(zip(stacks, calls, strict=True)):
                for method in stack:
                    parts[i] = call.drop(method, parts[i], method.dropout)
            whole: Tensor = cut.join(parts, x.shape[:-1])
            return whole

        return LowRank.added(stacks, y, x, cut, inputs=dropped)

    def after(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        h, B = self.update(call.drop(self, x, self.dropout))
        if (strength := call.strength(self)) is not None:
            h = h * (strength.to(h.dtype) if isinstance(strength, Tensor) else strength)
        return self.site.add(y, h, B, shift=self.shift)
