"""nn.MultiheadAttention: three projections in one parameter, and a fourth in a Linear that is read, never called."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.site import Arguments, LinearSite, Site
from trimtab.errors import ConfigError, RouteError


class ReadLinearSite(LinearSite):
    """The output projection of an nn.MultiheadAttention: its weight is used without calling it."""

    reads = frozenset({"weight", "bias"})
    fused = False

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        """The class of Linear that stands nowhere else."""
        return isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear)


class AttentionSite(Site):
    """The input projections W (3·d, d) of an nn.MultiheadAttention; its output projection is adapted along."""

    kind = "attention"
    weighs, bias_param = "in_proj_weight", "in_proj_bias"
    fused, whole = False, True
    parts = ("out_proj",)

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        """Any nn.MultiheadAttention."""
        return isinstance(layer, nn.MultiheadAttention)

    def __init__(self, owner: Any, name: str, param: str = "") -> None:
        layer = owner.frozen
        if layer.in_proj_weight is None:
            raise ConfigError(
                f"'{name}' is a MultiheadAttention whose keys (kdim={layer.kdim}) or values (vdim={layer.vdim}) have "
                f"another width than its queries ({layer.embed_dim}): it has no common projection to adapt. Name its "
                "parameters in `target_parameters` instead (q_proj_weight, k_proj_weight, v_proj_weight)."
            )
        super().__init__(owner, name, param)

    def apply(self, x: Tensor, M: Tensor) -> Tensor:
        """What goes into its projections is known to the attention only."""
        raise NotImplementedError(f"'{self.name}' is an attention: adapters change its weights, not their inputs.")

    @property
    def axis(self) -> int:
        """The dimension of rows in a query, key or value."""
        return 0 if self.layer.batch_first else 1

    def rows(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, torch.device]:
        """The rows of the query."""
        query = args[0] if args else kwargs["query"]
        if query.is_nested or query.ndim != 3:
            raise RouteError(f"'{self.name}' sees a query that has no dimension of rows.")
        return query.shape[self.axis], query.device

    def cut(self, args: tuple[Any, ...], kwargs: dict[str, Any], rows: Tensor) -> Arguments:
        """These rows of query, key, value and masks (a mask of all rows alike has two dimensions)."""
        names = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        heads: int = self.layer.num_heads  # type: ignore[assignment]
        for name in ("query", "key", "value"):
            given[name] = given[name].index_select(self.axis, rows)
        if given.get("key_padding_mask") is not None:
            given["key_padding_mask"] = given["key_padding_mask"][rows]
        mask = given.get("attn_mask")
        if mask is not None and mask.ndim == 3:
            given["attn_mask"] = mask.unflatten(0, (-1, heads))[rows].flatten(0, 1)
        return (), {**given, **dict(zip(("average_attn_weights", "is_causal"), args[6:], strict=False))}

    def join(self, parts: Any, order: Tensor) -> Any:
        """(outputs, attention weights or None) of all rows."""
        outputs, weights = zip(*parts, strict=True)
        rows = torch.cat(outputs, self.axis).index_select(self.axis, order)
        return rows, None if weights[0] is None else torch.cat(weights)[order]
