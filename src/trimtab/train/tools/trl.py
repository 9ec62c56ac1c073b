"""Files of TRL's command line: `trl sft --config file.yaml`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trimtab.train.tools.common import COMMON, QUANTISED, SPEED, TEMPLATE, data_set, only, prompts, same_if
from trimtab.train.translate import Cannot, Skip, Tool


def together(content: Mapping[str, Any]) -> dict[str, Any]:
    """The adapter, and the data set."""
    if not content.get("use_peft"):
        raise Cannot("without use_peft TRL trains the whole model, and trimtab adapters: set use_peft: true", "method")
    sets = content.get("datasets") or [{"path": content.get("dataset_name")}]
    return {"method": "lora", **data_set(sets, "data")}


def evaluation(value: Any) -> dict[str, Any]:
    if value in ("no", False, None):
        return {"eval_steps": -1}
    raise Cannot("name a file of rows to be tested on, since no second split is read", "eval_data")


TRL = Tool(
    name="TRL",
    knows=lambda c: bool({"use_peft", "dataset_name"} & set(c)),
    rules={
        **COMMON,
        "model_name_or_path": "model",
        "model_revision": only("main", None, why="give it as revision", instead="revision"),
        "dtype": same_if("precision", float32="fp32", bfloat16="bf16", auto="auto"),
        "torch_dtype": same_if("precision", float32="fp32", bfloat16="bf16", auto="auto"),
        "lora_r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "use_rslora": "use_rslora",
        "use_dora": "use_dora", "lora_target_modules": "target_modules", "lora_modules_to_save": "modules_to_save",
        "lora_target_parameters": "target_parameters", "lora_task_type": only("CAUSAL_LM", why="only CAUSAL_LM"),
        "load_in_4bit": QUANTISED, "load_in_8bit": QUANTISED,
        "dataset_config": Cannot("one configuration of a data set cannot be chosen", "data"),
        "dataset_train_split": only("train", why="the split train is read", instead="data"),
        "dataset_test_split": Skip("rows to be tested on are named by eval_data"),
        "dataset_text_field": lambda v: {} if v == "text" else {"text_field": v},
        "dataset_num_proc": SPEED, "dataset_kwargs": Cannot("its arguments are not known here"),
        "max_length": lambda v: {"max_length": v, "too_long": "truncate"},
        "max_seq_length": lambda v: {"max_length": v, "too_long": "truncate"},
        "truncation_mode": only("keep_start", why="the beginning is kept", instead="too_long"),
        "packing": "packing",
        "packing_strategy": only("bfd", why="rows are packed whole, the longest first"),
        "padding_free": SPEED, "eval_packing": SPEED, "pad_to_multiple_of": SPEED, "pad_token": SPEED,
        "completion_only_loss": lambda v: {} if v is None else prompts(not v),
        "assistant_only_loss": lambda v: prompts(False) if v else {},
        "eos_token": Cannot("the tokenizer's own end token is used"), "chat_template_path": TEMPLATE,
        "eval_strategy": evaluation,
        "activation_offloading": SPEED, "loss_type": only("nll", "chunked_nll", why="only the plain loss"),
    },
    defaults={"learning_rate": 2e-5, "warmup_ratio": 0.0, "lora_dropout": 0.05, "target_modules": None,
              "max_length": 1024, "too_long": "truncate"},
    together=together,
    keys=("use_peft", "dataset_name", "datasets"),
    notes=("TRL learns whole conversations of `messages` rows unless assistant_only_loss is set; here answers only are "
           "learned, unless train_on is all.",),
)  # fmt: skip
