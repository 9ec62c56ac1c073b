"""A model's own modules over another's parameters: to adapt without changing the model that was given."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


def detached_copy(model: M, share_buffers: bool = True) -> M:
    """A copy of a model that has modules of its own and shares its parameters: it takes hardly any memory.

    What `get_peft_model`, `PeftModel.from_pretrained` and `unload` do to the copy leaves the model as it is: one base
    serves several PeftModels, each with adapters and a choice of the active ones of its own, and stays usable itself.
    The parameters are the same objects: who trains, freezes or moves them does it for all. Merging in the copy gives it
    weights of its own, and `merge_and_unload` writes into those that are shared.

    Args:
        model: any module; of a PeftModel the adapters in its module tree are shared, too.
        share_buffers: share buffers as well; False copies them.
    """
    shared = [*model.parameters(), *(model.buffers() if share_buffers else ())]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
