"""What the tables of all tools share: rules, and the settings that transformers' TrainingArguments have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trimtab.train.translate import Cannot, Rule, Skip

TEMPLATE = Skip("the tokenizer's own chat template is used")
SPEED = Skip("speed or memory only")
LOGGING = Skip("every step is in metrics.jsonl")
OWN_RUN = Skip("each run has its folder")


def same_if(ours: str, **known: Any) -> Callable[[Any], dict[str, Any]]:
    """A choice by its name: {their word: ours}."""

    def rule(value: Any) -> dict[str, Any]:
        if str(value) not in known:
            raise Cannot(f"there is no {value} here, only {', '.join(known)}", ours)
        return {ours: known[str(value)]}

    return rule


def only(*fine: Any, why: str, instead: str = "") -> Callable[[Any], dict[str, Any]]:
    """A setting that is what holds here anyway, and refused where it is anything else."""

    def rule(value: Any) -> dict[str, Any]:
        if value not in fine:
            raise Cannot(why, instead)
        return {}

    return rule


def optimizer(value: Any) -> dict[str, Any]:
    if value not in ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw", "adamw_torch_4bit_none"):
        raise Cannot(f"the optimiser {value} is not built in", "optimizer")
    return {"optimizer": "adamw"}


def scheduler(value: Any) -> dict[str, Any]:
    if value == "constant":  # without a warm-up there
        return {"lr_scheduler_type": "constant", "warmup_ratio": 0.0}
    return same_if("lr_scheduler_type", linear="linear", cosine="cosine", constant_with_warmup="constant")(value)


def warmup(value: Any) -> dict[str, Any]:
    return {"warmup_ratio": value} if isinstance(value, float) and value < 1 else {"warmup_steps": value}


def precision(value: Any) -> dict[str, Any]:
    return {"precision": "bf16" if value is True or str(value).lower() in ("true", "bfloat16") else "auto"}


def half(value: Any) -> dict[str, Any]:
    if value in (True, "true", "True"):
        raise Cannot("fp16 needs a loss scale, which is not built in", "precision")
    return {}


def strategy(ours: str) -> Callable[[Any], dict[str, Any]]:
    """When something is done: each epoch, never, or by its number of steps."""

    def rule(value: Any) -> dict[str, Any]:
        return {"epoch": {ours: 0}, "no": {ours: -1}, "steps": {}}[same_if(ours, epoch="epoch", no="no", steps="steps")(
            {False: "no"}.get(value, value)
        )[ours]]  # fmt: skip

    return rule


def prompts(value: Any) -> dict[str, Any]:
    return {"train_on": "all"} if value else {}


def loraplus(value: Any) -> dict[str, Any]:
    return {"optimizer": "loraplus", "loraplus_lr_ratio": value}


def reports(value: Any) -> dict[str, Any]:
    names = [value] if isinstance(value, str) else list(value)
    if "all" in names:
        raise Cannot("name the trackers", "report_to")
    return {"report_to": [n for n in names if n != "none"]}


def several(value: Any) -> dict[str, Any]:
    raise Cannot("sharding and offloading are set with `accelerate launch`, not in this file")


HUB = Cannot("nothing is uploaded: huggingface-cli upload RUN/adapter")
QUANTISED = Cannot("give a model that is stored in 4 or 8 bits; none is converted while loading")

# What transformers' TrainingArguments have, so TRL and LLaMA-Factory.
COMMON: dict[str, Rule] = {
    **{
        name: name
        for name in (
            "learning_rate num_train_epochs max_steps per_device_train_batch_size per_device_eval_batch_size "
            "gradient_accumulation_steps warmup_ratio weight_decay max_grad_norm seed save_steps eval_steps "
            "save_total_limit gradient_checkpointing overwrite_output_dir"
        ).split()
    },
    "output_dir": "output",
    "lr_scheduler_type": scheduler,
    "warmup_steps": warmup,
    "optim": optimizer,
    "bf16": precision,
    "fp16": half,
    "eval_strategy": strategy("eval_steps"),
    "evaluation_strategy": strategy("eval_steps"),
    "save_strategy": strategy("save_steps"),
    "load_best_model_at_end": "load_best",
    "metric_for_best_model": only(None, "loss", "eval_loss", why="only the held-out loss", instead="load_best"),
    "greater_is_better": only(None, False, why="a smaller loss is better"),
    "report_to": reports,
    "resume_from_checkpoint": only(None, False, True, why="--resume goes on from the last one", instead="resume"),
    "logging_steps": LOGGING, "logging_strategy": LOGGING, "logging_first_step": LOGGING, "logging_dir": LOGGING,
    "run_name": OWN_RUN, "do_train": OWN_RUN, "do_eval": OWN_RUN, "project": OWN_RUN,
    "dataloader_num_workers": SPEED, "dataloader_pin_memory": SPEED, "ddp_timeout": SPEED, "tf32": SPEED,
    "gradient_checkpointing_kwargs": SPEED, "attn_implementation": SPEED, "use_liger_kernel": SPEED,
    "torch_compile": SPEED, "group_by_length": Skip("rows of like length always share a batch"),
    "save_only_model": Skip("checkpoints can always be resumed"), "include_num_input_tokens_seen": LOGGING,
    "push_to_hub": HUB, "hub_model_id": HUB, "deepspeed": several, "fsdp": several, "fsdp_config": several,
    "use_cpu": lambda value: {"device": "cpu"} if value else {},
    "neftune_noise_alpha": Cannot("noise on the embeddings is not built in"),
    "trust_remote_code": only(None, False, why="code out of a model's repository is not run"),
}  # fmt: skip


def data_set(sets: Any, ours: str) -> dict[str, Any]:
    """One data set: a path or Hub id, or one file of it."""
    if len(sets) != 1:
        raise Cannot("join the data sets into one file: one is read", ours)
    one = {k: v for k, v in sets[0].items() if v not in (None, "", False)}
    files, path = one.pop("data_files", None), one.pop("path", None)
    one.pop("ds_type", None)
    if one.get("split") == "train":
        del one["split"]
    if one:
        raise Cannot(f"{', '.join(f'{k}: {v}' for k, v in one.items())} of a data set cannot be honoured", ours)
    found = files or path
    if isinstance(found, list):
        if len(found) != 1:
            raise Cannot("join the files into one: one is read", ours)
        found = found[0]
    return {ours: found} if found else {}


def stage(value: Any) -> dict[str, Any]:
    known = {"dpo": "dpo", "kto": "kto", "rm": "reward", "grpo": "grpo"}
    if value != "sft":
        raise Cannot(f"trimtab {known[value]} does that" if value in known else "that is not built in")
    return {}
