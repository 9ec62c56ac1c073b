"""The names other tools have for our settings, and the nearest name to one that is none."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Any


def _same(value: Any) -> Any:
    return value


def _all_linear(value: Any) -> Any:
    return "all-linear" if value == "all" else value


def _bf16(value: Any) -> Any:
    return {True: "bf16", "true": "bf16", False: "fp32", "false": "fp32"}.get(value, value)


def _all(value: Any) -> Any:
    return {True: "all", "true": "all", False: "completions", "false": "completions"}.get(value, value)


def _only(value: Any) -> Any:
    return {True: "completions", "true": "completions", False: "all", "false": "all"}.get(value, value)


def _optim(value: Any) -> Any:
    return "adamw" if value in ("adamw_torch", "adamw_torch_fused", "adamw_hf") else value


# their name: (ours, what becomes of the value)
ALIASES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    theirs: (ours, _same)
    for ours, names in {
        "model": "model_name_or_path base_model model_name",
        "revision": "model_revision",
        "data": "dataset train_file data_path dataset_path train_data",
        "eval_data": "eval_dataset valid_data validation_file eval_file",
        "val_size": "val_set_size",
        "prompt_field": "prompt_feature",
        "completion_field": "completion_feature",
        "text_field": "dataset_text_field text_feature",
        "max_length": "max_seq_length max_seq_len sequence_len cutoff_len",
        "packing": "sample_packing",
        "learning_rate": "lr",
        "num_train_epochs": "epochs num_epochs",
        "max_steps": "iters",
        "per_device_train_batch_size": "batch_size micro_batch_size train_batch_size",
        "per_device_eval_batch_size": "eval_batch_size",
        "gradient_accumulation_steps": "grad_accumulation_steps",
        "lr_scheduler_type": "lr_scheduler",
        "gradient_checkpointing": "grad_checkpoint",
        "output": "output_dir adapter_path out out_dir",
        "overwrite_output_dir": "overwrite",
        "resume": "resume_from_checkpoint",
        "save_steps": "save_every",
        "load_best": "load_best_model_at_end",
        "eval_steps": "steps_per_eval",
        "early_stopping_patience": "early_stopping_steps",
        "method": "finetuning_type fine_tune_type peft_type",
        "r": "lora_r lora_rank rank",
        "lora_alpha": "alpha",
        "modules_to_save": "lora_modules_to_save additional_target",
        "target_parameters": "lora_target_parameters",
        "use_rslora": "peft_use_rslora",
        "use_dora": "peft_use_dora",
        "init_lora_weights": "peft_init_lora_weights",
    }.items()
    for theirs in names.split()
}
ALIASES |= {
    "optim": ("optimizer", _optim),
    "completion_only_loss": ("train_on", _only),
    "train_on_inputs": ("train_on", _all),
    "lora_target_modules": ("target_modules", _all_linear),
    "lora_target": ("target_modules", _all_linear),
    "bf16": ("precision", _bf16),
}


def nearest(name: str, known: Iterable[str]) -> str:
    """ "; did you mean X?" for the known name that looks most like this one, or nothing."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {found[0]}?" if found else ""
