"""Errors and warnings: where PEFT raises, we raise something its callers catch; where it warns, we warn."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.parity.models import build
from tests.parity.pairs import BOTH, adapt, config_of, quiet, spoken, stir

Act = Callable[[Any], Any]  # given a library


def wrap(name: str = "llama", **fields: Any) -> Act:
    return lambda library: adapt(library, name, fields)


def then(act: Callable[[Any, Any], Any], **fields: Any) -> Act:
    """A call on an adapted Llama: (library, model)."""
    return lambda library: quiet(act, library, adapt(library, "llama", fields))


def wrap_and(act: Callable[[Any], Any], **fields: Any) -> Act:
    return then(lambda library, model: act(model), **fields)


def combined(model: Any, **how: Any) -> None:
    model.add_weighted_adapter(["default", "b"], [1.0, 1.0], "new", **how)


FAULTS: dict[str, tuple[Act, str]] = {
    "no target": (
        wrap(target_modules=["nothing"]),
        "not found in the base model. Please check the target modules and try again",
    ),
    "no target, regex": (wrap(target_modules="q_proj"), "not found in the base model"),
    "no target in layer": (wrap(target_modules=["q_proj"], layers_to_transform=[9]), "layers_to_transform"),
    "targets excluded": (
        wrap(target_modules=["q_proj"], exclude_modules=["q_proj"]),
        "No modules were targeted for adaptation. This might be caused by a combination of mismatched target modules",
    ),
    "all excluded": (
        wrap(target_modules=["q_proj"], exclude_modules=".*"),
        "All modules were excluded. This is likely",
    ),
    "no default": (wrap("toy"), "Please specify `target_modules` or `target_parameters`in `peft_config`"),
    "unsupported layer": (wrap(target_modules=["input_layernorm"]), "is not supported"),
    "r zero": (wrap(r=0), "`r` should be a positive integer value but the value passed is 0"),
    "r negative": (wrap(r=-2), "`r` should be a positive integer value but the value passed is -2"),
    "task": (wrap(task_type="NOTHING"), "Invalid task type: 'NOTHING'"),
    "pattern without layers": (wrap(target_modules=["q_proj"], layers_pattern="layers"), "`layers_to_transform`"),
    "layers with regex": (
        wrap(target_modules=".*q_proj", layers_to_transform=[0]),
        "`layers_to_transform` cannot be used when `target_modules` is a str",
    ),
    "pattern with regex": (
        wrap(target_modules=".*q_proj", layers_pattern="layers"),
        "`layers_pattern` cannot be used when `target_modules` is a str",
    ),
    "dora and lora_bias": (wrap(use_dora=True, lora_bias=True), "lora_bias=True is not supported for DoRA"),
    "start and lora_bias": (wrap(lora_bias=True, init_lora_weights="pissa"), "only supported with init_lora_weights"),
    "lora_bias on embedding": (wrap(lora_bias=True, target_modules=["embed_tokens"]), "lora_bias"),
    "orthogonal, odd": (wrap(init_lora_weights="orthogonal", r=3), "requires the LoRA rank to be even"),
    "start": (wrap(init_lora_weights="nothing"), "Unknown initialization"),
    "same name": (then(lambda lib, m: m.add_adapter("default", lib.LoraConfig())), "already exists"),
    "unknown set": (then(lambda lib, m: m.set_adapter("x")), "not found"),
    "unknown delete": (then(lambda lib, m: m.delete_adapter("x")), "does not exist"),
    "dot in name": (then(lambda lib, m: m.add_adapter("a.b", lib.LoraConfig())), r"\."),
    "two biases": (
        then(lambda lib, m: m.add_adapter("b", lib.LoraConfig(bias="all")), bias="all"),
        "supports|Only 1 adapter with bias",
    ),
    "selected": (
        then(lambda lib, m: m.save_pretrained("/tmp/never", selected_adapters=["x"])),
        "You passed an invalid `selected_adapters` arguments",
    ),
    "no adapters": (
        lambda lib: lib.get_layer_status(build("llama")) if hasattr(lib, "get_layer_status") else None,
        "[Nn]o adapter",
    ),
    "nowhere": (
        lambda lib: lib.PeftModel.from_pretrained(build("llama"), "/nowhere/at/all"),
        "Can't find 'adapter_config.json'|no such folder|Repo id",
    ),
    "config nowhere": (
        lambda lib: lib.PeftConfig.from_pretrained("/nowhere/at/all"),
        "Can't find 'adapter_config.json'|no such folder|Repo id",
    ),
    "merged delete": (then(lambda lib, m: (m.merge_adapter(), m.delete_adapter("default"))), "merged|unmerge"),
    "safe merge": (
        then(lambda lib, m: (broken(m), m.merge_and_unload(safe_merge=True))),
        "NaNs detected in the merged weights",
    ),
    "tokens of nothing": (
        wrap(trainable_token_indices={"nothing": [1]}),
        "Target modules {'nothing'} not found in the base model",
    ),
    "tokens of tied layers that differ": (
        lambda lib: lib.get_peft_model(
            build("llama_tied"),
            lib.LoraConfig(
                trainable_token_indices={"lm_head": [1, 2], "embed_tokens": [2, 3]}, ensure_weight_tying=True
            ),
        ),
        "Cannot ensure weight tying when different token indices are specified for tied layers",
    ),
    "one name for several": (
        then(lambda lib, m: m.merge_adapter("default")),
        "adapter_names should be a list of strings, got 'default'",
    ),
    "one name for several, at the end": (
        then(lambda lib, m: m.merge_and_unload(adapter_names="default")),
        "adapter_names should be a list of strings, got 'default'",
    ),
    "combination of nothing": (
        then(lambda lib, m: m.add_weighted_adapter(["x"], [1.0], "new")),
        "Adapter x does not exist",
    ),
    "combination of unlike ranks": (
        then(lambda lib, m: (m.add_adapter("b", lib.LoraConfig(r=3)), combined(m, combination_type="linear"))),
        "All adapters must have the same r value when using combination_type linear, ties, dare_ties or dare_linear",
    ),
    "combination of whole modules": (
        then(
            lambda lib, m: (m.add_adapter("b", lib.LoraConfig(modules_to_save=["lm_head"])), combined(m)),
            modules_to_save=["lm_head"],
        ),
        "Cannot add weighted adapters if they target the same module with modules_to_save, but found 1 such instance",
    ),
    "mixed with nothing": (
        then(lambda lib, m: m.eval()(input_ids=torch.ones(2, 3, dtype=torch.long), adapter_names=["x", "x"])),
        r"Trying to infer with non-existing adapter\(s\): x",
    ),
    "aLoRA merged": (
        wrap_and(lambda m: m.merge_and_unload(), alora_invocation_tokens=[1], task_type="CAUSAL_LM"),
        "merg",
    ),
    "state of prompts": (
        lambda lib: lib.get_peft_model(
            build("llama"), lib.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
        ).get_layer_status(),
        "got an invalid PeftModel instance; prefix tuning and adaption prompt are not supported",
    ),
    "state of prompts, of the model": (
        lambda lib: lib.get_peft_model(
            build("llama"), lib.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
        ).get_model_status(),
        r"get_model_status\(\) got an invalid PeftModel instance; prefix tuning and adaption prompt are not supported",
    ),
    "rank 0 of a conversion": (
        then(lambda lib, m: lib.convert_to_lora(m, rank=0)),
        "Passing a rank of 0 doesn't make sense",
    ),
    "energy of a conversion": (
        then(lambda lib, m: lib.convert_to_lora(m, rank=1.5)),
        "If rank is a float, it is interpreted as a threshold",
    ),
}


def broken(model: Any) -> None:
    """An adapter with a number that is none."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(float("nan"))


def raised(act: Act, library: Any) -> BaseException | None:
    try:
        quiet(act, library)
    except Exception as error:
        return error
    return None


@pytest.mark.parametrize(("act", "words"), FAULTS.values(), ids=FAULTS)
def test_errors(act: Act, words: str) -> None:
    """Our error is caught by the handlers that catch PEFT's, and says as much."""
    mine, other = (raised(act, library) for library in BOTH)
    assert mine is not None
    assert re.search(words, str(mine)), str(mine)
    if other is not None and not isinstance(other, AssertionError):
        builtin = [
            c for c in type(other).__mro__ if c.__module__ == "builtins" and c not in (Exception, BaseException, object)
        ]
        assert builtin, other
        assert any(isinstance(mine, c) for c in builtin), (type(mine).__mro__, type(other))


WARNINGS: dict[str, tuple[Act, str]] = {
    "unused exclusion": (
        lambda lib: loud(lib, target_modules=["q_proj"], exclude_modules=["nothing"]),
        "exclude_modules",
    ),
    "unused rank": (lambda lib: loud(lib, rank_pattern={"nothing": 3}), "rank_pattern"),
    "unused alpha": (lambda lib: loud(lib, alpha_pattern={"nothing": 3}), "alpha_pattern"),
    "flat weights": (lambda lib: loud(lib, fan_in_fan_out=True), "fan_in_fan_out"),
    "twice": (lambda lib: twice(lib), "PeftModel|second time|already"),
    "prefix": (lambda lib: lib.get_peft_model(build("llama"), lib.LoraConfig(), adapter_name="lora"), "prefix"),
    "merged twice": (lambda lib: merged_twice(lib), "merged"),
    "unmerged twice": (lambda lib: adapt(lib, "llama", {}).unmerge_adapter(), "[Aa]lready unmerged"),
    "deleted active": (lambda lib: deleted(lib), "Adapter default was active which is now deleted"),
    "embeddings saved": (
        lambda lib: embedded(lib),
        "Setting `save_embedding_layers` to `True` as embedding layers found in `target_modules`",
    ),
    "tied target": (lambda lib: merge_tied(lib), "tie|share"),
    "unknown field": (lambda lib: lib.PeftConfig.from_peft_type(peft_type="LORA", nonsense=1), "nonsense"),
}


def loud(library: Any, **fields: Any) -> Any:
    return library.get_peft_model(build("llama"), config_of(library, fields))


def twice(library: Any) -> Any:
    model = quiet(library.get_peft_model, build("llama"), library.LoraConfig())
    return library.get_peft_model(model.get_base_model(), library.LoraConfig(), adapter_name="x")


def merged_twice(library: Any) -> None:
    model = adapt(library, "llama", {})
    quiet(model.merge_adapter)
    model.merge_adapter()


def deleted(library: Any) -> None:
    model = adapt(library, "llama", {})
    quiet(model.add_adapter, "b", library.LoraConfig())
    model.delete_adapter("default")


def embedded(library: Any) -> None:
    model = adapt(library, "llama", {"target_modules": ["embed_tokens"]})
    library.get_peft_model_state_dict(model)


def merge_tied(library: Any) -> None:
    model = library.get_peft_model(build("llama_tied"), library.LoraConfig(target_modules=["embed_tokens"]))
    stir(model)
    model.merge_adapter()


@pytest.mark.parametrize(("act", "words"), WARNINGS.values(), ids=WARNINGS)
def test_warnings(act: Act, words: str) -> None:
    """We speak where PEFT speaks, and name the same thing; and not once a layer."""
    mine, other = (spoken(act, library) for library in BOTH)
    found = [m for m in mine if re.search(words, m)]
    assert len(found) in (1, 2), mine
    assert any(re.search(words, m) for m in other), other


QUIET: dict[str, Act] = {
    "wrap": lambda lib: lib.get_peft_model(build("llama"), lib.LoraConfig(task_type="CAUSAL_LM")),
    "conv1d": lambda lib: lib.get_peft_model(build("gpt2"), lib.LoraConfig(fan_in_fan_out=True)),
    "heads": lambda lib: lib.get_peft_model(build("bert_seq"), lib.LoraConfig(task_type="SEQ_CLS")),
    "merge": lambda lib: lib.get_peft_model(build("llama"), lib.LoraConfig()).merge_and_unload(),
    "state": lambda lib: lib.get_peft_model_state_dict(lib.get_peft_model(build("llama"), lib.LoraConfig())),
}


@pytest.mark.parametrize("act", QUIET.values(), ids=QUIET)
def test_silence(act: Act) -> None:
    """What is right is not commented."""
    assert spoken(act, BOTH[0]) == []
