"""A causal model's head and loss in one step, in its own forward: whoever calls it, our loop or another's trainer.

While the model computes a loss in training, its head hands on the hidden states, and its loss function has the head's
product with them: on supervised rows, a chunk at a time (`linear_cross_entropy`). No output has logits then.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.kernels import linear_cross_entropy
from trimtab.core.kernels.usual import recorded

PARTS = "_trimtab_loss_parts"  # where a model says that its loss is wanted in parts


class FusedLoss:
    """What `fuse_loss` put into a model."""

    def __init__(self, base: nn.Module) -> None:
        self.base = base
        self.hooks = [
            base.register_forward_pre_hook(_begin, with_kwargs=True),
            base.register_forward_hook(_end, with_kwargs=True, always_call=True),
        ]

    @contextlib.contextmanager
    def apart(self, rows: Sequence[int]) -> Iterator[None]:
        """In the block the loss is one sum for each of several parts of the batch, of so many rows each: (parts,)."""
        self.base.__dict__[PARTS] = list(rows)
        try:
            yield
        finally:
            del self.base.__dict__[PARTS]

    def remove(self) -> None:
        """The model computes its loss by itself again."""
        for hook in self.hooks:
            hook.remove()


def fuse_loss(model: nn.Module) -> FusedLoss | None:
    """From now on a forward in training that is given `labels` computes head and loss in one step; exact.

    Its output has a loss and no logits; without labels, in evaluation and without gradients nothing changes. A head
    that is trained by an adapter, hooked, sharded or quantised is left alone, forward by forward.

    Args:
        model: a causal language model of transformers, with adapters or without.

    Returns:
        What takes it back, or None (and nothing was done) where the model does more between head and loss than shift
        the labels: caps or scales its logits, has a loss of its own.
    """
    model = getattr(model, "module", model)  # DDP's
    base: Any = getattr(model, "get_base_model", lambda: model)()
    if not _is_causal(base) or _head(base) is None or not _goes_straight(base):
        return None
    return FusedLoss(base)


class _Loss:
    """Stands for the head's forward and for the loss function during one forward."""

    def __init__(self, head: nn.Linear, before: Any, parts: Sequence[int] | None = None) -> None:
        self.head, self.before = head, before  # `before`: a loss function that was set on the model itself
        self.parts = parts
        self.hidden: Tensor | None = None
        self.called = self.straight = False

    def forward(self, hidden: Tensor) -> Tensor:
        """The head's: hand on what it is given."""
        self.hidden = hidden
        return hidden

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor | None,
        vocab_size: int,
        num_items_in_batch: Any = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        self.called, self.straight = True, logits is self.hidden and vocab_size == self.head.out_features
        if not self.straight:
            raise _NotStraight
        if shift_labels is None:
            assert labels is not None
            shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        W, b = self.head.weight, self.head.bias
        if self.parts is not None:
            both = zip(logits.split(self.parts), shift_labels.split(self.parts), strict=True)
            kind: Any = {"bias": b, "ignore_index": ignore_index, "reduction": "sum"}
            return torch.stack([linear_cross_entropy(h, W, wanted, **kind) for h, wanted in both])
        reduction: Any = "mean" if num_items_in_batch is None else "sum"
        loss = linear_cross_entropy(logits, W, shift_labels, bias=b, ignore_index=ignore_index, reduction=reduction)
        if num_items_in_batch is None:
            return loss
        items = num_items_in_batch
        return loss / (items.to(loss.device) if isinstance(items, Tensor) else items)


class _NotStraight(Exception):
    """What comes to the loss function is not what the head gave."""


def _is_causal(base: Any) -> bool:
    """Whether its loss is transformers' own for causal models; known by name: this floor does not know transformers."""
    loss = getattr(base, "loss_function", None)
    return getattr(loss, "__name__", "") == "ForCausalLMLoss" and getattr(loss, "__module__", "").startswith("transf")


def _head(base: Any) -> nn.Linear | None:
    """The head, where nothing but its product lies between hidden states and logits."""
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if type(head) is not nn.Linear or "forward" in head.__dict__ or type(head.weight) is not nn.Parameter:
        return None
    hooked = head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or head._backward_pre_hooks
    return None if hooked else head


@torch.no_grad()
def _goes_straight(base: Any) -> bool:
    """Whether the loss function is given what the head gave, as it is: tried on two tokens."""
    ids = torch.zeros(1, 2, dtype=torch.long, device=base.get_input_embeddings().weight.device)
    devices = [ids.device] if ids.device.type == "cuda" else []
    graft = base.__dict__.get("_trimtab")  # adapters that must know of the call are not told of this one
    off = contextlib.nullcontext() if graft is None else graft.board.off()
    with torch.random.fork_rng(devices), off:
        loss = _put(base)
        try:
            base(input_ids=ids, labels=ids, use_cache=False)
        except _NotStraight:
            pass
        finally:
            _take(base)
    return loss.straight


def _put(base: Any) -> _Loss:
    head = _head(base)
    assert head is not None
    loss = _Loss(head, base.__dict__.get("_loss_function"), base.__dict__.get(PARTS))
    head.__dict__["forward"] = loss.forward
    base.__dict__["_loss_function"] = loss
    return loss


def _take(base: Any) -> None:
    loss = base.__dict__.pop("_loss_function")
    del loss.head.__dict__["forward"]
    if loss.before is not None:
        base.__dict__["_loss_function"] = loss.before


def _begin(base: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Before a forward: it is fused where it is one of training."""
    wanted = base.training and torch.is_grad_enabled() and kwargs.get("labels") is not None
    tuples = kwargs.get("return_dict") is False or getattr(base.config, "return_dict", True) is False
    if wanted and not tuples and not recorded() and _is_causal(base) and _head(base) is not None:
        _put(base)


def _end(base: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """After it, whatever came of it."""
    if not isinstance(base.__dict__.get("_loss_function"), _Loss):
        return None
    _take(base)
    if output is None:
        return None
    return type(output)(**{k: v for k, v in output.items() if k != "logits"})
