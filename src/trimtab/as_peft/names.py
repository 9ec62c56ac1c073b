"""What `peft` and its modules answer: tables, and rules that follow the registry of methods."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import trimtab
from trimtab.as_peft import classes, shown
from trimtab.as_peft.quantised import BACKENDS, LAYERS
from trimtab.methods import METHODS, config_class

shown.show()

# The modules of peft that are no method's. A package answers for what its modules hold, as in peft.
MODULES = {
    "peft": "auto config functional helpers import_utils mapping mapping_func mixed_model optimizers peft_model tuners"
    " utils",
    "peft.tuners.mixed": "model",
    "peft.tuners.lora": "aqlm arrow awq bnb conversion corda dora eetq eva gptq hqq inc intruders loraga monteclora te"
    " torchao tp_layer variants velora",
    "peft.optimizers": "lorafa loraplus riemannian",
    "peft.tuners.adalora": "bnb gptq",
    "peft.tuners.shira": "mask_functions",
    "peft.tuners.adamss": "asa_callback utils",
    "peft.tuners.poly": "router",
    "peft.tuners.shadow": "diffusion_models layers",
    "peft.tuners.waveft": "constants waverec2d wavelet",
    "peft.tuners.xlora": "classifier",
    **{f"peft.tuners.{method}": "utils" for method in ("adaption_prompt", "c3a", "cartridge", "osf")},
    **{f"peft.tuners.{method}": "bnb" for method in ("hira", "ia3", "pvera", "randlora", "road")},
    "peft.tuners": "_buffer_dict lycoris_utils mixed tuners_utils",
    "peft.utils": "constants error hotswap incremental_pca integrations loftq_utils merge_utils other peft_types"
    " quantization_utils save_and_load transformers_weight_conversion warning",
}

DIFFUSION = (
    "DiffusionShadowBackend", "Flux2ShadowBackend", "freeze_flux_stem_embeddings", "get_diffusion_shadow_backend",
    "validate_pretrained_flux_shadow",
)  # fmt: skip

# peft's name: where trimtab has it, under which name.
ALIASES = {
    "BaseTuner": "trimtab.shell.tuner:Tuner",
    "BaseTunerLayer": "trimtab.layer.adapted:AdaptedLayer",
    "ModulesToSaveWrapper": "trimtab.layer.copies:SavedModule",
    "AuxiliaryTrainingWrapper": "trimtab.layer.copies:SavedModule",
    "TrainableTokensWrapper": "trimtab.as_peft.classes:TokensWrapper",
    "ParamWrapper": "trimtab.as_peft.classes:ParamWrapper",
    "PeftMixedModel": "trimtab.shell.peft_model:PeftModel",  # every model can hold adapters of several methods
    "MixedModel": "trimtab.shell.tuner:Tuner",
    "SAFETENSORS_WEIGHTS_NAME": "trimtab.files.store:WEIGHTS",
    "WEIGHTS_NAME": "trimtab.files.store:PICKLED",
    "CONFIG_NAME": "trimtab.core.config:CONFIG_NAME",
    "PeftConfigMixin": "trimtab.core.config:PeftConfig",
    "MIN_TARGET_MODULES_FOR_OPTIMIZATION": "trimtab.core.targets:CONDENSE_FROM",
    "LoraFAOptimizer": "trimtab.train.optimizers:LoraFAOptimizer",
    "PromptTuningInit": "trimtab.methods.prompt_tuning:PromptTuningInit",
    "PromptEncoderReparameterizationType": "trimtab.methods.p_tuning:PromptEncoderReparameterizationType",
    "MultitaskPromptTuningInit": "trimtab.methods.multitask_prompt_tuning:MultitaskPromptTuningInit",
    "BufferDict": "trimtab.layer.leaves:Leaves",  # what holds the frozen tensors of adapters
    "BasePromptEncoder": "trimtab.core.model_method:PromptMethod",
    "AdaptedAttention": "trimtab.as_peft.classes:AdaptedAttention",
    "AdaptedAttentionGPT": "trimtab.as_peft.classes:AdaptedAttention",
    "get_default_import_allowlist": "trimtab.shell.auto:get_default_import_allowlist",
    "check_import_allowlist": "trimtab.shell.auto:check_import_allowlist",
    **{
        name: f"trimtab.shell.eva:{name}"
        for name in (
            "forward_fn_dict",
            "prepare_layer_inputs_fn_language_modeling",
            "prepare_model_inputs_fn_language_modeling",
        )
    },
    # A variant of LoRA is a formula of its own: the classes of `layer.methods[adapter]`.
    "LoraVariant": "trimtab.core.families:LowRank",
    "ALoraLinearVariant": "trimtab.methods.alora:ALora",
    "ArrowLinearVariant": "trimtab.methods.arrow:Arrow",
    "BdLoraLinearVariant": "trimtab.methods.bdlora:BdLora",
    **{f"Dora{kind}Variant": "trimtab.methods.dora:Dora" for kind in "Linear Embedding Conv1d Conv2d Conv3d".split()},
    "KasaLinearVariant": "trimtab.methods.kasa:Kasa",
    **{f"MiCA{kind}Variant": "trimtab.methods.mica:Mica" for kind in ("Linear", "Embedding")},
    "MontecloraLinearVariant": "trimtab.methods.monteclora:Monteclora",
    "QALoraLinearVariant": "trimtab.methods.qalora:QaLora",
    "VeloraLinearVariant": "trimtab.methods.velora:Velora",
    "XLoraClassifier": "trimtab.methods.xlora:XLora",  # `model.base_model.internal_xlora_classifier`
    "hotswap_adapter": "trimtab.as_peft.hotswap:hotswap_adapter",  # PEFT's refuses other layers
    "DetachedShadowModel": "trimtab.init.beside.apart:DetachedShadowModel",  # what `model.unload_shadow()` returns
    **{name: f"trimtab.as_peft.shadows:{name}" for name in ("ShadowCache", "ShadowCarrier")},
    "DetachedFluxShadowModel": "trimtab.init.beside.flux:DetachedFluxShadowModel",
    **{name: f"trimtab.as_peft.diffusion:{name}" for name in DIFFUSION},
    "ALL_LAYERNORM_LAYERS": "transformers.pytorch_utils:ALL_LAYERNORM_LAYERS",
    "get_model_conversion_mapping": "transformers.conversion_mapping:get_model_conversion_mapping",
}

# Modules that answer for whatever public name they have.
SOURCES = (
    "trimtab.as_peft.around",
    "trimtab.as_peft.constants",
    "trimtab.as_peft.formulas",
    "trimtab.as_peft.functions",
    "trimtab.as_peft.hooks",
    "trimtab.as_peft.hotswap",
    "trimtab.as_peft.inside",
    "trimtab.as_peft.parts",
    "trimtab.as_peft.paths",
    "trimtab.as_peft.merges",
    "trimtab.as_peft.mixing",
    "trimtab.as_peft.private",
    "trimtab.as_peft.routing",
    "trimtab.as_peft.quantised",
    "trimtab.as_peft.sampling",
    "trimtab.as_peft.variants",
    "trimtab.as_peft.weights",
    "trimtab.as_peft.packages",
)

# Modules outside a method's package that have layer classes of LoRA.
LAYERS_AT = (
    ("peft.optimizers.loraplus", "Embedding"), ("peft.utils.hotswap", "Conv2d"), ("peft.utils.hotswap", "Linear"),
)  # fmt: skip

# What `from peft import *` brings beside what `from trimtab import *` does.
TOP = (
    "CPTEmbedding", "CartridgeEncoder", "MultitaskPromptTuningInit", "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_MIXED_MODEL_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING", "PeftMixedModel", "PrefixEncoder",
    "PromptEmbedding", "PromptEncoder", "PromptEncoderReparameterizationType", "PromptTuningInit",
    "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING", "bloom_model_postprocess_past_key_value",
    "cast_mixed_precision_params", "get_peft_config", "shift_tokens_right",
)  # fmt: skip

# Where a method's default targets are.
MAPPING = "TRANSFORMERS_MODELS_TO_{}_TARGET_MODULES_MAPPING"


@cache
def prefixes() -> dict[str, str]:
    """{peft_type: what the names of the method's classes start with}, for the methods there are."""
    return {peft_type: row[2].removesuffix("Config") for peft_type, row in METHODS.items()}


@cache
def paths() -> dict[str, bool]:
    """{module path: whether it is a package}."""
    found = dict.fromkeys(MODULES, True)
    for package, names in MODULES.items():
        for name in names.split():
            found.setdefault(f"{package}.{name}", False)
    for peft_type in METHODS:
        package = f"peft.tuners.{peft_type.lower()}"
        found[package] = True
        found |= {f"{package}.{name}": False for name in ("config", "layer", "model")}
    return found


def is_module(path: str) -> bool:
    """Whether peft's module of that path is answered for."""
    return path in paths()


def is_package(path: str) -> bool:
    """Whether it has modules below it."""
    return paths()[path]


def _method_of(path: str) -> str | None:
    """The method, in capitals, whose package a module of peft is in or is; or a name that is no method's, or None."""
    return path.split(".")[2].upper() if path.startswith("peft.tuners.") else None


def find(path: str, name: str) -> Any:
    """The object that `name` stands for in peft's module `path`.

    Raises:
        KeyError: trimtab has none.
    """
    if name in ALIASES:
        module, _, attribute = ALIASES[name].partition(":")
        return getattr(import_module(module), attribute)
    if (path, name) in LAYERS_AT:
        path = "peft.tuners.lora.layer"
    method = _method_of(path)
    if name in LAYERS:
        return classes.layer_class(method if method in METHODS else "LORA", name, ())
    if name.startswith("dispatch_") and name.removeprefix("dispatch_") in BACKENDS:
        return classes.dispatcher(method if method in METHODS else "LORA", name)
    if method in METHODS and (base := classes.base_of(prefixes()[method], name)) is not None:
        return classes.layer_class(method, name, base)
    for peft_type, prefix in prefixes().items():
        if name == f"{prefix}Layer":
            return classes.layer_class(peft_type, name, ())
        if name == METHODS[peft_type][2]:
            return config_class(peft_type)
        if name == MAPPING.format(peft_type.replace("_", "")):
            return _targets(peft_type)
    if hasattr(trimtab, name) and name in {*trimtab.__all__, *models()}:
        return getattr(trimtab, name)
    for source in SOURCES:
        module_ = import_module(source)
        if name in module_.__all__:
            return getattr(module_, name)
    raise KeyError(name)


def models() -> list[str]:
    """The names of the methods' tuners."""
    return [f"{prefix}Model" for prefix in prefixes().values()]


def names_of(path: str) -> list[str]:
    """The names of peft's module `path` that `dir()` and `import *` show: those that are trimtab's own."""
    own = [name for name in trimtab.__all__ if not name.startswith("_")]
    own += [row[2] for row in METHODS.values()] + models()
    if path == "peft":
        return sorted({*own, *TOP})
    own += [f"{prefix}Layer" for prefix in prefixes().values()]
    method = _method_of(path)
    if method in METHODS:
        own += [*LAYERS, *(f"{start}{kind}" for start in ("", prefixes()[method], "SVD") for kind in classes.BASES)]
    elif path.startswith("peft.utils"):
        own += [MAPPING.format(peft_type.replace("_", "")) for peft_type in METHODS]
    children = [p.rpartition(".")[2] for p in paths() if p.rpartition(".")[0] == path]
    return sorted({*own, *ALIASES, *children, *(n for s in SOURCES for n in import_module(s).__all__)})


def _targets(peft_type: str) -> dict[str, Any]:
    from trimtab.methods import load

    file, method, _ = METHODS[peft_type]
    found = getattr(load(file, method), "targets", {})  # prompts have none
    return {model: t if isinstance(t, str) else list(t) for model, t in found.items()}
