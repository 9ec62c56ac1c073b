"""AutoPeftModelFor...: an adapter's folder in, base model and adapter out."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any, ClassVar

from trimtab.core.config import PeftConfig, TaskType
from trimtab.core.io import locate, split_hub_arguments
from trimtab.errors import ConfigError
from trimtab.files.sources import resolve_base
from trimtab.shell import tasks as shells
from trimtab.shell.peft_model import PeftModel


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
        **kwargs: Any,
    ) -> Any:
        """The base model with the adapter in a folder or on the Hub.

        Where a tokenizer was saved beside the adapter, the base's embeddings are resized to it.

        Args:
            kwargs: for the base model's `from_pretrained` (dtype, device_map ...).

        Raises:
            ConfigError: the adapter belongs to another task than this class, or does not say which base model it needs.
        """
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
        base_class = cls._base_class(peft_config, task)
        place = {k: v for k, v in hub.items() if k in ("cache_dir", "token", "local_files_only", "force_download")}
        base = base_class.from_pretrained(resolve_base(name), revision=peft_config.revision, **place, **model_arguments)
        cls._fit_vocabulary(base, pretrained_model_name_or_path, hub)
        adapter = {
            k: v for k, v in kwargs.items() if k in ("torch_device", "autocast_adapter_dtype", "low_cpu_mem_usage")
        }
        return cls.target.from_pretrained(
            base,
            pretrained_model_name_or_path,
            adapter_name=adapter_name,
            is_trainable=is_trainable,
            config=config,
            **hub,
            **adapter,
        )

    @classmethod
    def _base_class(cls, config: PeftConfig, task: str | None) -> Any:
        names = {c.task.value: c.base for c in cls.__subclasses__() if c.task is not None}
        name = cls.base or (names.get(task) if task else None)
        if name is not None:
            return getattr(importlib.import_module("transformers"), name)
        mapping = config.auto_mapping or {}
        module = importlib.import_module(mapping["parent_library"])
        return getattr(module, mapping["base_model_class"])

    @staticmethod
    def _fit_vocabulary(base: Any, adapter: str | os.PathLike[str], hub: dict[str, Any]) -> None:
        """Resize the embeddings to the tokenizer saved beside the adapter, if there is one."""
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
