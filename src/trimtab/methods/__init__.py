"""Floor 3: one file a method. The registry: one line a method, loaded when first used; torch is not, until then."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from trimtab.core.config import PeftConfig, type_name
from trimtab.errors import ConfigError

if TYPE_CHECKING:
    from trimtab.core.method import Method

# peft_type: (file, method, config)
METHODS: dict[str, tuple[str, str, str]] = {
    "ADALORA": ("adalora", "AdaLora", "AdaLoraConfig"),
    "ADAMSS": ("adamss", "Adamss", "AdamssConfig"),
    "ADAPTION_PROMPT": ("adaption_prompt", "AdaptionPrompt", "AdaptionPromptConfig"),
    "BEFT": ("beft", "Beft", "BeftConfig"),
    "BITFIT": ("bitfit", "BitFit", "BitFitConfig"),
    "BOFT": ("boft", "BOFT", "BOFTConfig"),
    "BOTTLENECK": ("bottleneck", "Bottleneck", "BottleneckConfig"),
    "C3A": ("c3a", "C3A", "C3AConfig"),
    "CARTRIDGE": ("cartridge", "Cartridge", "CartridgeConfig"),
    "CPT": ("cpt", "CPT", "CPTConfig"),
    "DEFT": ("deft", "Deft", "DeftConfig"),
    "DELORA": ("delora", "Delora", "DeloraConfig"),
    "DYLORA": ("dylora", "DyLora", "DyLoraConfig"),
    "FOURIERFT": ("fourierft", "FourierFT", "FourierFTConfig"),
    "FROD": ("frod", "Frod", "FrodConfig"),
    "GLORA": ("glora", "Glora", "GloraConfig"),
    "GRALORA": ("gralora", "Gralora", "GraloraConfig"),
    "HIRA": ("hira", "Hira", "HiraConfig"),
    "HRA": ("hra", "HRA", "HRAConfig"),
    "IA3": ("ia3", "IA3", "IA3Config"),
    "LILY": ("lily", "Lily", "LilyConfig"),
    "LN_TUNING": ("ln_tuning", "LNTuning", "LNTuningConfig"),
    "LOHA": ("loha", "LoHa", "LoHaConfig"),
    "LOKR": ("lokr", "LoKr", "LoKrConfig"),
    "LORA": ("lora", "Lora", "LoraConfig"),
    "LOREFT": ("loreft", "LoReFT", "LoReFTConfig"),
    "MISS": ("miss", "Miss", "MissConfig"),
    "MULTITASK_PROMPT_TUNING": ("multitask_prompt_tuning", "MultitaskPromptTuning", "MultitaskPromptTuningConfig"),
    "OFT": ("oft", "OFT", "OFTConfig"),
    "OSF": ("osf", "OSF", "OSFConfig"),
    "PEANUT": ("peanut", "Peanut", "PeanutConfig"),
    "POLY": ("poly", "Poly", "PolyConfig"),
    "PREFIX_TUNING": ("prefix_tuning", "PrefixTuning", "PrefixTuningConfig"),
    "PROMPT_TUNING": ("prompt_tuning", "PromptTuning", "PromptTuningConfig"),
    "PSOFT": ("psoft", "Psoft", "PsoftConfig"),
    "PVERA": ("pvera", "Pvera", "PveraConfig"),
    "P_TUNING": ("p_tuning", "PTuning", "PromptEncoderConfig"),
    "RANDLORA": ("randlora", "RandLora", "RandLoraConfig"),
    "ROAD": ("road", "Road", "RoadConfig"),
    "SHADOW": ("shadow", "Shadow", "ShadowConfig"),
    "SHIRA": ("shira", "Shira", "ShiraConfig"),
    "SUPERTUNING": ("supertuning", "Supertuning", "SupertuningConfig"),
    "TINYLORA": ("tinylora", "TinyLora", "TinyLoraConfig"),
    "TRAINABLE_TOKENS": ("trainable_tokens", "TrainableTokens", "TrainableTokensConfig"),
    "UNILORA": ("unilora", "UniLora", "UniLoraConfig"),
    "VBLORA": ("vblora", "VBLoRA", "VBLoRAConfig"),
    "VERA": ("vera", "Vera", "VeraConfig"),
    "WAVEFT": ("waveft", "WaveFT", "WaveFTConfig"),
    "XLORA": ("xlora", "XLora", "XLoraConfig"),
}

PLAIN = "LORA"  # what can stand for any change of weights

# Types of older files: PEFT 0.21 does not read them, either.
FORMER = {"BONE": "MISS"}

# Fields by which the config of one method asks for another beside it: {module: value}, or a value for the input
# embedding. field: (peft_type, the argument of its config that takes the value, what stands before its leaves)
COMPANIONS: dict[str, tuple[str, str, str]] = {
    "trainable_token_indices": ("TRAINABLE_TOKENS", "token_indices", "token_adapter."),
}


ADDED: dict[str, type[Method]] = {}  # methods from outside


def register_method(peft_type: str, method: type[Method]) -> None:
    """Make a method of your own known: configs and files whose `peft_type` this is are its own from then on.

    Raises:
        ConfigError: the name is taken, or the method has no config class of its own.
    """
    if peft_type in METHODS or ADDED.get(peft_type, method) is not method:
        raise ConfigError(f"There is a method '{peft_type}' already: choose another name.")
    if method.config is PeftConfig or not method.prefix:
        raise ConfigError(f"{method.__name__} needs a `config` class and a `prefix`, as every method has.")
    ADDED[peft_type] = method


def known() -> list[str]:
    """The types of all methods."""
    return [*METHODS, *ADDED]


def config_class(peft_type: str) -> type[PeftConfig]:
    """The config class of a method, by its `peft_type`."""
    if peft_type in ADDED:
        return ADDED[peft_type].config
    file, _, config = _row(peft_type)
    cls: type[PeftConfig] = getattr(import_module(f"{__name__}.{file}"), config)
    return cls


def method_class(config: PeftConfig) -> type[Method]:
    """The method a config asks for: its type's own, or one of that type's variants."""
    if (peft_type := type_name(config)) in ADDED:
        return ADDED[peft_type]
    file, method, _ = _row(peft_type)
    module = import_module(f"{__name__}.{file}")
    chosen = {f: place for f, place in getattr(module, "VARIANTS", {}).items() if chooses(f, vars(config))}
    if len(chosen) > 1:
        raise ConfigError(f"Invalid or unsupported variant combination: {tuple(sorted(chosen))}")
    for place in chosen.values():
        name, _, cls = place.partition(":")
        return load(name, cls)
    return load(file, method)


def chooses(entry: str, fields: Mapping[str, Any]) -> bool:
    """Whether the fields of a config choose a variant by its entry, "field" (not empty) or "field=value"."""
    field, _, value = entry.partition("=")
    return fields.get(field) == value if value else bool(fields.get(field))


def default_targets(config: PeftConfig, model_type: str | None) -> Any:
    """What a config's method, whatever its variant, adapts in models of a type unless told otherwise; or None."""
    peft_type = type_name(config)
    table = (ADDED.get(peft_type) or load(*_row(peft_type)[:2])).targets
    return table.get(model_type or "*", table.get("*"))


def prefix_of(peft_type: str) -> str:
    """What the names of a method's tensors start with."""
    if peft_type in ADDED:
        return ADDED[peft_type].prefix
    file, method, _ = METHODS.get(peft_type, ("", "", ""))
    return (load(file, method).prefix if file else "") or f"{peft_type.lower()}_"


@dataclass(frozen=True)
class Capability:
    """What one method can do, read off its class.

    Attributes:
        method: its `peft_type`, or "<peft_type> (<field>)" for a variant that a field of the config chooses.
        paper: where it is from.
        formula: how it changes a layer's weight.
        kinds: the kinds of layers it adapts.
        fused: one base product serves all rows of a mixed batch; else one for each distinct adapter.
        mergeable: it folds into the base's weights.
        reads: its forward reads the frozen weight, beside the layer's own product.
        when: what it is for.
    """

    method: str
    paper: str
    formula: str
    kinds: tuple[str, ...]
    fused: bool
    mergeable: bool
    reads: bool
    when: str


def capabilities() -> list[Capability]:
    """The capability table: a row for each method and each variant. Imports every method's file."""
    rows = []
    for peft_type, (file, name, _) in METHODS.items():
        variants = getattr(import_module(f"{__name__}.{file}"), "VARIANTS", {})
        places = {peft_type: (file, name)}
        places |= {f"{peft_type} ({field})": tuple(place.split(":")) for field, place in variants.items()}
        for label, (where, cls) in places.items():
            method = load(where, cls)
            first = str(import_module(f"{__name__}.{where}").__doc__).partition("\n")[0]  # of every file: both of them
            paper, _, formula = first.partition(".   ")
            kinds = tuple(sorted(method.kinds))
            facts = method.fused, method.mergeable, method.reads, method.when
            rows.append(Capability(label, paper, formula, kinds, *facts))
    return rows


def load(file: str, name: str) -> Any:
    """An object of a method's file."""
    return getattr(import_module(f"{__name__}.{file}"), name)


def _row(peft_type: str) -> tuple[str, str, str]:
    if peft_type in FORMER:
        raise ConfigError(
            f"'{peft_type}' is what the method {FORMER[peft_type]} was called in older releases of PEFT; 0.21 does not "
            "read its files, either. Convert the adapter with a release that knows both names, or train it anew."
        )
    if peft_type not in METHODS:
        raise ConfigError(f"The method '{peft_type}' is not known here. Known: {', '.join(known())}.")
    return METHODS[peft_type]


PeftConfig.class_of = staticmethod(config_class)
