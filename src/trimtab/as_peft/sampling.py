"""MonteCLoRA's sampler as peft has it, a module beside a layer's pair, on trimtab's formulas."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Dirichlet, kl_divergence

from trimtab.methods.monteclora import apart, laplace

__all__ = ["BufferedMontecloraSampler", "MontecloraSampler"]


class MontecloraSampler(nn.Module):
    """What is drawn for a factor A (in, r), in training and outside it.

    Args:
        in_features, out_features: in and r.
        num_samples: how many matrices are drawn at a time (n).
        buffer_size: draws are made so many at a time.

    Attributes:
        std_prior, expert_weights_prior: σ (r,) and p (n,), which are trained.
        gaussian_var_prior, expert_weights: the rows' variances (r, r) and the mixture's weights (n,) last drawn.
    """

    gaussian_var_prior: Tensor
    expert_weights: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_samples: int,
        use_entropy: bool = True,
        dirichlet_prior: float = 1.0,
        sample_scaler: float = 3e-4,
        kl_loss_weight: float = 1e-5,
        buffer_size: int = 10,
        device: str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.num_samples = in_features, out_features, num_samples
        self.use_entropy, self.dirichlet_prior = use_entropy, dirichlet_prior
        self.sample_scaler, self.kl_loss_weight = sample_scaler, kl_loss_weight
        self.device, self.dtype = device or "cpu", dtype
        self.std_prior = nn.Parameter(torch.rand(out_features, device=device, dtype=dtype))
        self.expert_weights_prior = nn.Parameter(torch.rand(num_samples, device=device, dtype=dtype))
        self.register_buffer("gaussian_var_prior", torch.eye(out_features, device=device, dtype=dtype))
        self.register_buffer("expert_weights", torch.full_like(self.expert_weights_prior.detach(), 1 / num_samples))
        self.sampler = BufferedMontecloraSampler(self, buffer_size, device)

    def wishart_reparameterization(self, std: Tensor, z_wishart: Tensor) -> Tensor:
        """The diagonal of std z std, as a matrix: variances, of a draw z (r, r) from the standard Wishart."""
        return (std @ z_wishart @ std.mT).diagonal().diag()

    def multivariate_reparameterization(self, z_mvn: Tensor, cov_matrix: Tensor) -> Tensor:
        """Matrices (n, in, r) whose rows have a covariance, scaled, of normal draws of that shape."""
        return self.sample_scaler * (z_mvn @ torch.linalg.cholesky(cov_matrix))

    def dirichlet_reparameterization(self, alpha: Tensor, z_dirichlet: Tensor) -> Tensor:
        """What the mixture's weights (n,) are the softmax of, for concentrations and normal draws (n,)."""
        return laplace(alpha.log(), z_dirichlet)

    def dirichlet_kl(self, alpha2: Tensor) -> Tensor:
        """The divergence of concentrations (n,) from the prior."""
        return kl_divergence(Dirichlet(alpha2), Dirichlet(torch.full_like(alpha2, self.dirichlet_prior)))

    def wishart_kl(self, std: Tensor) -> Tensor:
        """That of a Wishart distribution with r degrees of freedom and the scale std² from the standard one."""
        return self.out_features * apart(std.diagonal().square())

    def multivariate_kl(self, var: Tensor) -> Tensor:
        """That of n normal distributions with a covariance (r, r) from standard ones."""
        return self.num_samples * apart(torch.linalg.eigvalsh(var))

    def get_variational_loss(self) -> tuple[Tensor | float, Tensor | float]:
        """(The divergences, weighed; the mixture's squared weights if `use_entropy`); nothing outside training."""
        if not self.training:
            return 0.0, 0.0
        far = self.dirichlet_kl(self.expert_weights_prior.exp()) + self.wishart_kl(self.std_prior.exp().diag())
        far = far + self.multivariate_kl(self.gaussian_var_prior)
        return self.kl_loss_weight * far, self.expert_weights.square().sum() if self.use_entropy else 0

    def forward(self) -> tuple[Tensor, Tensor]:
        """(Matrices (n, in, r), weights (n,)), drawn."""
        z = self.sampler.get()
        self.gaussian_var_prior = self.wishart_reparameterization(self.std_prior.exp().diag(), z["z_wishart"])
        logits = self.dirichlet_reparameterization(self.expert_weights_prior.exp(), z["z_dirichlet"])
        self.expert_weights = torch.softmax(logits, 0)
        return self.multivariate_reparameterization(z["z_mvn"], self.gaussian_var_prior), self.expert_weights

    def __getstate__(self) -> dict[str, Any]:  # no copy of a graph
        return {**self.__dict__, "_buffers": {name: b.detach() for name, b in self._buffers.items() if b is not None}}


class BufferedMontecloraSampler:
    """Draws for a sampler, made `buffer_size` at a time."""

    def __init__(self, model: MontecloraSampler, buffer_size: int = 150, device: str | None = None) -> None:
        self.model, self.buffer_size, self.device = model, buffer_size, device
        self.buffer: list[dict[str, Tensor]] = []
        self.index = 0

    def _refill_buffer(self) -> None:
        model, size = self.model, self.buffer_size
        n, r, like = model.num_samples, model.out_features, model.std_prior
        normal = lambda *shape: torch.randn(size, *shape, device=like.device, dtype=like.dtype)
        rows = normal(r, r)
        drawn = {"z_mvn": normal(n, model.in_features, r), "z_wishart": rows @ rows.mT, "z_dirichlet": normal(n)}
        self.buffer = [dict(zip(drawn, one)) for one in zip(*drawn.values())]
        self.index = 0

    def get(self) -> dict[str, Tensor]:
        """The next draws: "z_mvn" (n, in, r) and "z_dirichlet" (n,), normal, "z_wishart" (r, r)."""
        if self.index >= len(self.buffer):
            self._refill_buffer()
        self.index += 1
        return self.buffer[self.index - 1]
