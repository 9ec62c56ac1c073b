"""Convolutions of one, two and three dimensions."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.site import Site
from trimtab.errors import ConfigError, ReadOnlyWeight, RouteError
from trimtab.formats import offload, weights


class ConvSite(Site):
    """nn.Conv1d, 2d, 3d: W (out, channels·k), each row a flattened kernel.

    With groups, W has zeros where an output channel does not see an input channel. LoRA's A sees every channel (PEFT
    keeps it so), which makes the sum a matrix that a grouped layer cannot hold: it runs, but cannot be merged.
    """

    kind = "conv"

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        """Any nn.Conv1d, 2d or 3d."""
        return isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)

    def __init__(self, owner: Any, name: str, param: str = "") -> None:
        layer = owner.frozen
        self.groups = layer.groups
        self.kernel = tuple(layer.kernel_size)
        super().__init__(owner, name, param)

    def shape(self) -> tuple[int, int]:
        """(out, channels·k)."""
        layer: Any = self.layer
        return layer.out_channels, layer.in_channels * math.prod(self.kernel)

    def matrix(self) -> Tensor:
        """The original weight (out, channels·k)."""
        return self.dense(weights.read(self.layer, self.stored(self.param)).flatten(1))

    def dense(self, M: Tensor) -> Tensor:
        """A matrix (out, channels/groups·k) of what each group sees as the matrix (out, channels·k) it stands for."""
        return M if self.groups == 1 else torch.block_diag(*M.chunk(self.groups))

    def store(self, W: Tensor) -> Tensor:
        """W (out, channels·k) as a kernel (out, channels/groups, *k)."""
        if self.groups > 1:
            blocks = [rows.chunk(self.groups, 1)[i] for i, rows in enumerate(W.chunk(self.groups))]
            inside = torch.cat(blocks)
            if W.count_nonzero() != inside.count_nonzero():
                raise ReadOnlyWeight(
                    f"'{self.name}' is a convolution in {self.groups} groups, and the adapter lets an output channel "
                    "see input channels of other groups: the sum has no grouped weight. Keep the adapter unmerged."
                )
            W = inside
        return W.reshape(len(W), -1, *self.kernel).contiguous()

    def run(self, W: Tensor, b: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        """The layer's own convolution with another weight."""
        x = args[0] if args else kwargs["input"]
        with offload.running(self.layer):
            b = b if b is None else b.to(self.dtype)
            return self.convolve(x.to(self.device), W.to(self.dtype), b)

    def convolve(self, x: Tensor, M: Tensor, b: Tensor | None) -> Tensor:
        """x convolved with the rows of M (k', channels·k), or (k', channels/groups·k) for each group its own."""
        layer: Any = self.layer
        kernel = M.reshape(len(M), -1, *self.kernel)
        groups = layer.in_channels // kernel.shape[1]
        if groups == layer.groups and type(layer).forward in (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward):
            y: Tensor = layer._conv_forward(x, kernel, b)
            return y
        twin = copy.copy(layer)  # another class's own forward, whose padding may be its own
        twin.__dict__.update(groups=groups, _parameters={"weight": kernel, "bias": b})
        return type(layer).forward(twin, x)  # type: ignore[no-any-return]

    def apply(self, x: Tensor, M: Tensor) -> Tensor:
        """x convolved with the rows of M as the layer does, without its bias: strides, padding and dilation are its."""
        return self.convolve(x, M, None)

    def mix(self, h: Tensor, M: Tensor) -> Tensor:
        """A convolution with 1 x 1 kernels: h (rows, k, *), M (k', k)."""
        y: Tensor = getattr(nn.functional, f"conv{len(self.kernel)}d")(h, M[(..., *(None,) * len(self.kernel))])
        return y

    def spread(self, v: Tensor) -> Tensor:
        """A vector (out,) as (out, 1, ...)."""
        return v[(..., *(None,) * len(self.kernel))]

    def down(self, r: int) -> tuple[int, ...]:
        """(r, channels, *k)."""
        if r % self.groups:
            raise ConfigError(
                f"Targeting a {type(self.layer).__name__} with groups={self.groups} and rank {r}. Currently, support "
                "is limited to conv layers where the rank is divisible by groups. Either choose a different rank or do "
                f"not target this specific layer, '{self.name}'."
            )
        return (r, self.fan_in // math.prod(self.kernel), *self.kernel)

    def up(self, r: int) -> tuple[int, ...]:
        """(out, r/groups, 1, ...)."""
        return (self.fan_out, r // self.groups, *(1 for _ in self.kernel))

    def vector(self) -> tuple[int, ...]:
        """(1, out, 1, ...)."""
        return (1, self.fan_out, *(1 for _ in self.kernel))

    def lower(self, A: Tensor) -> Tensor:
        """A (r, channels, *k) as (r, channels·k)."""
        return A.flatten(1)

    def upper(self, B: Tensor) -> Tensor:
        """B (out, r/groups, 1, ...) as (out, r): each group has its own part of the rank."""
        return self.dense(B.flatten(1))

    def lead(self, x: Tensor) -> tuple[int, ...]:
        """The rows of x (rows, channels, *).

        Raises:
            RouteError: it has none.
        """
        if x.ndim != len(self.kernel) + 2:
            raise RouteError(f"'{self.name}' sees an input of shape {tuple(x.shape)}, which has no dimension of rows.")
        return tuple(x.shape[:1])
