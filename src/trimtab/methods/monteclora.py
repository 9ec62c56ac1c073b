"""MonteCLoRA (Seth et al. 2024, https://arxiv.org/abs/2411.04358, section 4).   W' = W + s B (A + c Σ_k w_k Z_k).

In training each forward draws N matrices Z_k, row i normal with variance g_i, and the weights w of their mixture: g is
the diagonal of a Wishart matrix with r degrees of freedom and scale diag(exp 2σ), w the softmax of a normal vector that
stands for a Dirichlet's (its Laplace approximation) with concentrations exp(p). The loss gains their divergences from
the priors. σ (r,) and p (N,) are trained. In evaluation, and merged, the draws count by their mean, zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Dirichlet, kl_divergence

from trimtab.core.config import help_field
from trimtab.core.families import LowRank
from trimtab.core.method import Call, Leaf, Leaves
from trimtab.core.site import Site
from trimtab.errors import ConfigError
from trimtab.init import mutates, start


@dataclass
class MontecloraConfig:
    """Settings of MonteCLoRA."""

    num_samples: int = help_field("How many matrices are drawn in each forward.", 8)
    use_entropy: bool = help_field("Add the mixture's squared weights to the loss, so that none wins.", False)
    dirichlet_prior: float = help_field("The concentration of the prior of the mixture's weights.", 0.1)
    sample_scaler: float = help_field("The scale of what is drawn.", 1e-4)
    kl_loss_weight: float = help_field("The weight of the divergences from the priors in the loss.", 1e-5)
    buffer_size: int = help_field("PEFT draws this many in advance; here nothing is.", 150)

    def __post_init__(self) -> None:
        for name in ("num_samples", "dirichlet_prior"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"`{name}` should be positive, got {getattr(self, name)}.")


class Monteclora(LowRank):
    """A pair whose A is drawn anew in each forward of training."""

    when = "uncertainty and robustness by sampled weights"
    example = {"monteclora_config": {}}
    prefix = "lora_"
    kinds = fused = frozenset({"linear"})
    mutates = staticmethod(lambda config: mutates(config.init_lora_weights))
    combine, combined_config, bias = LowRank.combined, LowRank.settle, LowRank.lifted

    @classmethod
    def leaves(cls, site: Site, config: Any, shared: Leaves) -> Leaves:
        r, n = config.r, config.monteclora_config.num_samples
        return cls.pair(site, r, config.lora_bias) | {
            "lora_monteclora_sampler.std_prior": Leaf((r,)),  # (r,)
            "lora_monteclora_sampler.expert_weights_prior": Leaf((n,)),  # (n,)
            "lora_monteclora_sampler.gaussian_var_prior": Leaf((r, r), train=False, buffer=True),  # (r, r)
            "lora_monteclora_sampler.expert_weights": Leaf((n,), train=False, buffer=True),  # (n,)
        }

    def setup(self, config: Any) -> None:
        self.scale(config.r, config.lora_alpha, config.scaling(), config.lora_dropout)
        self.drawn: tuple[Tensor, Tensor] | None = None  # of the last forward: what g and w are functions of

    def reset(self, config: Any) -> Tensor | None:
        self.sampler("std_prior").uniform_()
        self.sampler("expert_weights_prior").uniform_()
        self.sampler("gaussian_var_prior").copy_(torch.eye(self.r))
        weights = self.sampler("expert_weights")
        weights.fill_(1 / len(weights))
        return start(config.init_lora_weights, self)

    def sampler(self, name: str) -> Tensor:
        """A tensor of what is drawn, by its name."""
        tensor: Tensor = getattr(self, f"lora_monteclora_sampler_{name}")
        return tensor

    def spread(self, chi: Tensor) -> Tensor:
        """√g (r,) for the roots of chi-squared draws (r,)."""
        return self.sampler("std_prior").exp() * chi

    def mixture(self, z: Tensor) -> Tensor:
        """w (n,) for normal draws (n,)."""
        return torch.softmax(laplace(self.sampler("expert_weights_prior"), z), 0)

    def draw(self, call: Call) -> Tensor:
        """Σ_k w_k Z_k (r, in), drawn."""
        like, n = self.sampler("std_prior"), len(self.sampler("expert_weights"))
        generator = call.generator(self, "samples", like.device)
        normal = lambda *shape: torch.randn(shape, generator=generator, device=like.device, dtype=like.dtype)
        self.drawn = chi, z = normal(self.r, self.r).norm(dim=1), normal(n)
        root, w = self.spread(chi), self.mixture(z)
        with torch.no_grad():
            self.sampler("gaussian_var_prior").copy_(root.square().diag())
            self.sampler("expert_weights").copy_(w)
        return root[:, None] * torch.tensordot(w, normal(n, self.r, self.site.fan_in), 1)

    def weight(self, W: Tensor) -> Tensor:
        return W + self.delta()

    def after(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        x = call.drop(self, x, self.dropout)
        h, B = self.update(x)
        if self.training:
            c = self.scaling * self.options.monteclora_config.sample_scaler
            h = h + self.site.apply(x, (c * self.draw(call)).to(x.dtype))
        return self.site.add(y, h, B, shift=self.shift)

    @classmethod
    def penalty(cls, methods: Sequence[Any], config: Any) -> Tensor | None:
        own, terms = config.monteclora_config, []
        for method in methods:
            terms.append(own.kl_loss_weight * method.divergence(own.dirichlet_prior))
            if own.use_entropy:
                w = method.sampler("expert_weights") if method.drawn is None else method.mixture(method.drawn[1])
                terms[-1] = terms[-1] + w.square().sum()
        total: Tensor | None = torch.stack([t.to(terms[0].device) for t in terms]).mean() if terms else None
        return total

    def divergence(self, prior: float) -> Tensor:
        """The Kullback-Leibler divergences from the priors: of a Wishart, N normal and a Dirichlet distribution."""
        alpha, v = torch.exp(self.sampler("expert_weights_prior")), torch.exp(2 * self.sampler("std_prior"))
        g = self.sampler("gaussian_var_prior").diag() if self.drawn is None else self.spread(self.drawn[0]).square()
        weights = kl_divergence(Dirichlet(alpha), Dirichlet(torch.full_like(alpha, prior)))
        return self.r * apart(v) + len(alpha) * apart(g) + weights  # r times: between the Wishart matrices


def laplace(p: Tensor, z: Tensor) -> Tensor:
    """The normal variables (n,), of normal draws z (n,), whose softmax stands for a Dirichlet with α = exp(p)."""
    centred = torch.eye(len(p), device=p.device, dtype=p.dtype) - 1 / len(p)
    variance = centred.square() @ torch.exp(-p)  # of normal variables (p_k, 1 / α_k) less their mean
    return p - p.mean() + variance.clamp_min(torch.finfo(p.dtype).tiny).sqrt() * z


def apart(t: Tensor) -> Tensor:
    """The divergence between zero-mean normal rows of variances t and 1."""
    return 0.5 * (t.sum() - t.log().sum() - len(t))
