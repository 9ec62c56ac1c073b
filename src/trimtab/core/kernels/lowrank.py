"""Frozen linear layers and their low-rank updates in one step: y = x·Wᵀ + b + s·(x∘m)·Aᵀ·Bᵀ.

Autograd's own spelling keeps x, x∘m, a float mask and x·Aᵀ, and forms three temporaries as large as y. Here the update
is added to the base product in place, forward and backward, and what is kept is x·Aᵀ (T, r), the places that dropout
emptied, and x only where the graph does not hold what it was made of (`rebuilt`).

Factors of three axes, A (G, r, in) and B (G, out, r), are those of G equal pieces of the batch, one after another: each
piece gets its own update, by batched products.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.core.dropout import Places
from trimtab.core.kernels import half
from trimtab.core.kernels.dense import accumulate, linear, outer, product
from trimtab.core.kernels.rebuilt import Rebuilt, rebuilt
from trimtab.core.kernels.split import joined, split, split_product
from trimtab.core.kernels.usual import autocasts, ordinary, product_dtype, recorded

Tensors = Sequence[Any]
Pair = tuple[Tensor, Tensor | None]
SMALL = 1 << 16  # the elements of x and y up to which bfloat16 is widened rather than the factors split: decoding
SPARSE = 0.2  # up to this p the places that dropout emptied are kept, above they are found anew in the backward pass


class Layer(NamedTuple):
    """A frozen linear layer with its update."""

    W: Tensor  # (out, in), frozen
    b: Tensor | None  # (out,)
    A: Tensor  # (r, in), or (G, r, in)
    B: Tensor  # (out, r), or (G, out, r)
    scale: float
    drop: Places | None = None


def lora_linear(
    x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scale: float, drop: Places | None = None
) -> Tensor:
    """x·Wᵀ + b + scale·drop(x)·Aᵀ·Bᵀ (..., out), for x (..., in), W (out, in), A (r, in), B (out, r).

    The output has the base product's number format. Under autocast everything is computed in its format, as PEFT does;
    else factors in fp32 act exactly on an x in half precision: the output is no further from the true one than PEFT's.
    Anything unusual (a W that is trained, tensor subclasses, tracing, function transforms) takes the plain spelling.
    """
    if drop is None and not torch.is_grad_enabled() and x.ndim > 1:
        if x.dtype == W.dtype == A.dtype == B.dtype:  # asks nothing more: a row a step when text is generated
            flat = x if x.ndim == 2 else x.flatten(0, -2)
            plainly = recorded() or autocasts(x) or type(flat) is not Tensor
            form = F.linear if plainly else linear
            y, u = form(flat, W, b), form(flat, A)
            plainly = plainly or type(y) is not Tensor
            add = torch.addmm if plainly else Tensor.addmm_  # y is nobody else's
            y = add(y, u, B.t(), alpha=scale)
            return y if x.ndim == 2 else y.view(*x.shape[:-1], y.shape[-1])
        if _fits(x, x.dtype, W, A, B) and not autocasts(x):
            return _unrecorded(x, W, b, A, B, scale)
    return lora_linear_group(x, [Layer(W, b, A, B, scale, drop)])[0]


def lora_linear_group(x: Tensor, layers: Sequence[Layer]) -> tuple[Tensor, ...]:
    """`lora_linear` of layers that share their input: q, k and v, or gate and up.

    Their skinny products are one where nothing is dropped; the gradient of x is summed where it is formed.
    """
    dtype = product_dtype(x)
    layers = [layer._replace(drop=None) if layer.drop and not layer.drop.p else layer for layer in layers]
    if not all(_fits(x, dtype, layer.W, layer.A, layer.B) for layer in layers):
        return tuple(plain(x, *layer) for layer in layers)
    source = rebuilt(x) if any(layer.A.requires_grad for layer in layers) else None
    tensors = [t for layer in layers for t in layer[:4]]
    outs: tuple[Tensor, ...] = _LowRank.apply(x, dtype, source, _parts(x, dtype, layers), *tensors)
    return outs


def fits(x: Tensor, layers: Sequence[Layer]) -> bool:
    """Whether layers of one input can be stepped together: a fused step applies to each."""
    dtype = product_dtype(x)
    return all(layer.W.ndim == 2 and _fits(x, dtype, layer.W, layer.A, layer.B) for layer in layers)


def plain(
    x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scale: float, drop: Places | None = None
) -> Tensor:
    """`lora_linear` by single operations."""
    y = F.linear(x, W, b)
    x = x if drop is None else drop(x)
    if A.ndim == 3:
        dtype = torch.promote_types(y.dtype, A.dtype)
        u = torch.bmm(x.reshape(len(A), -1, x.shape[-1]).to(dtype), A.mT.to(dtype))
        return (y.to(dtype) + torch.bmm(u, B.mT.to(dtype)).view(y.shape) * scale).to(y.dtype)
    if x.dtype in half.HALF and A.dtype == B.dtype == torch.float32 and not autocasts(x):
        return half.add_product(y, half.project(x, A) * scale, B)
    u = F.linear(x, A.to(x.dtype))
    if y.dtype != u.dtype or y.ndim < 2:
        return y + F.linear(u, B.to(u.dtype)) * scale
    return torch.addmm(y.flatten(0, -2), u.flatten(0, -2), B.to(u.dtype).t(), alpha=scale).view_as(y)


def _fits(x: Tensor, dtype: torch.dtype, W: Tensor, A: Tensor, B: Tensor) -> bool:
    """Whether the fused step applies."""
    if recorded() or W.requires_grad or not x.is_floating_point() or not all(map(ordinary, (x, W, A, B))):
        return False
    if autocasts(x):
        return True
    narrow = dtype == torch.float16 and A.dtype != dtype  # too small a range for the parts of a split factor
    return W.dtype == dtype and A.dtype == B.dtype and not narrow


def _exact(x: Tensor, dtype: torch.dtype, A: Tensor) -> bool:
    """Whether factors in fp32 act on bfloat16 exactly; else they are cast to the product's format."""
    return dtype == torch.bfloat16 and A.dtype == torch.float32 and not autocasts(x)


def _unrecorded(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """The forward pass alone, in place, of factors in another number format than x."""
    flat = x.flatten(0, -2)
    y = linear(flat, W, b)
    if x.dtype == torch.bfloat16 and A.dtype == torch.float32:
        if max(flat.numel(), y.numel()) <= SMALL:
            y = torch.addmm(y.float(), torch.mm(flat.float(), A.t()), B.t(), alpha=scale).bfloat16()
        else:
            y.addmm_(joined(*split_product(flat, split(A, -2).t())), split(B, -1).t(), alpha=scale)
    else:
        y.addmm_(torch.mm(flat, A.to(x.dtype).t()), B.to(x.dtype).t(), alpha=scale)
    return y.unflatten(0, x.shape[:-1])


def _scale(layer: Layer) -> float:
    """The scale of the update, that of what dropout leaves included."""
    return layer.scale if layer.drop is None else layer.scale * layer.drop.gain


def _pieces(x: Tensor, A: Tensor) -> Tensor:
    """x (T, n), or its pieces (G, T / G, n) where each has a factor of its own."""
    return x if A.ndim == 2 else x.reshape(len(A), -1, x.shape[-1])


def _add_product(y: Tensor, x: Tensor, M: Tensor, scale: float) -> None:
    """y (T, n) += scale·x·M, in place."""
    if x.ndim == 2:
        y.addmm_(x, M, alpha=scale)
    else:
        y.view(len(M), -1, y.shape[-1]).baddbmm_(x, M, alpha=scale)


def _emptied(x: Tensor, places: Tensor | None) -> Tensor:
    """A copy of x with these places at zero."""
    if places is None:
        return x
    x = x.clone(memory_format=torch.contiguous_format)
    x.view(-1).index_fill_(0, places.long(), 0)
    return x


def _factor(M: Tensor, dtype: torch.dtype, dim: int, exact: bool) -> Tensor:
    """A factor ready to be multiplied with, its rank's axis being `dim`."""
    return split(M, dim) if exact else M.to(dtype)


def _down(x: Tensor, M: Tensor, dtype: torch.dtype, exact: bool) -> Pair:
    """x·M, in two parts where it is exact."""
    if exact:
        return split_product(x, split(M, -1))
    return (product(x, M.to(dtype)) if x.ndim == 2 else torch.bmm(x, M.to(dtype))), None


def _wide(hi: Tensor, lo: Tensor | None) -> Tensor:
    """What `_down` gave, ready to be multiplied with a factor."""
    return hi if lo is None else joined(hi, lo)


def _outer(x: Tensor, hi: Tensor, lo: Tensor | None) -> Tensor:
    """x transposed times what `_down` gave (n, r), each the way round that is faster; in fp32 where it is in two."""
    mm = torch.mm if x.ndim == 2 else torch.bmm
    if lo is None:
        return outer(x, hi) if x.ndim == 2 else mm(hi.mT, x).mT
    both = mm(torch.cat([hi, lo], -1).mT, x)
    r = hi.shape[-1]
    return both[..., :r, :].float().add_(both[..., r:, :]).mT


def _beside(pairs: Sequence[Pair]) -> Pair:
    """What `_down` gave for each layer of a part, side by side."""
    if len(pairs) == 1:
        return pairs[0]
    los = [lo for _, lo in pairs if lo is not None]
    return torch.cat([hi for hi, _ in pairs], -1), torch.cat(los, -1) if los else None


def _add(dx: Tensor, low: Tensor, M: Tensor, scale: float, places: Tensor | None) -> None:
    """dx += scale·low·M, in place, but for the places that dropout emptied."""
    if places is None:
        _add_product(dx, low, M, scale)
        return
    flat, places = dx.view(-1), places.long()
    before = flat.index_select(0, places)
    _add_product(dx, low, M, scale)
    flat.scatter_(0, places, before)


class _Part(NamedTuple):
    """Layers whose skinny products are one: a whole group where nothing is dropped and the scales agree, else one."""

    members: range
    scale: float  # that of dropout included
    drop: Places | None
    exact: bool


def _parts(x: Tensor, dtype: torch.dtype, layers: Sequence[Layer]) -> list[_Part]:
    first, wet = layers[0], any(layer.drop for layer in layers)
    if not wet and all(layer.scale == first.scale and layer.A.dtype == first.A.dtype for layer in layers):
        return [_Part(range(len(layers)), first.scale, None, _exact(x, dtype, first.A))]
    return [
        _Part(range(k, k + 1), _scale(layer), layer.drop, _exact(x, dtype, layer.A)) for k, layer in enumerate(layers)
    ]


class _LowRank(torch.autograd.Function):
    """(x, W₁, b₁, A₁, B₁, W₂, ...) to (y₁, y₂, ...)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dtype: torch.dtype, source: Rebuilt | None, parts: list[_Part], *tensors: Any
    ) -> tuple[Tensor, ...]:
        W, b, A, B = (tensors[i::4] for i in range(4))
        flat = x.reshape(-1, x.shape[-1]).to(dtype)
        outs, his, los, kept = [], [], [], []
        for part in parts:
            places = None if part.drop is None else part.drop.dropped(x.shape[-1])
            M = _stacked(A, part.members)
            hi, lo = _down(_pieces(_emptied(flat, places), M), M.mT, dtype, part.exact)
            his.append(hi)
            los.append(lo)
            kept.append(None if places is None or part.drop is None or part.drop.p > SPARSE else _narrow(places, flat))
            for k, cut in _cuts(A, part):
                y = linear(flat, W[k].to(dtype), None if b[k] is None else b[k].to(dtype))
                wide = _wide(hi[..., cut], None if lo is None else lo[..., cut])
                _add_product(y, wide, _factor(B[k], dtype, -1, part.exact).mT, part.scale)
                outs.append(torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[1])))  # others may write into it
        train_A, train_B = (any(ctx.needs_input_grad[4 + i :: 4]) for i in (2, 3))
        saved = x if train_A and source is None else None
        low = (*his, *los) if train_B else (None,) * (2 * len(parts))
        ctx.save_for_backward(saved, *W, *A, *B, *low, *kept)
        ctx.source, ctx.parts, ctx.dtype = source, parts, dtype
        ctx.shape, ctx.autocast = x.shape, autocasts(x)
        ctx.set_materialize_grads(False)  # what nobody used has no gradient
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, *tensors = ctx.saved_tensors
        x = x if ctx.source is None else ctx.source.take()
        n = len(dys)
        device = next((dy.device.type for dy in dys if dy is not None), None)
        if device is None:
            return (None,) * len(ctx.needs_input_grad)
        W, A, B = tensors[:n], tensors[n : 2 * n], tensors[2 * n : 3 * n]
        his, los, kept = (tensors[3 * n + i * len(ctx.parts) :][: len(ctx.parts)] for i in range(3))
        if torch.is_grad_enabled():  # create_graph=True
            return _differentiable(ctx, x, W, A, B, dys)
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
            return _gradients(ctx, x, W, A, B, list(zip(his, los, kept, strict=True)), dys)


def _gradients(
    ctx: Any, x: Tensor | None, W: Tensors, A: Tensors, B: Tensors, parts: Tensors, dys: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Of x, W, b, A and B; `parts` has what was kept of each part: x·Aᵀ in two, and the places dropped."""
    dtype, need = ctx.dtype, ctx.needs_input_grad
    flat = None if x is None else x.reshape(-1, x.shape[-1]).to(dtype)
    given = {k: dy.reshape(-1, dy.shape[-1]) for k, dy in enumerate(dys) if dy is not None}
    grads: list[Tensor | None] = [None] * len(need)
    dx: Tensor | None = None
    if need[0]:
        for k, dy in given.items():
            dx = product(dy, W[k].to(dtype)) if dx is None else accumulate(dx, dy, W[k].to(dtype))
    for part, (u_hi, u_lo, places) in zip(ctx.parts, parts, strict=True):
        cuts = [(k, cut) for k, cut in _cuts(A, part) if k in given]
        if not cuts:
            continue
        if places is None and part.drop is not None:
            places = part.drop.dropped(ctx.shape[-1])
        dA: Tensor | None = None
        if dx is not None or flat is not None:
            low = _beside([_down(_pieces(given[k], B[k]), B[k], dtype, part.exact) for k, _ in cuts])
            if dx is not None:
                M = _factor(_stacked(A, [k for k, _ in cuts]), dtype, -2, part.exact)
                _add(dx, _wide(*low), M, part.scale, places)
            if flat is not None:
                dA = _outer(_pieces(_emptied(flat, places), B[cuts[0][0]]), *low)
        at = 0
        for k, cut in cuts:
            rank = cut.stop - cut.start
            if need[5 + 4 * k]:
                grads[5 + 4 * k] = given[k].sum(0)
            if need[6 + 4 * k]:
                assert dA is not None
                grads[6 + 4 * k] = dA[..., at : at + rank].mT.to(A[k].dtype).mul_(part.scale)
            if need[7 + 4 * k]:
                dB = _outer(_pieces(given[k], B[k]), u_hi[..., cut], None if u_lo is None else u_lo[..., cut])
                grads[7 + 4 * k] = dB.to(B[k].dtype).mul_(part.scale)
            at += rank
    grads[0] = None if dx is None else dx.view(ctx.shape)
    return tuple(grads)


def _differentiable(
    ctx: Any, x: Tensor | None, W: Tensors, A: Tensors, B: Tensors, dys: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """The gradients by operations that can be differentiated again."""
    if x is None:
        raise RuntimeError(
            "The second derivative of a LoRA layer whose A is frozen is not known: its input is not kept."
        )
    need, wanted, ys = ctx.needs_input_grad, {0: x}, []
    used = {k: dy for k, dy in enumerate(dys) if dy is not None}
    with torch.autocast(x.device.type, ctx.dtype, enabled=ctx.autocast):
        for part in ctx.parts:
            for k in (k for k in part.members if k in used):
                gain = 1.0 if part.drop is None else part.drop.gain
                ys.append(plain(x, W[k], None, A[k], B[k], part.scale / gain if gain else 0.0, part.drop))
                wanted |= {4 + 4 * k + 2: A[k], 4 + 4 * k + 3: B[k]}
    wanted = {i: t for i, t in wanted.items() if need[i]}
    known = torch.autograd.grad(ys, list(wanted.values()), list(used.values()), create_graph=True)
    found = dict(zip(wanted, known, strict=True))
    biases = {5 + 4 * k: dy.flatten(0, -2).sum(0) for k, dy in used.items() if need[5 + 4 * k]}
    return tuple((found | biases).get(i) for i in range(len(need)))


def _stacked(A: Tensors, members: Sequence[int]) -> Tensor:
    """The As of some layers as one factor."""
    return A[members[0]] if len(members) == 1 else torch.cat([A[k] for k in members], -2)


def _cuts(A: Tensors, part: _Part) -> list[tuple[int, slice]]:
    """(layer, its columns of the part's skinny products) for each layer of a part."""
    found, at = [], 0
    for k in part.members:
        found.append((k, slice(at, at + A[k].shape[-2])))
        at += A[k].shape[-2]
    return found


def _narrow(places: Tensor, x: Tensor) -> Tensor:
    return places.int() if x.numel() < 2**31 else places
