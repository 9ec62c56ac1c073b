"""Optimisers for LoRA: LoRA+ (two learning rates), LoRA-FA (A frozen), and Riemannian preconditioning.

All three take a model that `get_peft_model` made and return a `torch.optim.Optimizer`. An adapted weight is W + s·B·A
with W (out, in), A (r, in), B (out, r) and the scaling s.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trimtab.core.families import LowRank, wide
from trimtab.errors import OptimizerError, PeftWarning
from trimtab.layer.adapted import AdaptedLayer

__all__ = [
    "LoraFAOptimizer",
    "OptimizerError",
    "create_lorafa_optimizer",
    "create_loraplus_optimizer",
    "create_riemannian_optimizer",
]

RIDGE = 1e-8  # keeps LoRA-FA's A·Aᵀ from being singular


def create_loraplus_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, loraplus_lr_ratio: float, **kwargs: Any
) -> Optimizer:
    """LoRA+ (Hayou et al. 2024, https://arxiv.org/abs/2402.12354): lr_A = lr, lr_B = lr · ratio, with ratio > 1.

    The groups of parameters, in this order; weight decay leaves out layer norms and what has "bias" in its name:

    | who | learning rate | weight decay |
    |---|---|---|
    | A, and every other matrix | lr | loraplus_weight_decay |
    | both factors of embeddings | loraplus_lr_embedding | loraplus_weight_decay |
    | B, and vectors | lr · ratio | loraplus_weight_decay |
    | B, and vectors, without weight decay | lr · ratio | 0 |

    Args:
        loraplus_lr_ratio: lr_B / lr_A; the paper finds 16 good for hard tasks.
        kwargs: `loraplus_lr_embedding` (1e-6) and `loraplus_weight_decay` (0); the others go to `optimizer_cls`.
    """
    from transformers.pytorch_utils import ALL_LAYERNORM_LAYERS

    lr_embedding = kwargs.pop("loraplus_lr_embedding", 1e-6)
    decay = kwargs.pop("loraplus_weight_decay", 0.0)
    norms = [m for m in model.modules() if isinstance(m, tuple(ALL_LAYERNORM_LAYERS))]
    in_norms = {id(p) for norm in norms for p in norm.parameters(recurse=False)}
    groups: list[list[nn.Parameter]] = [[], [], [], []]
    A, embedding, B, B_plain = groups
    for name, p in model.named_parameters():
        if p.requires_grad and "lora_embedding_" in name:
            embedding.append(p)
        elif p.requires_grad and ("lora_B" in name or p.ndim == 1):
            (B_plain if "bias" in name or id(p) in in_norms else B).append(p)
        elif p.requires_grad:
            A.append(p)
    if optimizer_cls.__name__ in ("Adam8bit", "AdamW8bit"):
        from bitsandbytes.optim import GlobalOptimManager  # 32-bit states for embeddings: their rows' gradients differ

        for module in (m for m in model.modules() if isinstance(m, nn.Embedding)):
            GlobalOptimManager.get_instance().register_module_override(module, "weight", {"optim_bits": 32})
    rate_B, make = lr * loraplus_lr_ratio, cast(Any, optimizer_cls)
    options = [{"lr": lr, "weight_decay": decay}, {"lr": lr_embedding, "weight_decay": decay}]
    options += [{"lr": rate_B, "weight_decay": decay}, {"lr": rate_B, "weight_decay": 0.0}]
    return cast(Optimizer, make([{"params": p, **o} for p, o in zip(groups, options)], lr=lr, **kwargs))


class LoraFAOptimizer(Optimizer):
    """AdamW whose gradients of B are projected, for LoRA with a frozen A: what `create_lorafa_optimizer` makes.

        g ← g (A·Aᵀ + δI)⁻¹ / s²                             for every B in `pairs`;  g (out, r)
        m ← β₁·m + (1 − β₁)·g,   v ← β₂·v + (1 − β₂)·g²
        p ← (1 − lr·decay)·(p − lr·√(1 − β₂ᵗ)/(1 − β₁ᵗ)·m / (√v + ε))

    This is AdamW as transformers had it: ε is added before the bias correction, and the decay comes last.

    Args:
        params: parameters or groups of them.
        correct_bias: without it, the step size is lr.

    Attributes:
        pairs: {B: its method}; parameters that are not in it are trained by AdamW alone.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
    ) -> None:
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise OptimizerError(
                "LoRA-FA needs lr, eps and weight_decay of at least 0 and betas in [0, 1), not "
                f"{lr=}, {eps=}, {weight_decay=}, {betas=}."
            )
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "correct_bias": correct_bias}
        super().__init__(params, defaults)
        self.pairs: dict[nn.Parameter, LowRank] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; `closure`, if given, computes the gradients, and its result is returned."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                self._update(p, group)
        return loss

    def _update(self, p: nn.Parameter, group: dict[str, Any]) -> None:
        assert p.grad is not None
        g = (projected(self.pairs[p], p.grad) if p in self.pairs else p.grad).to(p.dtype)
        state = self.state[p]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        state["step"] += 1
        (beta1, beta2), rate = group["betas"], group["lr"]
        m = state["exp_avg"].mul_(beta1).add_(g, alpha=1 - beta1)
        v = state["exp_avg_sq"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
        if group["correct_bias"]:
            rate *= math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
        p.addcdiv_(m, v.sqrt().add_(group["eps"]), value=-rate)
        p.mul_(1 - group["lr"] * group["weight_decay"])


def projected(method: LowRank, gradient: Tensor) -> Tensor:
    """The gradient of B (in B's shape) as LoRA-FA takes it: g (A·Aᵀ + δI)⁻¹ / s², in fp32 at least."""
    result = wide(gradient).clone()
    g, A = method.site.upper(result), wide(method.matrices[0])  # (..., out, r), (..., r, in)
    g.copy_(g @ torch.linalg.pinv(A @ A.mT + RIDGE * _eye(A), hermitian=True) / method.scaling**2)
    return result


def create_lorafa_optimizer(
    model: nn.Module, r: int, lora_alpha: int, lr: float, weight_decay: float = 0.0, use_rslora: bool | None = None
) -> Optimizer:
    """LoRA-FA (Zhang et al. 2023, https://arxiv.org/abs/2308.03303): freeze A, train B by AdamW on projected gradients.

    With G (out, in) the full weight's gradient, B's own is g = s·G·Aᵀ. The step of B that comes nearest to G, that is
    min ‖s·g'·A − G‖, is g' = G·Aᵀ(A·Aᵀ)⁻¹ / s = g (A·Aᵀ)⁻¹ / s². Activations need no longer be kept for A's gradient.

    Args:
        r, lora_alpha: those of the adapter; a warning follows if no layer has them. Each layer's own scaling counts.
        use_rslora: deprecated, as in PEFT; LoraConfig says it.

    Raises:
        OptimizerError: the model has no LoRA pair, a grouped convolution has one, or `use_rslora` is not the adapter's.
    """
    if use_rslora is not None:
        _check_rslora(model, use_rslora)
    pairs = _pairs(model)
    if not pairs:
        raise OptimizerError("create_lorafa_optimizer found no LoRA pair: make the model with a LoraConfig.")
    if grouped := sorted({pair.site.name for pair in pairs if not _is_view(pair)}):
        raise OptimizerError(f"LoRA-FA cannot train B of convolutions in groups: {', '.join(grouped)}.")
    if not any((pair.r, pair.lora_alpha) == (r, lora_alpha) for pair in pairs):
        own = sorted({(pair.r, pair.lora_alpha) for pair in pairs})
        text = f"No layer has {r=}, {lora_alpha=}; they have (r, lora_alpha) in {own}, and that is what counts."
        warnings.warn(text, PeftWarning, stacklevel=2)
    for pair in pairs:
        pair.factors[0].requires_grad_(False)
    optimizer = LoraFAOptimizer([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=weight_decay)
    optimizer.pairs = {pair.factors[1]: pair for pair in pairs}  # type: ignore[misc]
    return optimizer


def _check_rslora(model: Any, use_rslora: bool) -> None:
    warnings.warn("`use_rslora` is deprecated: set it in LoraConfig.", FutureWarning, stacklevel=3)
    unlike = [n for n in model.active_adapters if getattr(model.peft_config[n], "use_rslora", False) != use_rslora]
    if unlike:
        raise OptimizerError(f"{use_rslora=}, but the configs of these adapters say otherwise: {unlike}. Leave it out.")


def create_riemannian_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, reg: float = 1e-2, **kwargs: Any
) -> Optimizer:
    """Riemannian preconditioned LoRA (Zhang and Pilanci 2024, https://arxiv.org/abs/2402.02347), before every step:

        g_A ← (Bᵀ·B + δI)⁻¹ g_A,    g_B ← g_B (A·Aᵀ + δI)⁻¹        with g_A (r, in), g_B (out, r), δ = reg

    As in PEFT, the pairs of Linear layers and of parameters are preconditioned, in place; embeddings, convolutions and
    all else are trained by `optimizer_cls` as they are. `kwargs` go to it.

    Raises:
        OptimizerError: no trainable pair, `reg` below 0, or an optimiser that calls a closure within its step.
    """
    if reg < 0:
        raise OptimizerError(f"`reg` must be at least 0, not {reg}.")
    if issubclass(optimizer_cls, torch.optim.LBFGS):
        raise OptimizerError("LBFGS computes gradients within its step, past the preconditioner: take SGD or AdamW.")
    pairs = [pair for pair in _pairs(model) if pair.names[0] == "lora_A" and pair.factors[0].ndim == 2]
    pairs = [pair for pair in pairs if all(factor.requires_grad for factor in pair.factors)]
    if not pairs:
        raise OptimizerError("create_riemannian_optimizer found no trainable pair of lora_A and lora_B.")

    def precondition(_: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(argument is not None for argument in (*args[1:], *kwargs.values())):  # args[0] is the optimiser
            raise OptimizerError("A preconditioned optimiser takes no closure: compute gradients before its step.")
        for pair in pairs:
            _precondition(pair, reg)

    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = cast(Optimizer, cast(Any, optimizer_cls)(params, lr=lr, **kwargs))
    optimizer.register_step_pre_hook(precondition)
    return optimizer


@torch.no_grad()
def _precondition(pair: LowRank, reg: float) -> None:
    A, B = (wide(M) for M in pair.matrices)  # (..., r, in), (..., out, r)
    (stored_A, stored_B), site, ridge = pair.factors, pair.site, reg * _eye(A)
    if stored_A.grad is not None:
        g = site.lower(stored_A.grad)
        g.copy_(torch.linalg.solve(B.mT @ B + ridge, wide(g)))
    if stored_B.grad is not None:
        g = site.upper(stored_B.grad)
        g.copy_(torch.linalg.solve(A @ A.mT + ridge, wide(g), left=False))


def _pairs(model: nn.Module) -> list[LowRank]:
    """The LoRA pairs whose tensors the model shows, DoRA's among them."""
    shown = {id(p) for p in model.parameters()}
    layers = [layer for layer in model.modules() if isinstance(layer, AdaptedLayer)]
    methods = [m for layer in layers for row in layer.methods.values() for m in row if isinstance(m, LowRank)]
    return [m for m in methods if m.options.peft_type == "LORA" and id(m.factors[1]) in shown]


def _is_view(pair: LowRank) -> bool:
    """Whether B's matrix shares B's memory, so that what is written to the one is in the other."""
    return pair.matrices[1].untyped_storage().data_ptr() == pair.factors[1].untyped_storage().data_ptr()


def _eye(A: Tensor) -> Tensor:
    return torch.eye(A.shape[-2], dtype=A.dtype, device=A.device)  # (r, r)
