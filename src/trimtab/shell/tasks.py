"""A class for each task, and the ways to give a model its first adapter."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from trimtab.core.config import PeftConfig, type_name
from trimtab.core.report import warn
from trimtab.core.targets import matches
from trimtab.errors import ConfigError, NoMatchingPeftModuleError
from trimtab.files.codec import modules_of
from trimtab.graft.base import Base
from trimtab.graft.graft import Graft, find_graft
from trimtab.graft.selection import choose
from trimtab.methods import method_class
from trimtab.shell.arguments import SEVERAL, require_config, require_model
from trimtab.shell.peft_model import TASK_CLASSES, PeftModel, discard_empty, name_of, task_class
from trimtab.shell.replacing import replaced
from trimtab.shell.tuner import tuner_class


def _signature(*names: str) -> Any:
    """Give a task class's forward the arguments of its models, so that trainers see which columns it takes."""

    def decorate(cls: type[PeftModel]) -> type[PeftModel]:
        def forward(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
            return PeftModel.forward(self, *args, **kwargs)

        kinds = inspect.Parameter
        parameters = [kinds("self", kinds.POSITIONAL_OR_KEYWORD)]
        parameters += [kinds(n, kinds.POSITIONAL_OR_KEYWORD, default=None) for n in names]
        parameters.append(kinds("kwargs", kinds.VAR_KEYWORD))
        forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        forward.__doc__ = PeftModel.forward.__doc__
        cls.forward = forward  # type: ignore[method-assign, assignment]
        return cls

    return decorate


_ENCODER = (
    "input_ids",
    "attention_mask",
    "inputs_embeds",
    "labels",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
)
_DECODER = ("decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds")


@_signature(*_ENCODER, "task_ids")
class PeftModelForCausalLM(PeftModel):
    """A causal language model with adapters."""


@_signature(*_ENCODER[:3], *_DECODER, *_ENCODER[3:], "task_ids")
class PeftModelForSeq2SeqLM(PeftModel):
    """An encoder-decoder language model with adapters."""


@_signature(*_ENCODER, "task_ids")
class PeftModelForSequenceClassification(PeftModel):
    """A sequence classifier with adapters; its head is trained and saved whole."""


@_signature(*_ENCODER, "task_ids")
class PeftModelForTokenClassification(PeftModel):
    """A token classifier with adapters; its head is trained and saved whole."""


@_signature(
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "position_ids",
    "inputs_embeds",
    "start_positions",
    "end_positions",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "task_ids",
)
class PeftModelForQuestionAnswering(PeftModel):
    """An extractive question answerer with adapters; its head is trained and saved whole."""


@_signature(*_ENCODER[:3], *_ENCODER[4:], "task_ids")
class PeftModelForFeatureExtraction(PeftModel):
    """A model whose hidden states are the result, with adapters."""


MODEL_TYPE_TO_PEFT_MODEL_MAPPING = TASK_CLASSES
MODEL_TYPE_TO_PEFT_MODEL_MAPPING |= {
    "SEQ_CLS": PeftModelForSequenceClassification,
    "SEQ_2_SEQ_LM": PeftModelForSeq2SeqLM,
    "CAUSAL_LM": PeftModelForCausalLM,
    "TOKEN_CLS": PeftModelForTokenClassification,
    "QUESTION_ANS": PeftModelForQuestionAnswering,
    "FEATURE_EXTRACTION": PeftModelForFeatureExtraction,
}


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
    strict: bool = False,
) -> PeftModel:
    """Give a model its first adapter.

    Args:
        model: the base model; it is adapted in place and frozen.
        peft_config: what to add; a copy is kept, the object itself is not changed.
        adapter_name: the adapter's name.
        mixed: accepted for PEFT's sake: every model here can hold adapters of several methods.
        autocast_adapter_dtype: keep the adapters of half-precision layers in fp32.
        revision: the base model's revision on the Hub, noted in the config.
        strict: `target_modules` entries that fit nothing are errors even when others fit.

    Raises:
        NoMatchingPeftModuleError: the config's targets fit no module; the nearest names are given.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from trimtab import LoraConfig, get_peft_model
        >>> model = get_peft_model(GPT2LMHeadModel(GPT2Config()), LoraConfig())
        >>> model.print_trainable_parameters()
        trainable params: 294,912 || all params: 124,734,720 || trainable%: 0.2364
    """
    require_model(model, "get_peft_model(model, config)")
    require_config(peft_config, "get_peft_model(model, config)")
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    graft = None if find_graft(model) is None else Graft.of(model)  # which looks whether its adapters are still there
    if graft is not None and graft.adapters:
        taken = f"Adapter '{adapter_name}' is replaced. " if adapter_name in graft.adapters else ""
        warn(
            "You are trying to modify a model with PEFT for a second time. If you want to reload the model with a "
            f"different config, make sure to call `.unload()` before. {taken}To give it an adapter beside those "
            "it has, call add_adapter(name, config) of the PeftModel."
        )
    peft_config = _of(model, peft_config, revision)
    cls = task_class(peft_config, PeftModel)
    try:
        with replaced(graft, adapter_name):
            return cls(model, peft_config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, strict=strict)
    except BaseException:
        discard_empty(model)
        raise


def _of(model: nn.Module, given: PeftConfig, revision: str | None) -> Any:
    """A copy of a config that says which model it is used on, whatever it said before."""
    config, name = given.copy(), name_of(model)
    if name is not None and config.base_model_name_or_path not in (None, name):
        warn(
            f"The PEFT config's `base_model_name_or_path` was renamed from '{config.base_model_name_or_path}' to "
            f"'{name}'. Please ensure that the correct base model is loaded when loading this checkpoint.",
            UserWarning,
        )
        config.base_model_name_or_path = name
    if revision is not None:
        if config.revision is not None and config.revision != revision:
            warn(
                f"peft config has already set base model revision to {config.revision}, "
                f"overwriting with revision {revision}"
            )
        config.revision = revision
    return config


def _compare(model: nn.Module, config: Any, there: set[str]) -> None:
    """Say where the modules of a state dict are not those that the config names."""
    graft = find_graft(model)
    base = graft.base if graft else Base(model)
    with warnings.catch_warnings():  # it is asked, not used
        warnings.simplefilter("ignore")
        try:
            asked = {t.name for t in choose(base, config.copy(), method_class(config), False) if not t.param}
        except NoMatchingPeftModuleError:
            asked = set()
        except ConfigError:  # it names none, and there is no default for this model: the state dict says all
            return
    only = {"The PEFT config": sorted(asked - there), "The state_dict": sorted(there - asked)}
    more = [f"{who} contained these additional target modules: {names}." for who, names in only.items() if names]
    if more:
        warn(
            "While injecting the PEFT adapters, an inconsistency was discovered between the PEFT config and the "
            "provided state_dict. This is not necessarily an issue and can be ignored if this was the intent. "
            + " ".join(more),
            RuntimeWarning,
        )


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Put an adapter into a model in place and return the model itself.

    Args:
        state_dict: the adapter's tensors: the modules it has tensors of are adapted, whatever the config's targets are.
    """
    require_model(model, "inject_adapter_in_model(config, model)")
    require_config(peft_config, "inject_adapter_in_model(config, model)")
    if peft_config.is_prompt_learning:
        raise ConfigError("`create_and_replace` does not support prompt learning yet.")
    if (graft := find_graft(model)) is not None and graft.adapters:
        warn(SEVERAL, UserWarning)
    if state_dict is not None and hasattr(peft_config, "target_modules"):
        kind = type_name(peft_config)
        paths = modules_of(state_dict, kind)
        if not paths:
            raise ConfigError(
                f"The state dict has no tensors of an adapter of method {kind}: {list(state_dict)[:5]} ..."
            )
        config: Any = peft_config.copy()
        own = getattr(config, "target_parameters", None) or ()  # those are told by the config
        known = {path: module for path, module in model.named_modules() if path in paths}
        held = {
            p
            for p, m in known.items()
            if any(matches(set(own), f"{p}.{n}") for n, _ in m.named_parameters(recurse=False))
        }
        _compare(model, config, set(known) - held)
        config.target_modules, config.exclude_modules = paths - held, None
        peft_config = config
    try:
        tuner_class(peft_config.peft_type)(model, peft_config, adapter_name, low_cpu_mem_usage)
    except BaseException:
        discard_empty(model)
        raise
    return model
