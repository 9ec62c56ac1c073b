"""A model that routes each token among LoRA adapters (Arrow)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from trimtab.errors import ConfigError
from trimtab.shell.peft_model import PeftModel

ROUTER, TASK, GENERAL = "arrow_router", "task_", "gks_"  # what adapters are called, the last two with numbers
# What the router's config has of the first adapter's: its layers, and the size of a pair that is for its file alone.
WHERE = ("r", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


def create_arrow_model(
    base_model: Any,
    task_specific_adapter_paths: Sequence[str],
    arrow_config: Any,
    general_adapter_paths: Sequence[str] | None = None,
    **adapter_kwargs: Any,
) -> PeftModel:
    """Load LoRA adapters into a model ("task_0", "task_1" ...), and use a router over them ("arrow_router").

    Args:
        base_model: the model the adapters were trained on.
        task_specific_adapter_paths: folders of adapters, or their names on the Hub.
        arrow_config: an `ArrowConfig`.
        general_adapter_paths: adapters whose knowledge is taken out of the others ("gks_0" ...), with `use_gks`.
        adapter_kwargs: for `PeftModel.from_pretrained` and `load_adapter`.
    """
    if not task_specific_adapter_paths:
        raise ConfigError("`task_specific_adapter_paths` should name at least one adapter.")
    if arrow_config.use_gks and not general_adapter_paths:
        raise ConfigError("`use_gks` needs `general_adapter_paths`.")
    tasks = {f"{TASK}{i}": path for i, path in enumerate(task_specific_adapter_paths)}
    general = (
        {f"{GENERAL}{i}": path for i, path in enumerate(general_adapter_paths or ())} if arrow_config.use_gks else {}
    )
    (first, path), *others = [*tasks.items(), *general.items()]
    model: PeftModel = PeftModel.from_pretrained(base_model, path, adapter_name=first, **adapter_kwargs)
    for name, path in others:
        model.load_adapter(path, adapter_name=name, **adapter_kwargs)
    known = model.peft_config[first]
    config = type(known)(**{field: getattr(known, field) for field in WHERE})
    config.arrow_config = replace(arrow_config, task_adapter_names=list(tasks), gks_adapter_names=list(general))
    model.add_adapter(ROUTER, config)
    model.set_adapter(ROUTER)
    return model.eval()
