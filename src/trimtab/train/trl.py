"""TRL's trainers on our rows and adapters, from the same config. Nothing of the training is ours.

It runs in a process in which the name `peft` means trimtab (`trimtab.as_peft`): TRL imports that when it is imported.
`trimtab dpo`, `grpo`, `kto`, `reward` and `trimtab train --trainer trl` start one.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trimtab.core.config import TaskType
from trimtab.core.extras import need
from trimtab.errors import ConfigError, PeftError, TrainError
from trimtab.train import folder as files
from trimtab.train.adapters import adapter_config, adapter_settings
from trimtab.train.config import FIELDS, TrainConfig
from trimtab.train.folder import read_run
from trimtab.train.model import Base, adapt, load_base, rate_by_width
from trimtab.train.values import types_of

VERBS = {"train": "SFT", "dpo": "DPO", "grpo": "GRPO", "kto": "KTO", "reward": "Reward"}
OURS_ONLY = ("eval_generate", "on_top_of", "metric_for_best_model", "packing")  # what TRL's trainers do not do
ENCODING = ("train_on", "template", "plain", "too_long", "system")  # what is ours where rows are encoded here
REWARDS = "reward_funcs"


def start() -> None:
    """The process that a command starts: what it is told is in `sys.argv`."""
    try:
        main(sys.argv[1], json.loads(sys.argv[2]))
    except PeftError as e:
        print(f"trimtab: {e}", file=sys.stderr)
        sys.exit(2 if isinstance(e, ConfigError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


def main(verb: str, sources: Sequence[dict[str, Any]]) -> None:
    """Read the settings, as the command does, and train."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # trainers of TRL tell that they are used
    need(f"trimtab {verb}", "trl")
    import trl

    arguments = getattr(trl, f"{VERBS[verb]}Config")
    extra = {name: hint for name, hint in types_of(arguments).items() if name not in FIELDS}
    config, notices = read_run(*sources, where=f"trimtab {verb}", extra={**extra, REWARDS: list[str]})
    for line in notices:
        print(line, file=sys.stderr)
    run(verb, config, arguments, getattr(trl, f"{VERBS[verb]}Trainer"))


def run(verb: str, config: TrainConfig, arguments: Any, trainer_class: Any) -> None:
    """One run of one of TRL's trainers, from the config to the saved adapter."""
    from trimtab.train.provenance import fingerprint
    from trimtab.train.report import console_for, show_facts

    refuse(verb, config)
    files.claim(config)
    last = _last(config.folder) if config.resume else None
    rewards = {REWARDS: [load(name) for name in config.extra[REWARDS]]} if verb == "grpo" else {}
    base = _base(verb, config)
    if verb == "train" and config.learning_rate is None:  # its own is for whole models
        config.learning_rate = rate_by_width(base.model)
    train_set, eval_set = data_sets(verb, config, base)
    prints = fingerprint(base.model)
    model = _model(verb, config, base)
    facts = [("model", f"{base.name} in {base.precision.name} ({base.precision.why})"),
             ("rows", f"{len(train_set):,} of {config.data}"), ("trainer", trainer_class.__name__)]  # fmt: skip
    show_facts(console_for(), f"Run in {config.folder}", facts)
    args = arguments_of(arguments, config, base, eval_set is not None)
    rows = {"train_dataset": train_set, "eval_dataset": eval_set}
    trainer = trainer_class(args=args, processing_class=base.tokenizer, **rows, **model, **rewards)
    if config.early_stopping_patience:
        from transformers import EarlyStoppingCallback

        trainer.add_callback(EarlyStoppingCallback(config.early_stopping_patience))
    if not config.resume:
        files.clear(config)
    files.save_config(config, f"Made for `trimtab {verb}`.")
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    save(verb, config, base, prints, trainer, len(train_set))


def _base(verb: str, config: TrainConfig) -> Base:
    if verb != "reward":
        return load_base(config)
    from transformers import AutoModelForSequenceClassification

    base = load_base(config, cls=AutoModelForSequenceClassification, num_labels=1)
    base.model.config.pad_token_id = base.pad_id
    return base


def _model(verb: str, config: TrainConfig, base: Base) -> dict[str, Any]:
    """The trainer's arguments for model and adapter; with a config of it, DPO takes the base as its reference."""
    config.precision = base.precision.name  # type: ignore[assignment]
    if config.continue_from:
        return {"model": adapt(base, config, steps=1)}
    own = adapter_config(config, steps=max(config.max_steps, 1))
    own.base_model_name_or_path = base.name
    if verb == "reward":
        own.task_type = TaskType.SEQ_CLS
    config.adapter = adapter_settings(config)
    return {"model": base.model, "peft_config": own}


def refuse(verb: str, config: TrainConfig) -> None:
    """Raise for settings that TRL's trainers cannot honour, and for one that is missing."""
    names = OURS_ONLY if verb == "train" else (*OURS_ONLY, *ENCODING)
    usual = TrainConfig()
    wrong = [name for name in names if getattr(config, name) != getattr(usual, name)]
    if config.optimizer != "adamw":
        wrong.append(f"optimizer {config.optimizer}")
    if wrong:
        raise ConfigError(f"TRL's trainers do not take {', '.join(wrong)}: leave it out.")
    if verb == "grpo" and not config.extra.get(REWARDS):
        raise ConfigError("grpo needs functions that reward: --reward-funcs my_rewards.py:function")


def data_sets(verb: str, config: TrainConfig, base: Any) -> tuple[Any, Any]:
    """(rows to learn, rows to be tested on or None): encoded for `train`, and as they are for the others."""
    need("Training by TRL", "datasets")
    from datasets import Dataset

    from trimtab.train.preparation import prepare_data, read_data, show_data
    from trimtab.train.report import console_for

    if verb == "train":
        data = prepare_data(config, base.tokenizer)
        show_data(data, base.model, base.tokenizer, console_for())
        parts = [[{"input_ids": e.ids, "labels": e.labels} for e in part] for part in (data.examples, data.held_out)]
    else:
        parts = [list(rows or ()) for rows in read_data(config)]
    train_set, eval_set = (Dataset.from_list(part) if part else None for part in parts)
    if train_set is None:
        raise TrainError("There are no rows to train on.")
    return train_set, eval_set


def arguments_of(cls: Any, config: TrainConfig, base: Any, evaluated: bool) -> Any:
    """TRL's config: names that both have, and what follows from the device."""
    device = next(base.model.parameters()).device.type
    same = """learning_rate num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps
        lr_scheduler_type weight_decay max_grad_norm seed save_total_limit""".split()
    known = {f.name for f in dataclasses.fields(cls)}
    if config.max_length and "max_length" not in known:
        raise ConfigError(f"{cls.__name__} has no max_length: leave it out.")
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    found = {name: getattr(config, name) for name in same}
    found |= {
        "output_dir": str(config.folder),
        "per_device_eval_batch_size": config.eval_batch_size,
        "bf16": base.precision.name == "bf16" and device == "cuda",  # its default is True, which a CPU pays for
        "use_cpu": device == "cpu",
        "logging_steps": 1,
        "report_to": config.report_to or "none",
        "max_length": None if cls.__name__ == "SFTConfig" else config.max_length,  # those rows are encoded here
        "load_best_model_at_end": config.keeps_best and evaluated,
        **_when("save", config.save_steps),
        **(_when("eval", config.eval_steps) if evaluated else {}),
        # In transformers 5 a share is a number of steps below 1.
        "warmup_steps": config.warmup_ratio if config.warmup_steps is None else config.warmup_steps,
        checkpointing: config.gradient_checkpointing,  # True is its default, too
        **{name: value for name, value in config.extra.items() if name != REWARDS},
    }
    if config.learning_rate is None:  # TRL has one for each trainer
        del found["learning_rate"]
    return cls(**{name: value for name, value in found.items() if name in known})


def _when(what: str, every: float) -> dict[str, Any]:
    strategy = "epoch" if every == 0 else "no" if every < 0 else "steps"
    steps = every if every < 1 else round(every)
    return {f"{what}_strategy": strategy, **({f"{what}_steps": steps} if strategy == "steps" else {})}


def save(verb: str, config: TrainConfig, base: Any, prints: dict[str, str], trainer: Any, rows: int) -> None:
    """The adapter with card and provenance, and the metrics, where our own loop puts them."""
    from trimtab.train.card import write_card
    from trimtab.train.checkpoint import write_folder
    from trimtab.train.provenance import NAME, provenance

    history, model = trainer.state.log_history, trainer.accelerator.unwrap_model(trainer.model)
    lines = "".join(json.dumps(entry) + "\n" for entry in history)
    (config.folder / files.METRICS).write_text(lines, encoding="utf-8")
    scores = [(e["step"], {"loss": e["eval_loss"]}) for e in history if "eval_loss" in e]
    content = provenance(
        base.name, base.commit or config.revision, prints, base.tokenizer, data={"rows": rows, "from": config.data},
        config=config.to_dict(), steps=trainer.state.global_step, trainer=type(trainer).__name__,
    )  # fmt: skip

    def write(folder: Path) -> None:
        model.save_pretrained(folder, selected_adapters=["default"])
        (folder / NAME).write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
        facts = {"Base model": base.name, "Trainer": f"TRL's {type(trainer).__name__} (`trimtab {verb}`)",
                 "Rows": f"{rows:,}", "Steps": f"{trainer.state.global_step:,}"}  # fmt: skip
        write_card(folder, facts, scores)

    write_folder(config.folder / files.ADAPTER, write)
    print(f"adapter   {config.folder / files.ADAPTER}\nmetrics   {config.folder / files.METRICS}")


def load(name: str) -> Callable[..., Any] | str:
    """A function by "file.py:function" or "package.module:function"; anything else is a model that rewards."""
    place, colon, function = name.partition(":")
    if not colon:
        return name
    if place.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(place).stem, place)
        if spec is None or spec.loader is None or not Path(place).is_file():
            raise ConfigError(f"{REWARDS}: there is no file {place}.")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(place)
    if not hasattr(module, function):
        raise ConfigError(f"{REWARDS}: {place} has no {function}.")
    found: Callable[..., Any] = getattr(module, function)
    return found


def _last(folder: Path) -> Path | None:
    found = sorted(folder.glob("checkpoint-*/trainer_state.json"), key=lambda p: int(p.parent.name.split("-")[1]))
    return found[-1].parent if found else None
