"""Where the adapters of a model are: in a PeftModel, its tuner or its base model, wrapped or not."""

from __future__ import annotations

from torch import nn

from trimtab.files.codec import WRAPPERS
from trimtab.graft.graft import Graft, find_graft


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside what compiling, checkpointing or sharding has wrapped around it."""
    while find_graft(model) is None:
        inner = next((model._modules[name] for name in WRAPPERS if name in model._modules), None)
        if inner is None:
            break
        model = inner
    return model


def locate_graft(model: nn.Module) -> tuple[Graft, str]:
    """The graft of a PeftModel, its tuner or its base model, and the prefix that the keys of that object have."""
    prefix, module = "", unwrap(model)
    for attribute in ("base_model", "model"):
        graft = find_graft(module)
        if graft is not None:
            return graft, prefix
        child = module._modules.get(attribute)
        if child is not None:
            prefix, module = f"{prefix}{attribute}.", unwrap(child)
    graft = find_graft(module)
    if graft is None:
        raise TypeError(f"No adapters found in {type(model).__name__}: is it a PeftModel or a model that has adapters?")
    return graft, prefix
