"""Merging: adapters folded into the frozen layer's parameters, and taken out again bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trimtab.errors import NotMergeable, ReadOnlyWeight
from trimtab.formats import weights
from trimtab.layer.face import Face
from trimtab.layer.plan import listed
from trimtab.layer.spelling import fold


class Merging(Face):
    """What of an adapted layer has to do with merges. The originals are held by `originals`."""

    @property
    def merged(self) -> bool:
        """Whether any adapter is merged into the base layer."""
        return bool(self.merged_adapters)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None, keep: bool = True) -> None:
        """Fold adapters into the base layer's parameters; the originals are held, so `unmerge` is exact.

        Args:
            safe_merge: raise, with nothing changed, when the result is not finite.
            adapter_names: which (the active ones by default); those that are not here or merged already are skipped.
            keep: hold the originals; False writes into their storage (for export).

        Raises:
            ValueError: a method that has no single weight, or with `safe_merge` a result that is not finite.
        """
        names = listed(self.active_adapters if adapter_names is None else adapter_names)
        new = [n for n in names if n in self.methods and n not in self.merged_adapters]
        if not new:
            return
        for method in (m for n in new for m in self.methods[n]):
            if not method.mergeable:
                raise NotMergeable(f"{type(method).__name__} cannot be merged: it has no single weight.")
        wanted, originals = [*self.merged_adapters, *new], self.originals
        with originals.instead({**originals.held, **originals.strangers(wanted)}):
            folded = fold([m for n in wanted for m in self.methods[n]])
        if safe_merge:
            for W, b in folded.values():
                if not torch.isfinite(W).all() or (b is not None and not torch.isfinite(b).all()):
                    raise ValueError(
                        f"NaNs detected in the merged weights. The adapter {', '.join(new)} seems to be broken"
                    )
        first = not originals.held
        originals.hold({p for site in folded for p in site.params}, wanted)
        try:
            for site, (W, b) in folded.items():
                site.write(W, b)
        except BaseException:
            if first:
                originals.restore()
            raise
        self.merged_adapters = wanted
        if not keep:
            self.settle()
        self.changed()

    def settle(self) -> None:
        """Make a merge final: where the format allows it the numbers go into the storage that was there before."""
        layer, originals = self.frozen, self.originals
        for param, own in list(originals.held.items()):
            new = layer._parameters.get(param)
            if own is None or new is None or not (type(own) is type(new) is nn.Parameter):
                continue
            if own.shape == new.shape and own.dtype == new.dtype and own.device == new.device:
                with torch.no_grad():
                    own.data.copy_(new.data)
                weights.install(layer, {param: own})
        originals.settle()

    def unmerge(self) -> None:
        """Put the original parameter objects back."""
        if self.merged_adapters and self.originals.final:
            raise ReadOnlyWeight(f"Layer '{self.name}' was merged with keep=False: its original weight is gone.")
        self.originals.restore()
        self.merged_adapters = []
        self.changed()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What the adapter adds to the layer's weight, in the layer's own layout."""
        self.bring(adapter)
        with self.originals.instead(self.originals.others((adapter,))):
            ((site, (W, _)),) = fold(list(self.methods[adapter])).items()
            return site.store(W - site.matrix().to(W.dtype))
