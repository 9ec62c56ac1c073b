"""Pieces of formulas that peft has as functions and modules of their own, on trimtab's methods.

Where peft has an autograd function `F`, the answer has an `F.apply` of the same arguments, with autograd's gradients.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.families import cayley, skew, tucker, wide
from trimtab.methods import adamss
from trimtab.methods.c3a import circulants, convolved
from trimtab.methods.lokr import factors_of, kron
from trimtab.methods.oft import rotations, shrinkage
from trimtab.methods.osf import projected_off
from trimtab.methods.psoft import within

__all__ = [
    "BlockCircularConvolution",
    "FastBlockDiag",
    "HadaWeight",
    "HadaWeightCP",
    "MultiplicativeDropoutLayer",
    "OFTRotationModule",
    "OrthLayer",
    "TemperatureScaledSoftmax",
    "UniqueBaseGrad",
    "clustering_Z",
    "decompose_weight_matrix",
    "factorization",
    "get_circulant_fast",
    "get_fbd_cuda",
    "get_trainable_subspaces",
    "make_kron",
    "make_weight",
    "make_weight_cp",
    "patch_environment",
    "project_gradient_to_orthogonal_space",
    "seg_locations",
    "slice_pca",
]


def _function(name: str, formula: Callable[..., Tensor]) -> type:
    return type(name, (), {"apply": staticmethod(formula), "__doc__": formula.__doc__, "__module__": __name__})


# ------------------------------------------------------------------ LoHa, LoKr
def make_weight(w1a: Tensor, w1b: Tensor, w2a: Tensor, w2b: Tensor, scale: Tensor | float) -> Tensor:
    """scale (w1a w1b) ∘ (w2a w2b) (out, in)."""
    return scale * (w1a @ w1b) * (w2a @ w2b)


def make_weight_cp(*tensors: Any) -> Tensor:
    """LoKr's (t, wa, wb): t ×₁ wa ×₂ wb; LoHa's (t1, w1a, w1b, t2, w2a, w2b, scale): the product of two such."""
    if len(tensors) == 3:
        return tucker(*tensors)
    t1, w1a, w1b, t2, w2a, w2b, scale = tensors
    return scale * tucker(t1, w1a, w1b) * tucker(t2, w2a, w2b)


HadaWeight, HadaWeightCP = _function("HadaWeight", make_weight), _function("HadaWeightCP", make_weight_cp)


def factorization(dimension: int, factor: int = -1) -> tuple[int, int]:
    """(m, n) with m n = dimension: m = `factor` where that divides it, else the nearest pair below."""
    return factors_of(dimension, factor)


def make_kron(w1: Tensor, w2: Tensor, scale: float = 1.0) -> Tensor:
    """scale w1 ⊗ w2, of w1 (l, m) and w2 (k, n, kernel): (l k, m n, kernel)."""
    return scale * kron(w1, w2)


# ------------------------------------------------------------------ C3A, RandLoRA, BOFT
get_circulant_fast = circulants
BlockCircularConvolution = _function("BlockCircularConvolution", convolved)


def _scaled_base(base: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """diag(λ_i) A_i diag(γ_i) of a base A (r, 1 or n, in), λ (r, n) and γ (n, in): (r, n, in)."""
    return rows[..., None] * base * columns


UniqueBaseGrad = _function("UniqueBaseGrad", _scaled_base)


def _block_diagonal(blocks: Tensor) -> Tensor:
    """Block-diagonal matrices (m, n b, n b) of blocks (m, n, b, b)."""
    return torch.stack([torch.block_diag(*some) for some in blocks])


FastBlockDiag = _function("FastBlockDiag", _block_diagonal)


def get_fbd_cuda() -> None:
    """None: there is no kernel to compile."""


@contextlib.contextmanager
def patch_environment(**kwargs: Any) -> Iterator[None]:
    """Inside the block, environment variables (their names in capitals) have these values."""
    names = {name.upper(): str(value) for name, value in kwargs.items()}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class MultiplicativeDropoutLayer(nn.Module):
    """In training, a share p of rotations (n, b, b) is the identity; of several factors (m, n, b, b), those of one."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """The rotations, some of them replaced."""
        n = x.shape[-3]
        if not self.training or not self.p or n == 1:
            return x
        out = torch.zeros(x.shape[:-2], dtype=torch.bool, device=x.device)
        some = out.view(-1, n)[int(torch.randint(out.numel() // n, ()))]
        some[torch.randperm(n, device=x.device)[: int(self.p * n)]] = True
        return torch.where(out[..., None, None], torch.eye(x.shape[-1], dtype=x.dtype, device=x.device), x)


class OFTRotationModule(nn.Module):
    """The blocks of OFT at the input of a linear layer.

    Attributes:
        weight: the entries above the diagonal of each Q (n, b (b - 1) / 2).
    """

    def __init__(
        self,
        r: int,
        n_elements: int,
        block_size: int,
        in_features: int,
        coft: bool = False,
        eps: float = 6e-5,
        block_share: bool = False,
        kernel_size: tuple[int, int] = (0, 0),
        use_cayley_neumann: bool = True,
        num_cayley_neumann_terms: int = 5,
    ) -> None:
        super().__init__()
        if any(kernel_size):
            raise NotImplementedError("A rotation of a convolution's patches is a part of its adapter here.")
        self.r, self.n_elements, self.block_size, self.in_features = r, n_elements, block_size, in_features
        self.coft, self.eps, self.block_share, self.kernel_size = coft, eps, block_share, kernel_size
        self.use_cayley_neumann, self.num_cayley_neumann_terms = use_cayley_neumann, num_cayley_neumann_terms
        self.weight = nn.Parameter(torch.empty(1 if block_share else r, n_elements))

    def _blocks(self) -> Tensor:
        if self.coft:
            with torch.no_grad():
                self.weight.mul_(shrinkage(self.weight, self.eps))
        terms = self.num_cayley_neumann_terms if self.use_cayley_neumann else None
        R = rotations(wide(self.weight), self.block_size, terms)
        return R.expand(self.in_features // self.block_size, -1, -1)

    def get_weight(self) -> Tensor:
        """The whole rotation (in, in)."""
        return torch.block_diag(*self._blocks()).to(self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in), turned."""
        R = self._blocks().to(x.dtype)
        return torch.einsum("...nk,nkc->...nc", x.unflatten(-1, R.shape[:2]), R).flatten(-2)


class OrthLayer(nn.Module):
    """PSOFT's diag(b) R diag(a) (r, r)."""

    def __init__(
        self,
        size: int,
        orth: bool = True,
        mag_b: bool = True,
        mag_a: bool = True,
        use_cayley_neumann: bool = False,
        num_cayley_neumann_terms: int = 5,
        cayley_neumann_eps: float | None = None,
    ) -> None:
        super().__init__()
        self.size, self.orth = size, orth
        self.terms, self.eps = num_cayley_neumann_terms if use_cayley_neumann else None, cayley_neumann_eps
        self.weight = nn.Parameter(torch.empty(size * (size - 1) // 2 if orth else (size, size)))
        self.vector_b = nn.Parameter(torch.empty(size)) if mag_b else None
        self.vector_a = nn.Parameter(torch.empty(size)) if mag_a else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, init_weights: bool = True) -> None:
        """Start as the identity; else from a random R."""
        self.weight.zero_() if init_weights else self.weight.normal_(0, 0.1)
        if not self.orth:
            self.weight.diagonal().add_(1)
        for vector in (self.vector_b, self.vector_a):
            if vector is not None:
                vector.fill_(1)

    def get_matrix(self) -> Tensor:
        """The matrix (r, r)."""
        R: Tensor = self.weight
        if self.orth:
            Q = skew(wide(R), self.size)
            R = cayley(Q if self.terms is None else within(Q, self.eps), self.terms).to(self.weight.dtype)
        if self.vector_b is not None:
            R = self.vector_b[:, None] * R
        return R if self.vector_a is None else R * self.vector_a

    def forward(self, input: Tensor) -> Tensor:
        """input (..., r) through the matrix."""
        return input @ self.get_matrix().to(input.dtype).T


# ------------------------------------------------------------------ OSF
def decompose_weight_matrix(weight: Tensor, top_k: int) -> dict[str, Any]:
    """The singular value decomposition of a weight (out, in): its `top_k` largest parts frozen, the others trained."""
    U, S, V = torch.linalg.svd(weight.float(), full_matrices=False)
    k = min(top_k, len(S))
    parts = {"U": U.T, "S": S, "V": V}
    high = {f"{name}_high": part[:k].to(weight.dtype).contiguous() for name, part in parts.items()}
    low = {f"{name}_low": nn.Parameter(part[k:].to(weight.dtype).contiguous()) for name, part in parts.items()}
    high["U_high"], low["U_low"] = high["U_high"].T, nn.Parameter(low["U_low"].detach().T.contiguous())
    return {**high, **low, "rank_high": k}


@torch.no_grad()
def project_gradient_to_orthogonal_space(svd_dict: dict[str, Any]) -> None:
    """Take the frozen directions out of the gradients of `U_low` and `V_low`, in place."""
    U, V = svd_dict["U_low"].grad, svd_dict["V_low"].grad
    if U is not None:
        U.copy_(projected_off(U, svd_dict["U_high"]))
    if V is not None:
        V.copy_(projected_off(V.mT, svd_dict["V_high"].mT).mT)


# ------------------------------------------------------------------ AdaMSS
def get_trainable_subspaces(num_subspaces: int) -> list[int]:
    """The numbers of all clusters: all are trained at the start."""
    return list(range(num_subspaces))


def clustering_Z(VT: Tensor, num_subspaces: int, iternum: int) -> tuple[Tensor, int]:
    """(which cluster each row of VT (rows, r) is in (rows,), how many clusters)."""
    return adamss.cluster_labels(VT, num_subspaces, iternum), num_subspaces


def seg_locations(index: Tensor) -> dict[int, Tensor]:
    """{cluster: its rows} of clusters (rows,)."""
    return dict(zip(index.unique().tolist(), adamss.members(index), strict=True))


def slice_pca(
    tensor: Tensor, r: int, device: Any, dtype: torch.dtype = torch.float32, random_seed: int = 0
) -> tuple[Tensor, Tensor]:
    """(V (..., r, in), U (..., out, r)) of the first singular vectors of matrices (..., out, in)."""
    M = tensor.to(device=device, dtype=torch.float32)
    U, V = adamss.leading(M, min(r, *M.shape[-2:]), random_seed)
    return V.to(dtype), U.to(dtype)


# ------------------------------------------------------------------ X-LoRA
class TemperatureScaledSoftmax(nn.Module):
    """softmax(logits / temperature) over the last axis."""

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, logits: Tensor) -> Tensor:
        """The weights."""
        return torch.softmax(logits / self.temperature, -1)
