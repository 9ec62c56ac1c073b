"""C3A (Chen et al. 2024, https://arxiv.org/abs/2407.19342, section 3.4).   W' = W + C,   C_pq = circulant(c_pq) / in.

W is cut into blocks (b, b); that of row p and column q changes by a circulant matrix, C_pq[i, j] = c_pq[(j - i) mod b].
The division by `in` is PEFT's: the paper has none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from trimtab.core.architectures import ATTENTION
from trimtab.core.config import LayerConfig, PeftType, help_field, match_pattern
from trimtab.core.families import wide
from trimtab.core.kernels import anew
from trimtab.core.method import Call, Leaf, Leaves, Method, require_rank
from trimtab.core.site import Site
from trimtab.errors import ConfigError


@dataclass
class C3AConfig(LayerConfig):
    """The configuration of a C3A adapter."""

    block_size: int = help_field("The size of a block: a divisor of the inputs and the outputs of every layer.", 256)
    bias: str = help_field("Which biases of the base are trained too: none, all or c3a_only.", "none")
    block_size_pattern: dict[str, int] = help_field(
        "Module name or regular expression -> its own block size.", factory=dict
    )
    init_weights: bool | Literal["gaussian", "kaiming_uniform", "xavier_uniform"] = help_field(
        "How c starts: gaussian, kaiming_uniform, xavier_uniform (or False), or from 0 (True).", "xavier_uniform"
    )

    exclude_modules: ClassVar[None] = None  # type: ignore[misc]
    patterns = ("block_size_pattern",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.C3A

    def resolve(self, name: str) -> C3AConfig:
        """This config with the block size that the pattern gives the module `name`."""
        own = self.shallow()
        own.block_size = self.block_size_pattern.get(
            match_pattern(self.block_size_pattern, name) or "", self.block_size
        )
        return own


class C3A(Method):
    """A matrix of circulant blocks: a product by it is a convolution, done by way of the Fourier transform."""

    when = "high rank from few parameters, by FFT"
    example = {"block_size": 64}
    config, prefix = C3AConfig, "c3a_"
    settings = ("block_size",)
    kinds = fused = frozenset({"linear"})
    targets = {**ATTENTION, "gpt2": ["mlp.c_proj"], "gpt_bigcode": ["mlp.c_proj"]}

    @classmethod
    def leaves(cls, site: Site, config: Any, shared: Leaves) -> Leaves:
        b = config.block_size
        require_rank(b, "block_size")
        for what, size in (("input", site.fan_in), ("output", site.fan_out)):
            if size % b:
                raise ConfigError(
                    f"The block size should be a factor of the {what} size. However, the {what} size of '{site.name}' "
                    f"is {size} and the block size is {b}"
                )
        return {"c3a_kernel": Leaf((site.fan_out // b, site.fan_in // b, b))}  # (out / block_size, in / block_size, b)

    def reset(self, config: Any) -> None:
        start = config.init_weights
        if start is True:
            self.c3a_kernel.zero_()
        elif start == "gaussian":
            self.c3a_kernel.normal_()
        elif start == "kaiming_uniform":
            nn.init.kaiming_uniform_(self.c3a_kernel, a=math.sqrt(5))
        else:
            nn.init.xavier_uniform_(self.c3a_kernel)

    def weight(self, W: Tensor) -> Tensor:
        return W + circulants(wide(self.c3a_kernel) / self.site.fan_in)

    def after(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        form = lambda x, c: convolved(wide(x), wide(c) / self.site.fan_in).to(x.dtype)
        return y + anew(form, x, self.c3a_kernel)  # spectra of x are larger than x


def circulants(c: Tensor) -> Tensor:
    """The matrix (out, in) of circulant blocks of kernels c (out / b, in / b, b)."""
    at = torch.arange(c.shape[-1], device=c.device)
    blocks = c[:, :, (at - at[:, None]) % len(at)]  # (out / b, in / b, b, b)
    return blocks.transpose(1, 2).flatten(2, 3).flatten(0, 1)


def convolved(x: Tensor, c: Tensor) -> Tensor:
    """x (..., in) times that matrix (..., out), by way of the Fourier transform."""
    b = c.shape[-1]
    spectrum = torch.fft.rfft(x.unflatten(-1, (-1, b)))
    spectrum = torch.einsum("...qf,pqf->...pf", spectrum, torch.fft.rfft(c).conj())
    return torch.fft.irfft(spectrum, n=b).flatten(-2)
