"""DoRA (Liu et al. 2024, https://arxiv.org/abs/2402.09353, eq. 5).   W' = m · (W + s B A) / ||W + s B A||.

The norm is of each row and a constant in the backward pass (section 4.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.core.families import LowRank, wide
from trimtab.core.kernels.grouped import stacked
from trimtab.core.method import Call, Leaf, Leaves
from trimtab.core.site import Site
from trimtab.init import mutates, start


class Dora(LowRank):
    """A magnitude m (out,) and a direction of low rank."""

    when = "low ranks, closer to full training; slower than LoRA"
    example = {"use_dora": True}
    reads = True
    prefix = "lora_"
    kinds = frozenset({"linear", "embedding", "conv", "attention", "parameter"})
    fused = frozenset({"linear", "embedding", "conv"})
    mutates = staticmethod(lambda config: mutates(config.init_lora_weights))

    @classmethod
    def leaves(cls, site: Site, config: Any, shared: Leaves) -> Leaves:
        return cls.pair(site, config.r) | {"lora_magnitude_vector.weight": Leaf(site.vector())}  # (out,) or (1, out)

    def setup(self, config: Any) -> None:
        self.scale(config.r, config.lora_alpha, config.scaling(), config.lora_dropout)

    def reset(self, config: Any) -> Tensor | None:
        W = start(config.init_lora_weights, self)
        m = self.norm(self.site.matrix() if W is None else W)
        self.lora_magnitude_vector.copy_(m.view_as(self.lora_magnitude_vector))
        return W

    @torch.no_grad()
    def norm(self, W: Tensor) -> Tensor:
        """||W + s·B·A|| of each row (..., out), of the pair as it is."""
        return norm_of(W, *self.matrices, self.scaling)

    def ratio(self) -> Tensor:
        """m / ||W + s·B·A|| with the base's own W, also where other adapters are stacked below (..., out)."""
        norm = self.norm(self.site.matrix())
        return wide(self.lora_magnitude_vector).view_as(norm) / norm

    def weight(self, W: Tensor) -> Tensor:
        return self.ratio()[..., None] * (W + self.delta())

    def bias(self, b: Tensor | None) -> Tensor | None:
        own = self.site.bias()
        if b is None or own is None:
            return None if b is None else self.ratio() * b
        return own + self.ratio() * (b - own)  # what adapters below have added counts as part of the direction

    def after(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        site, g = self.site, self.ratio()
        dropped = call.drop(self, x, self.dropout)
        h, B = self.update(dropped)
        B = (g[..., None] * B).to(B.dtype)
        if dropped is not x:  # the direction sees the dropped input, the base path the whole one
            return site.add(y + site.spread(g - 1) * site.apply(dropped, site.matrix()), h, B)
        b = site.bias()
        return site.add(y, h, B, g, None if b is None else (1 - g) * b)

    @staticmethod
    def rows(stacks: Sequence[Sequence[Any]], y: Tensor, x: Tensor, cut: Any, calls: Sequence[Call]) -> Tensor | None:
        methods = [m for stack in stacks for m in stack]
        dropped = methods[0].training and any(m.dropout for m in methods)
        if methods[0].site.kind != "linear" or cut.rows is None or dropped:
            return None
        return LowRank.added(stacks, y, x, cut, gates)


def norm_of(W: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    """||W + s·B·A|| of each row (..., out), without forming the sum."""
    W, A, B = wide(W), wide(A), wide(B)
    square = W.square().sum(-1) + 2 * s * ((W @ A.mT) * B).sum(-1) + s * s * ((B @ (A @ A.mT)) * B).sum(-1)
    return square.clamp_min(0).sqrt()


def gates(stacks: Sequence[Sequence[Dora]]) -> tuple[list[list[Any]], Tensor, Tensor | None]:
    """The updates of each group, and its gate and shift (groups, out): y -> gate·y + shift + the updates.

    A method scales what those below it in its row have added, too: gates multiply.
    """
    methods = [m for stack in stacks for m in stack]
    ratios = iter(ratios_of(methods))
    updates, found = [], []
    b, none = methods[0].site.bias(), torch.ones_like(wide(methods[0].lora_magnitude_vector)).flatten()
    for stack in stacks:
        gate, own = none, []
        for method, ratio in reversed([(m, next(ratios)) for m in stack]):
            gate = gate * ratio
            A, B = method.matrices
            own.append((A, (gate[:, None] * B).to(B.dtype), method.scaling))
        updates.append(own)
        found.append(gate)
    gate = torch.stack(found)
    return updates, gate, None if b is None else (1 - gate) * b


def ratios_of(methods: Sequence[Dora]) -> Tensor:
    """`ratio` of each method at one site (methods, out): the products with W are one for all."""
    site, ms = methods[0].site, torch.stack([wide(m.lora_magnitude_vector).flatten() for m in methods])
    with torch.no_grad():
        W = wide(site.matrix())
        pairs = [m.matrices for m in methods]
        updates = [[(wide(A), wide(B), m.scaling)] for (A, B), m in zip(pairs, methods, strict=True)]
        A, B = stacked(updates, range(len(methods)))
        down = B.mT  # (methods, out, r), the scale included
        square = W.square().sum(-1) + 2 * ((W @ A) * down).sum(-1) + ((down @ (A.mT @ A)) * down).sum(-1)
        norm = square.clamp_min(0).sqrt()
    return ms / norm
