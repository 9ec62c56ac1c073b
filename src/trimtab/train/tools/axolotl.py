"""Files of axolotl: `axolotl train file.yml`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trimtab.train.tools.common import (
    COMMON,
    OWN_RUN,
    QUANTISED,
    SPEED,
    TEMPLATE,
    data_set,
    loraplus,
    optimizer,
    prompts,
    same_if,
    scheduler,
    stage,
)
from trimtab.train.translate import Cannot, Tool

TYPES = ("chat_template", "alpaca", "completion", "sharegpt", "")
# What holds here anyway, of a data set.
USUAL: dict[str, tuple[Any, ...]] = {
    "roles_to_train": (["assistant"],),
    "train_on_eos": ("turn",),
    "train_on_eot": ("turn",),
    "message_property_mappings": ({"role": "role", "content": "content"}, {"role": "from", "content": "value"}),
}


def together(content: Mapping[str, Any]) -> dict[str, Any]:
    """Data sets, and what is done so many times an epoch."""
    found: dict[str, Any] = {}
    for key, ours in (("datasets", "data"), ("test_datasets", "eval_data")):
        if content.get(key):
            found |= data_set([_plain(one, ours, found) for one in content[key]], ours)
    epochs = float(content.get("num_epochs") or 1)
    for key, ours in (("evals_per_epoch", "eval_steps"), ("saves_per_epoch", "save_steps")):
        if times := content.get(key):
            found[ours] = 0 if times == 1 else round(1 / (times * epochs), 6)
    return found


def _plain(one: Mapping[str, Any], ours: str, found: dict[str, Any]) -> dict[str, Any]:
    """A data set without what goes without saying here; a column of another name is put into `found`."""
    left = {k: v for k, v in one.items() if v not in (None, "", False, *USUAL.get(k, ()))}
    kind = left.pop("type", "")
    if not isinstance(kind, str) or kind.partition(".")[0] not in TYPES:
        raise Cannot(f"rows of the type {kind} are not read; the kind of a row is read off its keys", ours)
    left.pop("chat_template", None)
    if name := left.pop("field_messages", None):
        found["messages_field"] = name
    return left


def adapter(value: Any) -> dict[str, Any]:
    if value == "qlora":
        raise Cannot("give a model that is stored in 4 bits, and adapter: lora", "method")
    return {"method": value}


def all_linear(value: Any) -> dict[str, Any]:
    return {"target_modules": "all-linear"} if value else {}


def special_tokens(value: Any) -> dict[str, Any]:
    if set(value) - {"pad_token"}:
        raise Cannot(f"{', '.join(set(value) - {'pad_token'})}: the tokenizer's own special tokens are used")
    return {}


def wandb(value: Any) -> dict[str, Any]:
    return {"report_to": ["wandb"]}


AXOLOTL = Tool(
    name="axolotl",
    knows=lambda c: "base_model" in c and bool({"adapter", "sequence_len", "micro_batch_size"} & set(c)),
    rules={
        **{k: COMMON[k] for k in (
            "learning_rate max_steps weight_decay max_grad_norm seed save_steps eval_steps save_total_limit output_dir "
            "gradient_accumulation_steps warmup_ratio warmup_steps eval_strategy save_strategy bf16 fp16 tf32 "
            "deepspeed load_best_model_at_end metric_for_best_model fsdp fsdp_config logging_steps "
            "resume_from_checkpoint hub_model_id gradient_checkpointing_kwargs trust_remote_code "
            "neftune_noise_alpha group_by_length"
        ).split()},
        "base_model": "model",
        "adapter": adapter,
        "lora_r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout",
        "lora_target_modules": "target_modules", "lora_target_linear": all_linear,
        "lora_target_parameters": "target_parameters", "lora_modules_to_save": "modules_to_save",
        "lora_rank_pattern": "rank_pattern", "lora_alpha_pattern": "alpha_pattern",
        "lora_fan_in_fan_out": "fan_in_fan_out", "peft_use_dora": "use_dora", "peft_use_rslora": "use_rslora",
        "peft_init_lora_weights": "init_lora_weights", "peft_trainable_token_indices": "trainable_token_indices",
        "peft_layers_to_transform": "layers_to_transform", "peft_layers_pattern": "layers_pattern",
        "lora_model_dir": "continue_from", "loraplus_lr_ratio": loraplus,
        "load_in_4bit": QUANTISED, "load_in_8bit": QUANTISED,
        "num_epochs": "num_train_epochs", "micro_batch_size": "per_device_train_batch_size",
        "eval_batch_size": "per_device_eval_batch_size", "optimizer": optimizer,
        "lr_scheduler": scheduler, "early_stopping_patience": "early_stopping_patience",
        "gradient_checkpointing": lambda v: {"gradient_checkpointing": bool(v)},
        "sequence_len": "max_length", "excess_length_strategy": same_if("too_long", drop="drop", truncate="truncate",
                                                                         **{"raise": "error"}),
        "sample_packing": "packing", "eval_sample_packing": SPEED, "pad_to_sequence_len": SPEED,
        "val_set_size": "val_size", "train_on_inputs": prompts,
        "default_system_message": "system", "special_tokens": special_tokens, "tokens": Cannot("no token is added"),
        "chat_template": TEMPLATE, "flash_attention": SPEED, "sdp_attention": SPEED, "xformers_attention": SPEED,
        "flex_attention": SPEED, "eager_attention": SPEED, "attn_implementation": SPEED, "lora_mlp_kernel": SPEED,
        "lora_qkv_kernel": SPEED, "lora_o_kernel": SPEED, "activation_offloading": SPEED, "torch_compile": SPEED,
        "dataset_prepared_path": SPEED, "dataset_processes": SPEED, "dataset_num_proc": SPEED, "strict": OWN_RUN,
        "model_type": OWN_RUN, "tokenizer_type": OWN_RUN, "is_llama_derived_model": OWN_RUN, "local_rank": OWN_RUN,
        "wandb_project": wandb, "use_wandb": wandb, "wandb_name": OWN_RUN, "wandb_entity": OWN_RUN,
        "wandb_watch": OWN_RUN, "wandb_run_id": OWN_RUN, "wandb_log_model": OWN_RUN,
        "use_tensorboard": lambda v: {"report_to": ["tensorboard"]}, "trackio_project_name": OWN_RUN,
        "use_trackio": lambda v: {"report_to": ["trackio"]}, "debug": OWN_RUN, "save_safetensors": OWN_RUN,
        "rl": stage, "plugins": Cannot("plug-ins of axolotl are not loaded"),
    },
    defaults={"num_train_epochs": 1.0, "per_device_train_batch_size": 1, "max_length": 512, "too_long": "drop",
              "lr_scheduler_type": "cosine", "warmup_ratio": 0.03, "target_modules": None},
    together=together,
    keys=("datasets", "test_datasets", "evals_per_epoch", "saves_per_epoch"),
)  # fmt: skip
