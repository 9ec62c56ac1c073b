"""The configuration of an adapter and its JSON, with Hugging Face PEFT's own field names."""

from __future__ import annotations

import copy
import dataclasses
import enum
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from trimtab.core.fields import SCALARS, default_of
from trimtab.core.fields import check as check_fields
from trimtab.core.fields import nested as settled
from trimtab.core.io import CONFIG_NAME as CONFIG_NAME
from trimtab.core.io import advice, locate, push_to_hub, reading, split_hub_arguments, write_whole
from trimtab.core.report import warn
from trimtab.core.targets import COMPILED, idle
from trimtab.errors import AdapterFileError, ConfigError

FORMAT_VERSION = "0.21.2"  # the release of PEFT whose files ours equal

Config = TypeVar("Config", bound="PeftConfig")


class PeftType(str, enum.Enum):
    """The method an adapter file belongs to (its `peft_type`)."""

    PROMPT_TUNING = "PROMPT_TUNING"
    MULTITASK_PROMPT_TUNING = "MULTITASK_PROMPT_TUNING"
    P_TUNING = "P_TUNING"
    PREFIX_TUNING = "PREFIX_TUNING"
    LORA = "LORA"
    ADALORA = "ADALORA"
    BOFT = "BOFT"
    ADAPTION_PROMPT = "ADAPTION_PROMPT"
    IA3 = "IA3"
    LOHA = "LOHA"
    LOKR = "LOKR"
    OFT = "OFT"
    POLY = "POLY"
    LN_TUNING = "LN_TUNING"
    VERA = "VERA"
    FOURIERFT = "FOURIERFT"
    XLORA = "XLORA"
    HRA = "HRA"
    VBLORA = "VBLORA"
    CPT = "CPT"
    MISS = "MISS"
    RANDLORA = "RANDLORA"
    ROAD = "ROAD"
    TRAINABLE_TOKENS = "TRAINABLE_TOKENS"
    SHIRA = "SHIRA"
    C3A = "C3A"
    WAVEFT = "WAVEFT"
    OSF = "OSF"
    DELORA = "DELORA"
    GRALORA = "GRALORA"
    CARTRIDGE = "CARTRIDGE"
    PVERA = "PVERA"
    PSOFT = "PSOFT"
    LILY = "LILY"
    PEANUT = "PEANUT"
    TINYLORA = "TINYLORA"
    ADAMSS = "ADAMSS"
    HIRA = "HIRA"
    GLORA = "GLORA"
    BEFT = "BEFT"
    UNILORA = "UNILORA"
    SUPERTUNING = "SUPERTUNING"
    FROD = "FROD"
    DEFT = "DEFT"
    SHADOW = "SHADOW"
    # methods that PEFT does not have; see `BEYOND`
    BITFIT = "BITFIT"
    BOTTLENECK = "BOTTLENECK"
    DYLORA = "DYLORA"
    LOREFT = "LOREFT"


BEYOND = frozenset({PeftType.BITFIT, PeftType.BOTTLENECK, PeftType.DYLORA, PeftType.LOREFT})


class TaskType(str, enum.Enum):
    """What the adapted model is for: it selects the `PeftModelFor...` class and the heads that are trained whole."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


def match_pattern(keys: Iterable[str], name: str) -> str | None:
    """The first key of a `rank_pattern` or `alpha_pattern` (a suffix or a regular expression) that fits `name`."""
    return next((key for key in keys if re.match(rf"(.*\.)?({key})$", name)), None)


@dataclass
class PeftConfig:
    """What every adapter's config has.

    Args:
        task_type: one of `TaskType`, or None for a model that is none of these.
        peft_type: one of `PeftType`; set by the method's own config class.
        auto_mapping: where to find the base model's class when there is no task type (written on save).
        peft_version: the version of the file format, written on save.
        base_model_name_or_path: the model the adapter was trained on.
        revision: the base model's revision on the Hub.
        inference_mode: the adapter starts frozen.
    """

    task_type: str | TaskType | None = None
    peft_type: str | PeftType | None = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    # The registry of methods is a floor above: it sets this when it is imported.
    class_of: ClassVar[Callable[[str], type[PeftConfig]]]
    # Fields that change nothing yet, with the reason: a non-default value is refused when the adapter is built.
    pending: ClassVar[dict[str, str]] = {}
    # Fields that map module names or regular expressions to values.
    patterns: ClassVar[tuple[str, ...]] = ("rank_pattern", "alpha_pattern")
    # Fields that hold settings of a class of their own, read from the file as a dict: field -> "module:class".
    nested: ClassVar[dict[str, str]] = {}
    # {type of a target: class that makes the layer there}, of a method that knows how to tell it.
    custom_modules: ClassVar[Any] = None
    runtime: ClassVar[frozenset[str]] = frozenset()  # fields that never reach the file

    def __post_init__(self) -> None:
        for name, place in self.nested.items():
            setattr(self, name, settled(getattr(self, name), f"trimtab.{place}", f"{type(self).__name__}: `{name}`"))
        check_fields(self)
        self._check_expressions()
        self.peft_version = self.peft_version or FORMAT_VERSION
        if self.task_type is not None and self.task_type not in list(TaskType):
            known = ", ".join(t.value for t in TaskType)
            raise ConfigError(
                f"Invalid task type: '{self.task_type}'. Must be one of the following task types: {known}."
            )

    def _check_expressions(self) -> None:
        """Raise for regular expressions that are none, as they stand where they are used."""
        found = [
            (n, v, v) for n in ("target_modules", "exclude_modules") if isinstance(v := getattr(self, n, None), str)
        ]
        layers = getattr(self, "layers_pattern", None) or ()
        found += [("layers_pattern", p, rf"{p}\.(\d+)\.") for p in ([layers] if isinstance(layers, str) else layers)]
        found += [(name, key, rf"(.*\.)?({key})$") for name in self.patterns for key in getattr(self, name, None) or ()]
        faults = []
        for name, shown, expression in found:
            try:
                re.compile(expression)
            except (re.error, OverflowError, RecursionError) as error:
                faults.append(f"`{name}`: {shown!r} is no regular expression ({error})")
        if faults:
            raise ConfigError(f"{type(self).__name__}: {'; '.join(faults)}.")

    @property
    def is_prompt_learning(self) -> bool:
        """Whether the adapter is a prompt in front of the model rather than a change of its layers."""
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        """Whether the adapter is an adaption prompt."""
        return self.peft_type == PeftType.ADAPTION_PROMPT

    @property
    def unknown(self) -> dict[str, Any]:
        """Keys of the file this version does not know: they change nothing and are written back."""
        return dict(self.__dict__.get("_unknown", {}))

    def resolve(self, name: str) -> Any:
        """This config as it holds for the module `name`; methods with per-module patterns override it."""
        return self

    def check(self) -> None:
        """Raise for a field that has a wrong value or does not act yet: called when an adapter is built."""
        check_fields(self)
        for f in dataclasses.fields(self):
            if f.name in self.pending and getattr(self, f.name) != default_of(f):
                raise NotImplementedError(
                    f"`{f.name}={getattr(self, f.name)!r}` of {type(self).__name__} does not act yet: "
                    f"{self.pending[f.name]}."
                )

    def copy(self: Config) -> Config:
        """A deep copy: what a model does to its config never reaches the caller's object."""
        own = self.shallow()
        own.__dict__.update({k: copy.deepcopy(v) for k, v in vars(self).items() if type(v) not in SCALARS})
        return own

    def shallow(self: Config) -> Config:
        """A copy that shares its values, for `resolve`: validation is not run again."""
        return copy.copy(self)

    # ------------------------------------------------------------------ JSON
    def to_dict(self) -> dict[str, Any]:
        """The fields as a plain dict, without settings of one run."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in self.runtime}

    def to_json(self) -> dict[str, Any]:
        """The fields as they stand in `adapter_config.json`: names sorted, sets as sorted lists."""
        return dict(sorted({**self.unknown, **_plain(self.to_dict())}.items()))

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write `adapter_config.json` into the folder (created if need be), whole or not at all."""
        folder = Path(save_directory)
        if folder.is_file():
            raise AssertionError(f"Provided path ({save_directory}) should be a directory, not a file")
        write_whole({folder / CONFIG_NAME: self.writer(**kwargs)})

    push_to_hub = push_to_hub

    def writer(self, auto_mapping_dict: dict[str, Any] | None = None, **kwargs: Any) -> Callable[[Path], None]:
        """A function that writes this config to a path."""
        content = self.to_json()
        if auto_mapping_dict is not None:
            content["auto_mapping"] = auto_mapping_dict
        text = json.dumps(content, indent=2, sort_keys=True).replace(COMPILED, "")

        def write(path: Path) -> None:
            path.write_text(text, encoding="utf-8")

        return write

    @classmethod
    def from_dict(
        cls, attributes: Mapping[str, Any], source: str = "the given dict", overrides: Mapping[str, Any] | None = None
    ) -> Any:
        """A config from the content of an `adapter_config.json`; its `peft_type` decides the class.

        Unknown keys are kept (`.unknown`), written back on save, and reported with a warning. `overrides` win over
        the content where they are fields: callers pass arguments for other loaders along.
        """
        overrides = overrides or {}
        kind = overrides.get("peft_type", attributes.get("peft_type"))
        try:
            target = cls if kind is None else PeftConfig.class_of(str(getattr(kind, "value", kind)))
            if target is PeftConfig:
                raise ConfigError("There is no `peft_type`, so the method it belongs to is unknown.")
            known = {f.name for f in dataclasses.fields(target)} | set(attributes)
            fields = {**attributes, **{k: v for k, v in overrides.items() if k in known}}
            fields.pop("peft_type", None)
            return target._from_fields(fields, source)
        except ValueError as error:  # a ConfigError, or what PEFT's users know as one
            raise ConfigError(f"{source}: {error}") from error

    @classmethod
    def _from_fields(cls, attributes: dict[str, Any], source: str) -> Any:
        known = {f.name for f in dataclasses.fields(cls) if f.init}
        for key in sorted(set(attributes) & cls.runtime):
            warn(f"`{key}` in {source} is ignored: it is a setting of one run, not of an adapter.")
            del attributes[key]
        unknown = {k: v for k, v in attributes.items() if k not in known}
        if unknown:
            warn(
                f"Unexpected keyword arguments {sorted(unknown, key=str)} for class {cls.__name__}, these are "
                f"ignored: {source} was probably written by a newer version (peft_version "
                f"{attributes.get('peft_version')!r}, known here: {FORMAT_VERSION}). They are kept, and written back "
                "on save."
            )
        config = cls(**{k: v for k, v in attributes.items() if k in known})
        if unknown:
            config.__dict__["_unknown"] = unknown
        return config

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> Any:
        """A config from keyword arguments, one of which is `peft_type`."""
        return cls.from_dict(kwargs, "from_peft_type(...)")

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike[str], **kwargs: Any) -> dict[str, Any]:
        """The content of a config file as a dict."""
        try:
            content = json.loads(Path(path_json_file).read_text(encoding="utf-8"))
        except (ValueError, OSError, RecursionError) as error:
            raise AdapterFileError(f"'{path_json_file}' is not a readable adapter config: {error}") from error
        if not isinstance(content, dict):
            raise AdapterFileError(f"'{path_json_file}' is not a readable adapter config: it holds no JSON object.")
        return content

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any
    ) -> Any:
        """The config of an adapter in a folder or on the Hub; keyword arguments override its fields.

        Raises:
            AdapterFileError: there is no `adapter_config.json`, or it cannot be read.
        """
        hub, overrides = split_hub_arguments(kwargs)
        with reading(pretrained_model_name_or_path, subfolder):
            path = locate(pretrained_model_name_or_path, CONFIG_NAME, subfolder=subfolder, **hub)
            if path is None:
                where = os.path.join(pretrained_model_name_or_path, subfolder or "")  # noqa: PTH118 - or a Hub id
                raise AdapterFileError(f"Can't find '{CONFIG_NAME}' at '{where}'.{advice(where)}")
            content = cls.from_json_file(path)
        return cls.from_dict(content, f"'{path}'", overrides)

    @classmethod
    def _get_peft_type(cls, model_id: str, **kwargs: Any) -> str:
        return type_name(cls.from_pretrained(model_id, **kwargs))


def type_name(config: Any) -> str:
    """The `peft_type` of a config as its file has it."""
    return str(getattr(config.peft_type, "value", config.peft_type))


@dataclass
class LayerConfig(PeftConfig):
    """What the configs of methods that adapt layers share.

    Args:
        target_modules: a list of names (exact, or the end of a path), a regular expression over whole paths,
            "all-linear", or None for the architecture's default.
        exclude_modules: the same, for modules to leave alone; wins over `target_modules`.
        modules_to_save: modules to train and save whole, as a copy.
        layers_to_transform: the indices of the layers to adapt (lists of targets only).
        layers_pattern: the name of the list of layers, where the index is not the first number of a path.
    """

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    sets: ClassVar[tuple[str, ...]] = ("target_modules", "exclude_modules")  # of names; PEFT keeps some methods' lists

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.sets:
            if isinstance(value := getattr(self, name), list):
                setattr(self, name, set(value))
        if faults := idle(vars(self)):
            raise ConfigError(next(iter(faults.values())))

    @classmethod
    def _from_fields(cls, attributes: dict[str, Any], source: str) -> Any:
        # PEFT's configs of many methods take and ignore them: the adapter was trained without
        own = {f.name for f in dataclasses.fields(cls)}
        for name, reason in idle({k: v for k, v in attributes.items() if k in own}).items():
            warn(f"`{name}` in {source} is ignored. {reason}")
            del attributes[name]
        return super()._from_fields(attributes, source)


@dataclass
class PromptLearningConfig(PeftConfig):
    """What the configs of prompt methods share.

    Args:
        num_virtual_tokens: the length of the prompt.
        token_dim: the width of the base model's embeddings; read from the model when None.
        num_transformer_submodules: 2 where encoder and decoder both get a prompt, 1 otherwise; read from the task.
        num_attention_heads: heads of the base model; read from the model when None.
        num_layers: layers of the base model; read from the model when None.
        modules_to_save: modules to train and save whole, as a copy.
    """

    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    modules_to_save: list[str] | None = None

    @property
    def is_prompt_learning(self) -> bool:
        """Always true."""
        return True


def help_field(text: str, default: Any = dataclasses.MISSING, factory: Any = dataclasses.MISSING) -> Any:
    """A dataclass field with a help text, as `HfArgumentParser` shows it."""
    if factory is not dataclasses.MISSING:
        return field(default_factory=factory, metadata={"help": text})
    return field(default=default, metadata={"help": text})


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(_plain(v) for v in value)
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value.value if isinstance(value, enum.Enum) else value
