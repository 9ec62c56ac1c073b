"""AutoPeftModelFor...: an adapter's folder in, base model and adapter out."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from trimtab.core.config import PeftConfig, TaskType
from trimtab.core.io import locate, split_hub_arguments
from trimtab.errors import BaseModelError, ConfigError
from trimtab.files.codec import PREFIX, unwrapped
from trimtab.files.sources import resolve_base
from trimtab.files.store import load_shapes
from trimtab.shell import tasks as shells
from trimtab.shell.arguments import require_source
from trimtab.shell.peft_model import PeftModel

LIBRARIES = ("diffusers", "lerobot", "megatron-core", "transformers")
OURS = ("torch_device", "autocast_adapter_dtype")  # arguments for the adapter, not for the base


class AutoPeftModel:
    """Loads the base model that an adapter's config names, and the adapter on it; its task says which classes."""

    target: ClassVar[type[PeftModel]] = PeftModel
    base: ClassVar[str | None] = None  # the transformers class of the base
    task: ClassVar[TaskType | None] = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise OSError(
            f"{type(self).__name__} is designed to be instantiated using the "
            f"`{type(self).__name__}.from_pretrained(pretrained_model_name_or_path)` method."
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        import_allowlist: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base model with the adapter in a folder or on the Hub.

        The base's embeddings are resized to those in the adapter's file, or else to a tokenizer saved beside it.

        Args:
            import_allowlist: libraries beside the known ones that the adapter's file may name the base's class in; a
                module that a file names is imported, which runs it.
            kwargs: for the base model's `from_pretrained` (dtype, device_map ...).

        Raises:
            ConfigError: the adapter belongs to another task than this class, does not say which base model it needs, or
                names a class that may not be imported.
            BaseModelError: the base model cannot be had.
        """
        require_source(pretrained_model_name_or_path, f"{cls.__name__}.from_pretrained(folder)")
        hub, model_arguments = split_hub_arguments({**kwargs, "revision": revision})
        peft_config = PeftConfig.from_pretrained(pretrained_model_name_or_path, **hub)
        name = peft_config.base_model_name_or_path
        if not name:
            raise ConfigError(
                f"The adapter in '{pretrained_model_name_or_path}' does not name its base model: load that "
                "yourself and call PeftModel.from_pretrained(model, adapter)."
            )
        task = getattr(peft_config.task_type, "value", peft_config.task_type)
        if cls.task is not None and task is not None and task != cls.task.value:
            raise ConfigError(
                f"Expected target PEFT class: {shells.MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task].__name__}, but "
                f"you have asked for: {cls.target.__name__} make sure that "
                "you are loading the correct model for your task type."
            )
        if cls.task is None and task is None and cls.base is None and not peft_config.auto_mapping:
            raise ConfigError(
                "Cannot infer the auto class from the config, please make sure that "
                "you are loading the correct model for your task type."
            )
        source = str(pretrained_model_name_or_path)
        base_class = cls._base_class(peft_config, task, source, import_allowlist or ())
        place = {k: v for k, v in hub.items() if k in ("cache_dir", "token", "local_files_only", "force_download")}
        adapter = {k: model_arguments.pop(k) for k in OURS if k in model_arguments}
        adapter |= {k: v for k, v in kwargs.items() if k == "low_cpu_mem_usage"}
        base = _load_base(base_class, name, source, revision=peft_config.revision, **place, **model_arguments)
        cls._fit_vocabulary(base, pretrained_model_name_or_path, hub)
        return cls.target.from_pretrained(
            base, pretrained_model_name_or_path, adapter_name, is_trainable, config=config, **hub, **adapter
        )

    @classmethod
    def _base_class(cls, config: PeftConfig, task: str | None, source: str, allowed: Sequence[str]) -> Any:
        names = {c.task.value: c.base for c in cls.__subclasses__() if c.task is not None}
        if (own := cls.base or (names.get(task) if task else None)) is not None:
            return getattr(importlib.import_module("transformers"), own)
        mapping = config.auto_mapping or {}
        library, name = mapping.get("parent_library"), mapping.get("base_model_class")
        by_hand = (
            f"Load the base yourself and call PeftModel.from_pretrained(model, '{source}'), or say what it is for: "
            "AutoPeftModelForCausalLM, for one, knows its class."
        )
        if not isinstance(library, str) or not isinstance(name, str):
            raise ConfigError(f"The `auto_mapping` of the adapter in '{source}' names no class: {mapping!r}. {by_hand}")
        said = f"The adapter in '{source}' names '{name}' of '{library}' as the class of its base model"
        if not check_import_allowlist([*get_default_import_allowlist(), *allowed], library):
            raise ConfigError(
                f"{said}. To import what a file names runs it, so only known libraries are. If you trust it, pass "
                f"import_allowlist=['{library}']. {by_hand}"
            )
        try:
            found = getattr(importlib.import_module(library), name)
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"{said}: {error}. {by_hand}") from error
        if not isinstance(found, type) or not hasattr(found, "from_pretrained"):
            raise ConfigError(f"{said}, which is none. {by_hand}")
        return found

    @staticmethod
    def _fit_vocabulary(base: Any, adapter: str | os.PathLike[str], hub: dict[str, Any]) -> None:
        """Resize the embeddings to those in the adapter's file, or else to a tokenizer saved beside it."""
        rows = _rows(base, load_shapes(adapter, **hub))
        if rows is not None:
            if rows != len(base.get_input_embeddings().weight):
                base.resize_token_embeddings(rows)
            return
        folder = Path(adapter)
        if folder.is_dir():
            if not (folder / (hub.get("subfolder") or "") / "tokenizer_config.json").is_file():
                return
        elif locate(adapter, "tokenizer_config.json", **hub) is None:
            return
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(adapter, **{k: v for k, v in hub.items() if v is not None})
        if base.get_input_embeddings().weight.shape[0] < len(tokenizer):
            base.resize_token_embeddings(len(tokenizer))


def get_default_import_allowlist() -> list[str]:
    """The libraries that an adapter's file may name the class of its base model in."""
    return list(LIBRARIES)


def check_import_allowlist(allowlist: Sequence[str], parent_name: str) -> bool:
    """Whether a module is one of these libraries, or inside of one."""
    return any(parent_name == known or parent_name.startswith(f"{known}.") for known in allowlist)


def _rows(base: Any, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """The size of the vocabulary that an adapter's file has an embedding or a head of, or None."""
    held = {unwrapped(key): shape for key, shape in shapes.items()}
    for get in ("get_input_embeddings", "get_output_embeddings"):
        module = getattr(base, get, lambda: None)()
        path = next((name for name, m in base.named_modules() if m is module and module is not None), None)
        for form in ("weight", "base_layer.weight", "token_adapter.base_layer.weight") if path else ():
            if len(shape := held.get(f"{PREFIX}{path}.{form}", ())) == 2:
                return shape[0]
        if path and len(shape := held.get(f"{PREFIX}{path}.lora_embedding_A", ())) == 2:
            return shape[1]
    return None


def _load_base(base_class: Any, name: str, source: str, **arguments: Any) -> Any:
    """The base model, or an error that names it and the adapter."""
    from huggingface_hub.errors import HFValidationError

    path = Path(name).expanduser()
    by_hand = (
        f"If it has moved, load it yourself and call PeftModel.from_pretrained(model, '{source}'), or correct "
        "`base_model_name_or_path` in the adapter's adapter_config.json."
    )
    if (path.is_absolute() or name.startswith(".") or name.count("/") > 1) and not path.exists():
        raise BaseModelError(
            f"The base model of the adapter in '{source}' is '{name}': there is no such folder. {by_hand}"
        )
    try:
        return base_class.from_pretrained(resolve_base(name), **arguments)
    except (OSError, HFValidationError) as error:
        raise BaseModelError(
            f"The base model of the adapter in '{source}' is '{name}', which cannot be loaded: {error} {by_hand}"
        ) from error


class AutoPeftModelForCausalLM(AutoPeftModel):
    """AutoPeftModel for causal language models."""

    target, base, task = shells.PeftModelForCausalLM, "AutoModelForCausalLM", TaskType.CAUSAL_LM


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """AutoPeftModel for encoder-decoder language models."""

    target, base, task = shells.PeftModelForSeq2SeqLM, "AutoModelForSeq2SeqLM", TaskType.SEQ_2_SEQ_LM


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """AutoPeftModel for sequence classification."""

    target, base, task = (
        shells.PeftModelForSequenceClassification,
        "AutoModelForSequenceClassification",
        TaskType.SEQ_CLS,
    )


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """AutoPeftModel for token classification."""

    target, base, task = shells.PeftModelForTokenClassification, "AutoModelForTokenClassification", TaskType.TOKEN_CLS


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """AutoPeftModel for extractive question answering."""

    target, base, task = shells.PeftModelForQuestionAnswering, "AutoModelForQuestionAnswering", TaskType.QUESTION_ANS


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """AutoPeftModel for feature extraction."""

    target, base, task = shells.PeftModelForFeatureExtraction, "AutoModel", TaskType.FEATURE_EXTRACTION
