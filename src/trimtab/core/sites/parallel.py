"""Linear layers cut over processes by their outputs or by their inputs: tensor parallelism, as transformers has it.

The layer's own forward takes and gives each process's part. An adapter is whole in every process, and the same: where W
is cut by outputs, the update's last product is cut as W is, and its gradients are gathered; where it is cut by inputs,
the update's first product is, and its parts are added up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.site import LinearSite
from trimtab.formats import weights


class ParallelLinearSite(LinearSite):
    """A linear layer whose weight is one process's part of W (out, in), and whose forward exchanges what it must."""

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        """An nn.Linear with a sharded weight and a forward of its own (under FSDP2 it has torch's)."""
        cut = getattr(layer._parameters.get("weight"), "device_mesh", None) is not None
        return cut and isinstance(layer, nn.Linear) and "forward" in layer.__dict__

    @property
    def mesh(self) -> Any:
        """The processes that have the parts."""
        weight: Any = self.layer._parameters[self.param]
        return weight.device_mesh

    def plain(self) -> None:
        """Its forward does more than multiply."""

    def widens(self, x: Tensor) -> bool:
        """Factors take the input's number format."""
        return False

    def matrix(self) -> Tensor:
        """W whole: every process takes part."""
        W: Any = super().matrix()
        return W.full_tensor() if hasattr(W, "full_tensor") else W  # type: ignore[no-any-return]

    def write(self, W: Tensor, b: Tensor | None) -> None:
        """Give the layer its parts of new parameters."""
        weights.install(self.layer, {k: nn.Parameter(v, requires_grad=False) for k, v in self.named(W, b).items()})

    def named(self, W: Tensor, b: Tensor | None) -> dict[str, Tensor]:
        """This process's parts of W and b: a bias is cut where the outputs are."""
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        weight: Any = self.layer._parameters[self.param]
        by_outputs = weight.placements[0] == Shard(0)
        places = {self.param: weight.placements, self.bias_param: [Shard(0) if by_outputs else Replicate()]}
        return {  # each process has the whole value: none sends
            name: distribute_tensor(value.detach(), self.mesh, places[name], src_data_rank=None)
            for name, value in super().named(W, b).items()
        }

    def apply(self, x: Tensor, M: Tensor) -> Tensor:
        """x Mᵀ (..., k), whole, of an x that is whole or this process's part."""
        if x.shape[-1] == M.shape[1]:
            return super().apply(x, M)
        from torch.distributed.tensor import Replicate, Shard

        flat = self._placed(x.flatten(0, -2), Shard(1), M.shape[1])
        h = flat @ self._placed(M, Replicate()).redistribute(placements=[Shard(1)]).T
        return h.redistribute(placements=[Replicate()]).to_local().unflatten(0, x.shape[:-1])  # type: ignore[no-any-return]

    def add(self, y: Tensor, h: Tensor, M: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """y + h Mᵀ (y scaled and shifted before), of an h that is whole; y is whole or this process's part."""
        if y.shape[-1] == M.shape[0]:
            return super().add(y, h, M, scale, shift)
        from torch.distributed.tensor import Replicate, Shard

        cut = lambda t: self._placed(t, Replicate()).redistribute(placements=[Shard(0)])
        flat = self._placed(h.flatten(0, -2), Replicate())
        u = (flat @ cut(M).T).to_local().unflatten(0, h.shape[:-1])
        scale, shift = (None if v is None else cut(v).to_local() for v in (scale, shift))
        return self.moved(y, scale, shift) + u

    def mix(self, h: Tensor, M: Tensor) -> Tensor:
        """h Mᵀ: not known here, since whether an output is whole is seen on the output."""
        raise NotImplementedError(f"'{self.name}' is cut over processes: this method cannot adapt it.")

    def _placed(self, t: Tensor, placement: Any, width: int | None = None) -> Any:
        """What each process has of a tensor, as the one tensor it is; its last axis is `width` where parts differ."""
        from torch.distributed.tensor import DTensor

        shape = torch.Size((*t.shape[:-1], width or t.shape[-1]))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(t.contiguous(), self.mesh, [placement], run_check=False, shape=shape, stride=stride)
