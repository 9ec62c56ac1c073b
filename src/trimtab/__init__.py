"""trimtab: adapt large frozen models with a few trained parameters.

The public names are loaded when they are first used, so `import trimtab` itself costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from trimtab.methods import METHODS

__version__ = "0.1.0"

# module -> the public names it holds; every method's config is public by its line in the registry
_PUBLIC = {
    "trimtab.core.config": ["PeftType", "TaskType", "PromptLearningConfig"],
    "trimtab.methods": ["PeftConfig", "register_method"],
    "trimtab.methods.lora": ["LoraRuntimeConfig"],
    "trimtab.methods.arrow": ["ArrowConfig"],
    "trimtab.methods.bdlora": ["BdLoraConfig"],
    "trimtab.methods.kasa": ["KasaConfig"],
    "trimtab.methods.monteclora": ["MontecloraConfig"],
    "trimtab.methods.velora": ["VeloraConfig"],
    "trimtab.init.corda": ["CordaConfig"],
    "trimtab.init.eva": ["EvaConfig"],
    "trimtab.init.loftq": ["LoftQConfig"],
    "trimtab.init.lora_ga": ["LoraGAConfig"],
    "trimtab.shell.arrow": ["create_arrow_model"],
    "trimtab.shell.detached": ["detached_copy"],
    "trimtab.shell.hotswap": ["hotswap_adapter", "prepare_model_for_compiled_hotswap"],
    "trimtab.shell.eva": ["get_eva_state_dict", "initialize_lora_eva_weights"],
    "trimtab.shell.starts": ["preprocess_corda", "preprocess_loraga", "replace_lora_weights_loftq"],
    "trimtab.shell.tasks": [
        "PeftModel",
        "PeftModelForCausalLM",
        "PeftModelForFeatureExtraction",
        "PeftModelForQuestionAnswering",
        "PeftModelForSeq2SeqLM",
        "PeftModelForSequenceClassification",
        "PeftModelForTokenClassification",
        "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
        "get_peft_model",
        "inject_adapter_in_model",
    ],
    "trimtab.shell.auto": [
        "AutoPeftModel",
        "AutoPeftModelForCausalLM",
        "AutoPeftModelForFeatureExtraction",
        "AutoPeftModelForQuestionAnswering",
        "AutoPeftModelForSeq2SeqLM",
        "AutoPeftModelForSequenceClassification",
        "AutoPeftModelForTokenClassification",
    ],
    "trimtab.shell.state": [
        "get_base_model_state_dict",
        "get_peft_model_state_dict",
        "set_base_model_state_dict",
        "set_peft_model_state_dict",
    ],
    "trimtab.layer.head": ["fuse_loss"],
    "trimtab.shell.status": ["get_layer_status", "get_model_status", "TunerLayerStatus", "TunerModelStatus"],
    "trimtab.shell.convert": ["dequantize", "merge_error", "prepare_model_for_kbit_training"],
    "trimtab.shell.prefixes": [
        "compose_cartridge_adapters",
        "initialize_kv_prefix_from_past_key_values",
        "initialize_kv_prefix_from_text",
        "prompt_embeddings_from_past_key_values",
    ],
    "trimtab.files.store": ["load_peft_weights"],
    "trimtab.rank.convert": ["convert_to_lora", "save_as_lora"],
    "trimtab.rank.intruders": ["mend_adapter", "reduce_intruder_dimension"],
    "trimtab.rank.kappa": ["KappaTuneSelector", "find_kappa_target_modules"],
    "trimtab.rank.plot": ["plot_survey"],
    "trimtab.rank.resize": ["resize_adapter"],
    "trimtab.rank.spectrum": ["delta_spectrum", "effective_ranks"],
    "trimtab.rank.suggest": ["estimate_ranks", "suggest_rank"],
    "trimtab.rank.survey": ["inspect_ranks"],
    "trimtab.serve.store": ["AdapterStore"],
    "trimtab.rank.sweep.plot": ["plot_sweep"],
    "trimtab.rank.sweep.run": ["rank_sweep"],
    "trimtab.train.many": ["Job", "train_many"],
    "trimtab.train.optimizers": [
        "create_lorafa_optimizer",
        "create_loraplus_optimizer",
        "create_riemannian_optimizer",
    ],
    "trimtab.errors": ["NoMatchingPeftModuleError", "PeftError", "PeftWarning"],
}
_WHERE = {name: module for module, names in _PUBLIC.items() for name in names}
_WHERE |= {config: f"trimtab.methods.{file}" for file, _, config in METHODS.values()}

__all__ = ["__version__", *sorted(_WHERE)]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        value = getattr(import_module(_WHERE[name]), name)
    elif name.endswith("Model") and not name.startswith("_"):  # LoraModel ...: the tuner under a method's name
        value = _tuner(name)
    else:
        raise AttributeError(f"module 'trimtab' has no attribute '{name}'")
    globals()[name] = value
    return value


def _tuner(name: str) -> Any:
    from trimtab.shell.tuner import tuner_class

    for peft_type, (_, _, config) in METHODS.items():
        if config.removesuffix("Config") + "Model" == name:
            return tuner_class(peft_type)
    raise AttributeError(f"module 'trimtab' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
