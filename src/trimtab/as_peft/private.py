"""Helpers of peft that are private by their names, and that other projects import all the same."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from trimtab.as_peft.classes import TokensWrapper
from trimtab.core.targets import inside
from trimtab.errors import NoMatchingPeftModuleError
from trimtab.graft.base import Base
from trimtab.graft.graft import find_graft
from trimtab.graft.prompts import complete
from trimtab.graft.selection import linears
from trimtab.layer.copies import SavedModule
from trimtab.methods import config_class, method_class
from trimtab.shell.tasks import inject_adapter_in_model

__all__ = [
    "_find_mismatched_keys",
    "_freeze_adapter",
    "_get_batch_size",
    "_get_input_embeddings_name",
    "_get_module_names_tied_with_embedding",
    "_get_no_split_modules",
    "_insert_adapter_name_into_state_dict",
    "_is_valid_match",
    "_maybe_include_all_linear_layers",
    "_prepare_prompt_learning_config",
    "_set_adapter",
    "_set_layer_requires_grad",
    "_set_trainable",
]


# ------------------------------------------------------------------ facts of a model
def _get_batch_size(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> int:
    """How many rows a call has."""
    given = input_ids if input_ids is not None else inputs_embeds
    if given is None:
        raise ValueError("You have to provide either input_ids or inputs_embeds")
    return len(given)


def _get_input_embeddings_name(model: nn.Module, default: str | None = None) -> str | None:
    """The path of the module that looks up the model's tokens."""
    return Base(model).input_embedding or default


def _get_module_names_tied_with_embedding(model: nn.Module) -> list[str]:
    """The paths of the other modules that have its weight."""
    base = Base(model)
    return [] if base.input_embedding is None else base.tied(base.input_embedding)


def _get_no_split_modules(model: nn.Module) -> set[str]:
    """The classes of modules that stay on one device."""
    return {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}


# ------------------------------------------------------------------ configs and keys
def _maybe_include_all_linear_layers(peft_config: Any, model: nn.Module) -> Any:
    """The config; where its targets are "all-linear", they become the paths of those layers."""
    wanted = getattr(peft_config, "target_modules", None)
    if isinstance(wanted, str) and wanted.lower() == "all-linear":
        whole = getattr(peft_config, "modules_to_save", None)
        peft_config.target_modules = {name for name in linears(Base(model)) if not inside(whole, name)}
    return peft_config


def _prepare_prompt_learning_config(peft_config: Any, model_config: Mapping[str, Any]) -> Any:
    """The config of a prompt, complete by what a model's config (a dict) tells."""
    facts = SimpleNamespace(**(model_config.get("text_config") or model_config))
    parts = peft_config.num_transformer_submodules  # which is for the model to say
    complete(peft_config, SimpleNamespace(config=facts), getattr(method_class(peft_config), "cached", False))
    peft_config.num_transformer_submodules = parts
    return peft_config


def _is_valid_match(key: str, target_key: str) -> bool:
    """Whether a path is `target_key`, or ends in it."""
    return f".{key}".endswith(f".{target_key}")


def _insert_adapter_name_into_state_dict(
    state_dict: Mapping[str, Tensor], adapter_name: str, parameter_prefix: str
) -> dict[str, Tensor]:
    """A file's tensors under their keys in memory: behind what starts with the method's prefix comes the adapter."""
    start = re.compile(rf"({re.escape(parameter_prefix)}[^.]*)(?!.*{re.escape(parameter_prefix)})")
    return {start.sub(lambda m: f"{m[1]}.{adapter_name}", key): value for key, value in state_dict.items()}


def _find_mismatched_keys(
    model: nn.Module, peft_model_state_dict: Mapping[str, Tensor], ignore_mismatched_sizes: bool = False
) -> tuple[dict[str, Tensor], list[tuple[str, Any, Any]]]:
    """(The tensors, those of another shape than the model's left out if they are ignored, and these: key, shapes)."""
    if not ignore_mismatched_sizes:
        return dict(peft_model_state_dict), []
    own = model.state_dict()
    odd = [k for k, v in peft_model_state_dict.items() if k in own and own[k].shape != v.shape]
    kept = {k: v for k, v in peft_model_state_dict.items() if k not in odd}
    return kept, [(k, peft_model_state_dict[k].shape, own[k].shape) for k in odd]


# ------------------------------------------------------------------ what trains
def _freeze_adapter(model: nn.Module, adapter_name: str) -> None:
    """Freeze the tensors of an adapter."""
    for name, parameter in model.named_parameters():
        if f".{adapter_name}." in f".{name}.":
            parameter.requires_grad_(False)


def _set_layer_requires_grad(layer: Any, requires_grad: bool) -> None:
    """Make the parameters of a layer, or one, trainable or frozen; what was computed from others is left alone."""
    for parameter in layer.parameters() if isinstance(layer, nn.Module) else [layer]:
        if parameter.is_leaf:
            parameter.requires_grad_(requires_grad)


def _trained_whole(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, SavedModule)]


def _set_adapter(model: nn.Module, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
    """Use an adapter's copies of the modules that adapters train whole; where it has none, the module itself."""
    names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
    for module in _trained_whole(model):
        chosen = [name for name in names if name in module.adapters]
        if len(chosen) > 1:
            raise ValueError(f"Only one adapter can be set at a time for {module}, not {chosen}.")
        module.set_adapter(chosen, inference_mode)


def _set_trainable(
    model: nn.Module,
    adapter_name: str,
    module_names: Sequence[str],
    inference_mode: bool,
    strict_module_check: bool = False,
    wrapper_cls: Any = None,
    activate_adapter: bool = True,
    **wrapper_kwargs: Any,
) -> list[nn.Module]:
    """Give a new adapter copies of modules, or with `wrapper_cls` `TrainableTokensWrapper` rows of embeddings.

    Returns:
        What stands around those modules, where nothing did before.
    """
    paths = [path for path, _ in model.named_modules() if any(_is_valid_match(path, name) for name in module_names)]
    if strict_module_check and not paths:
        raise NoMatchingPeftModuleError(
            f"Target modules {set(module_names)} not found in the base model. Please check the target modules and try "
            "again."
        )
    if not paths:
        return []
    before = find_graft(model)
    active = list(before.board.route.active) if before is not None else []
    trained = [p for p in model.parameters() if p.requires_grad]
    there = {path for path in paths if isinstance(model.get_submodule(path), SavedModule)}
    rows = wrapper_cls is TokensWrapper
    fields: dict[str, Any] = {"modules_to_save": list(module_names)}
    if rows:
        fields = {"trainable_token_indices": dict.fromkeys(module_names, wrapper_kwargs["token_indices"])}
    own: Any = config_class("LORA")
    inject_adapter_in_model(own(target_modules=[], **fields), model, adapter_name)
    graft = find_graft(model)
    assert graft is not None
    graft.set_active([adapter_name] if activate_adapter else active, trainable=None)
    graft.set_trainable(adapter_name, not inference_mode)
    instead = {id(p) for module in _trained_whole(model) for p in module.original_module.parameters()}
    for parameter in trained:  # what trained before goes on, but what copies stand for
        parameter.requires_grad_(id(parameter) not in instead)
    return [model.get_submodule(path) for path in paths if path not in there]
