"""Constants of peft's modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from trimtab import methods
from trimtab.core.config import PeftType, PromptLearningConfig
from trimtab.files.codec import EMBEDDINGS
from trimtab.methods import METHODS, config_class
from trimtab.shell.tuner import tuner_class

ALLOWED_COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
UPCAST_DTYPES = tuple(n for n in dir(torch) if n.startswith("float8_"))
DUMMY_MODEL_CONFIG = {"model_type": "custom"}
DUMMY_TARGET_MODULES = "dummy-target-modules"
EMBEDDING_LAYER_NAMES = list(EMBEDDINGS)
INCLUDE_LINEAR_LAYERS_SHORTHAND = "all-linear"
MIN_EXPECTED_CONFIG_KEYS = {"peft_type"}
SEQ_CLS_HEAD_NAMES = ["score", "classifier"]
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING: dict[str, Any] = {}  # every model takes the usual cache
VARIANT_KWARG_KEYS = ["alora_offsets"]
TYPE_CHECKING = False


def prefix_of(peft_type: str) -> str:
    """What the names of a method's tensors start with."""
    return methods.prefix_of(peft_type)


class ByType(Mapping[PeftType, Any]):
    """{method: something of it}; a method's file is loaded when it is looked up."""

    def __init__(self, value: Callable[[str], Any], keep: Callable[[str], bool] = lambda _: True) -> None:
        self.value, self.keep = value, keep

    def __getitem__(self, key: Any) -> Any:
        name = str(getattr(key, "value", key))
        if name not in METHODS or not self.keep(name):
            raise KeyError(key)
        return self.value(name)

    def __iter__(self) -> Iterator[PeftType]:
        return (PeftType(name) for name in METHODS if self.keep(name))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _adapts_layers(name: str) -> bool:
    return not issubclass(config_class(name), PromptLearningConfig)


PEFT_TYPE_TO_CONFIG_MAPPING = ByType(config_class)
PEFT_TYPE_TO_TUNER_MAPPING = ByType(tuner_class, _adapts_layers)
PEFT_TYPE_TO_MIXED_MODEL_MAPPING = ByType(tuner_class, _adapts_layers)
PEFT_TYPE_TO_PREFIX_MAPPING = ByType(prefix_of)

__all__ = [n for n in list(globals()) if n.isupper() and n not in ("METHODS", "EMBEDDINGS")]
