"""Whether the numbers of a file can be meant: none is NaN, infinite or beyond all measure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from trimtab.core.fields import LARGEST
from trimtab.files.codec import PREFIX, Slot


def unsound(slots: Iterable[Slot], tensors: Mapping[str, Tensor], prefix: str = PREFIX) -> list[str]:
    """The keys of tensors that are NaN, infinite or beyond all measure somewhere (fp16 ends at 65,504)."""
    held: dict[str, Tensor] = {}
    for slot in slots:
        value = tensors.get(key := slot.on_disk(prefix))
        if value is not None and value.is_floating_point() and value.numel() and slot.trains:
            held[key] = value.float() if value.element_size() == 1 else value  # 8-bit floats have no operations
    if all(_sound(joined(held.values()))):  # mostly: in one pass over the whole file
        return []
    return [key for key, good in zip(held, _sound(held.values()), strict=True) if not good]


def _sound(values: Iterable[Tensor]) -> list[bool]:
    extremes = [extreme for value in values for extreme in value.aminmax()]
    if not extremes:
        return []
    place = extremes[0].device  # a model may lie on several
    pairs = torch.stack([extreme.to(place, torch.float32) for extreme in extremes]).view(-1, 2)
    found: list[bool] = (pairs.abs() <= LARGEST).all(1).tolist()  # NaN is not, either
    return found


def joined(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The tensors; views of one tensor that lie in it one right after another as one."""
    runs: list[tuple[Tensor, int]] = []  # (its first tensor, its numbers)
    for tensor in sorted(tensors, key=lambda t: (id(t._base), t.storage_offset())):
        first, count = runs[-1] if runs else (tensor, 0)
        follows = tensor._base is not None and tensor._base is first._base and tensor.dtype == first.dtype
        if count and follows and tensor.storage_offset() == first.storage_offset() + count and tensor.is_contiguous():
            runs[-1] = first, count + tensor.numel()
        else:
            runs.append((tensor, tensor.numel()))
    return [first if count == first.numel() else first.as_strided((count,), (1,)) for first, count in runs]
