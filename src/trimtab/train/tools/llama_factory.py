"""Files of LLaMA-Factory: `llamafactory-cli train file.yaml`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimtab.train.tools.common import (
    COMMON,
    LOGGING,
    OWN_RUN,
    QUANTISED,
    SPEED,
    TEMPLATE,
    loraplus,
    only,
    prompts,
    reports,
    stage,
)
from trimtab.train.translate import Cannot, Skip, Tool


def together(content: Mapping[str, Any]) -> dict[str, Any]:
    """Data sets by their names, and alpha, which follows the rank."""
    folder = Path(content.get("dataset_dir") or "data")
    found: dict[str, Any] = {}
    for key, ours in (("dataset", "data"), ("eval_dataset", "eval_data")):
        if name := content.get(key):
            found |= _registered(str(name), folder, ours)
    if not content.get("lora_alpha"):
        found["lora_alpha"] = 2 * int(content.get("lora_rank") or 8)
    return found


def _registered(name: str, folder: Path, ours: str) -> dict[str, Any]:
    """A data set by its name in dataset_info.json, or a file that is named as one."""
    if "," in name:
        raise Cannot("join the data sets into one file: one is read", ours)
    if (folder / name).is_file() or Path(name).is_file():
        return {ours: name if Path(name).is_file() else str(folder / name)}
    registry = folder / "dataset_info.json"
    if not registry.is_file():
        raise Cannot(f"{name} is no file, and there is no {registry} to look it up in", ours)
    entry = json.loads(registry.read_text(encoding="utf-8")).get(name)
    if entry is None:
        raise Cannot(f"{name} is not in {registry}", ours)
    columns = dict(entry.get("columns") or {})
    fields = {"messages_field": columns.pop("messages", None)}
    plain = {"prompt": "instruction", "query": "input", "response": "output", "system": "system", "tools": "tools"}
    odd = [f"columns.{k}" for k, v in columns.items() if plain.get(k) != v]
    odd += [k for k in ("ranking", "subset", "split", "num_samples", "script_url") if entry.get(k)]
    if odd:
        raise Cannot(f"{', '.join(odd)} of the entry {name} cannot be honoured", ours)
    place = str(folder / entry["file_name"]) if "file_name" in entry else entry.get("hf_hub_url")
    return {ours: place, **{k: v for k, v in fields.items() if v not in (None, "messages", "conversations")}}


def method(value: Any) -> dict[str, Any]:
    if value != "lora":
        raise Cannot("of the ways to fine-tune only lora is taken over", "method")
    return {"method": value}


def packing(value: Any) -> dict[str, Any]:
    return {"packing": bool(value)}


LLAMA_FACTORY = Tool(
    name="LLaMA-Factory",
    knows=lambda c: bool({"stage", "finetuning_type"} & set(c)),
    rules={
        **COMMON,
        "model_name_or_path": "model",
        "model_revision": only("main", None, why="give it as revision", instead="revision"),
        "adapter_name_or_path": "continue_from",
        "stage": stage,
        "finetuning_type": method,
        "lora_rank": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout",
        "lora_target": lambda v: {"target_modules": "all-linear" if v == "all" else v},
        "additional_target": "modules_to_save", "use_rslora": "use_rslora", "use_dora": "use_dora",
        "pissa_init": lambda v: {"init_lora_weights": "pissa"},
        "pissa_iter": only(16, -1, None, why="the whole decomposition is taken", instead="init_lora_weights"),
        "loraplus_lr_ratio": loraplus, "template": TEMPLATE, "trust_remote_code": COMMON["trust_remote_code"],
        "cutoff_len": lambda v: {"max_length": v, "too_long": "truncate"},
        "train_on_prompt": prompts, "mask_history": lambda v: {"train_on": "last"} if v else {},
        "packing": packing, "neat_packing": packing, "val_size": "val_size",
        "default_system": "system", "max_samples": Cannot("take so many rows of the file yourself", "data"),
        "overwrite_cache": SPEED, "preprocessing_num_workers": SPEED, "preprocessing_batch_size": SPEED,
        "flash_attn": SPEED, "enable_liger_kernel": SPEED, "use_unsloth": SPEED, "pure_bf16": SPEED,
        "disable_gradient_checkpointing": SPEED, "plot_loss": Skip("it always is, where matplotlib is installed"),
        "early_stopping_steps": "early_stopping_patience", "create_new_adapter": Cannot("on_top_of merges it first"),
        "quantization_bit": QUANTISED, "quantization_method": Skip("the model is as it is stored"),
        "freeze_vision_tower": OWN_RUN, "report_to": reports, "compute_accuracy": LOGGING,
    },
    defaults={"learning_rate": 5e-5, "r": 8, "max_length": 2048, "too_long": "truncate", "warmup_ratio": 0.0,
              "target_modules": "all-linear"},
    together=together,
    keys=("dataset", "eval_dataset", "dataset_dir"),
)  # fmt: skip
