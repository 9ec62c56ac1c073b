"""The loss of a model on rows of tokens: a mean over the trained tokens, in nats."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.train.data import IGNORE, Example, collate

__all__ = ["batch_loss", "loss_of", "takes_positions"]


def loss_of(model: nn.Module, examples: Sequence[Example], pad_id: int = 0) -> Tensor:  # ()
    """The model's own loss on some examples as one batch, penalties of its adapters included."""
    return batch_loss(model, collate(examples, pad_id))


def batch_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:  # ()
    """The model's own loss on a batch: `input_ids` and `labels` (B, T), and what else its forward takes."""
    device = next(model.parameters()).device
    inputs = {k: v.to(device) for k, v in batch.items()}
    labels = inputs["labels"]
    if takes_positions(model):
        # The head is a good part of a small model's work: skip it before the first position that predicts anything.
        # The loss shifts the labels by one within the slice, as it would within the whole.
        first = int((labels[:, 1:] != IGNORE).any(dim=0).int().argmax())
        positions = torch.arange(first, labels.shape[1], device=device)
        return model(**{**inputs, "labels": labels[:, first:]}, logits_to_keep=positions, use_cache=False).loss
    # Packed rows are kept apart only where there is no cache.
    return model(**inputs, **({"use_cache": False} if "position_ids" in inputs else {})).loss


def takes_positions(model: nn.Module) -> bool:
    """Whether the model's forward can be told which positions need logits."""
    model = getattr(model, "module", model)  # DDP shows nothing of what it holds
    config = getattr(model, "active_peft_config", None)
    if getattr(config, "is_prompt_learning", False):  # the prompt shifts every position
        return False
    base: Any = getattr(model, "get_base_model", lambda: model)()
    return {"logits_to_keep", "use_cache"} <= set(inspect.signature(base.forward).parameters)
