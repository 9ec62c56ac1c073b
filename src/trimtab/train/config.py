"""What a training run is told: one dataclass, from which the keys of a YAML file and the command's flags both follow.

The names are those of PEFT, TRL and transformers; other tools' names are read too (`trimtab.train.names`). Whatever is
not a field here is a field of the method's own config (`r`, `target_modules` ...), and stands beside the others.

No torch here: `trimtab train --help` is made from this file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from trimtab.errors import ConfigError
from trimtab.train.names import ALIASES, nearest
from trimtab.train.values import Fault, parse, types_of

__all__ = ["AUTO", "FIELDS", "NOT_SAVED", "SHOWN", "TrainConfig", "read_config", "read_file"]

AUTO = "auto"  # a rank that is measured before the run
DATA, ADAPTER, LOOP, SAVING, WATCHING = "Model and data", "Adapter", "Loop", "Run folder", "What to look at"


def option(text: str, default: Any, section: str, least: float | None = None) -> Any:
    """A field with its help text, the section of the help it stands in, and the least value of a number."""
    metadata = {"help": text, "section": section, "least": least}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(init=False)
class TrainConfig:
    """All of a run's settings: `TrainConfig(data="rows.jsonl", r=8)` is checked as a file or a command line is."""

    model: str = option("Folder, Hub id, GGUF file, or packaged model.", "smollm2-135m-instruct", DATA)
    revision: str | None = option("Revision of the model on the Hub.", None, DATA)
    data: str | None = option("Rows to learn: a file (.jsonl, .json, .csv ...), a folder, a Hub data set.", None, DATA)
    eval_data: str | None = option("Rows to be tested on, the same.", None, DATA)
    split: str | None = option("Which part of a folder or data set. Default: train.", None, DATA)
    eval_split: str | None = option("Which part of eval_data. Default: valid, where it has one.", None, DATA)
    val_size: float = option("Without eval_data: share of the rows to hold out (number, if 1 or more).", 0.0, DATA, 0)
    prompt_field: str | None = option("Column of the prompt, where it is called otherwise.", None, DATA)
    completion_field: str | None = option("Column of the answer.", None, DATA)
    messages_field: str | None = option("Column of the conversation.", None, DATA)
    text_field: str | None = option("Column of plain text.", None, DATA)
    system: str | None = option("System message of conversations without one ('' for none).", None, DATA)
    train_on: Literal["completions", "last", "all"] = option(
        "What is learned: every answer, the last one of a conversation, or prompts too.", "completions", DATA
    )
    template: Literal["own", "trl"] = option("trl: TRL's chat template for training.", "own", DATA)
    plain: bool = option("Prompts and answers that are strings are joined without the chat template.", False, DATA)
    max_length: int | None = option("Longest row in tokens. Default: the model's own limit.", None, DATA, 2)
    too_long: Literal["error", "drop", "truncate", "keep_end"] = option(
        "What to do with longer rows; truncate cuts their end off, keep_end their beginning.", "error", DATA
    )
    skip_bad_rows: bool = option("Leave out rows that cannot be read, and count them.", False, DATA)
    packing: bool = option(
        "Put several rows into one sequence of max_length (1,024 tokens, or the longest row).", False, DATA
    )

    method: str = option("Any of `trimtab methods`, dora, rslora; its fields are options, too.", "lora", ADAPTER)
    continue_from: str | None = option("Start from the weights of this adapter.", None, ADAPTER)
    on_top_of: str | None = option("Merge this adapter into the model first.", None, ADAPTER)

    learning_rate: float | None = option(
        "Peak learning rate. Default: by the model's width, 1e-3 at most.", None, LOOP, 0
    )
    num_train_epochs: float = option("Passes over the rows.", 3.0, LOOP, 0)
    max_steps: int = option("Optimiser steps in all, instead of epochs.", -1, LOOP, -1)
    per_device_train_batch_size: int = option("Rows of a batch.", 8, LOOP, 1)
    per_device_eval_batch_size: int | None = option("The same in evaluation. Default: twice as many.", None, LOOP, 1)
    gradient_accumulation_steps: int = option("Batches of a step; each trained token counts the same.", 1, LOOP, 1)
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = option("How the rate falls.", "linear", LOOP)
    warmup_ratio: float = option("Share of the steps in which the rate rises.", 0.1, LOOP, 0)
    warmup_steps: int | None = option("The same as a number of steps.", None, LOOP, 0)
    weight_decay: float = option("Weight decay.", 0.0, LOOP, 0)
    max_grad_norm: float = option("Gradients are clipped to this norm; 0: not.", 1.0, LOOP, 0)
    optimizer: Literal["adamw", "loraplus", "lorafa", "riemannian"] = option(
        "Optimiser: adamw, loraplus, lorafa, riemannian.", "adamw", LOOP
    )
    loraplus_lr_ratio: float = option("LoRA+: B's learning rate over A's.", 16.0, LOOP, 0)
    seed: int = option("Of the start, the order of the rows, and dropout.", 0, LOOP, 0)
    precision: Literal["auto", "fp32", "bf16"] = option("Of the frozen model; auto: measured here.", "auto", LOOP)
    gradient_checkpointing: bool = option("Less memory, a third more time.", False, LOOP)
    device: str | None = option("cpu, cuda, mps ... Default: what there is.", None, LOOP)
    trainer: Literal["own", "trl"] = option("trl: TRL's SFTTrainer on the same rows.", "own", LOOP)

    output: str | None = option("The run's folder. Default: runs/NAME-OF-DATA.", None, SAVING)
    overwrite_output_dir: bool = option("Throw away the run that is in it.", False, SAVING)
    resume: bool = option("Go on with the run in it, exactly where it was.", False, SAVING)
    save_steps: float = option("A checkpoint every so many steps, or share; 0: each epoch; -1: none.", 0, SAVING, -1)
    save_total_limit: int = option("Checkpoints to keep, beside the best.", 2, SAVING, 1)
    load_best: bool | None = option("End with the best checkpoint. Default: with early stopping.", None, SAVING)

    eval_steps: float = option(
        "Evaluate every so many steps; below 1: every such share of them; 0: each epoch; -1: at the end.",
        0,
        WATCHING,
        -1,
    )
    eval_generate: list[str] = option("Generate answers, too: exact_match, field_f1, json_valid.", [], WATCHING)
    eval_generate_rows: int = option("On so many rows at most.", 100, WATCHING, 1)
    metric_for_best_model: str = option(
        "loss, accuracy (answers of one token), or one of eval_generate.", "loss", WATCHING
    )
    early_stopping_patience: int = option(
        "Stop after so many evaluations that are no better; 0: never.", 0, WATCHING, 0
    )
    report_to: list[str] = option("trackio, wandb, tensorboard (if installed).", [], WATCHING)
    plan: bool = option("Show what would be trained, memory and time; then stop.", False, WATCHING)

    adapter: dict[str, Any] = field(default_factory=dict)  # fields of the method's config, as far as they were given
    extra: dict[str, Any] = field(default_factory=dict)  # fields of TRL's config, where TRL trains

    def __init__(self, **given: Any) -> None:
        extra = given.pop("extra", {})
        found = _gather([{**given.pop("adapter", {}), **given}], {})
        found.raise_for_faults("")
        self._fill(found.run, found.adapter, extra)

    def _fill(self, run: Mapping[str, Any], adapter: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
        for f in dataclasses.fields(self):
            default = f.default_factory() if callable(f.default_factory) else f.default
            setattr(self, f.name, run.get(f.name, default))
        self.adapter, self.extra = dict(adapter), dict(extra)

    @property
    def keeps_best(self) -> bool:
        """Whether the run ends with its best checkpoint."""
        return self.early_stopping_patience > 0 if self.load_best is None else self.load_best

    @property
    def folder(self) -> Path:
        """The run's folder."""
        if self.output:
            return Path(self.output)
        return Path("runs") / (Path(self.data).stem if self.data else "run")

    @property
    def eval_batch_size(self) -> int:
        """Rows of a batch in evaluation."""
        return self.per_device_eval_batch_size or 2 * self.per_device_train_batch_size

    def to_dict(self) -> dict[str, Any]:
        """What a file says to run the same again: the run's settings and the adapter's, in one mapping."""
        own = {n: getattr(self, n) for n in FIELDS if n not in NOT_SAVED}
        return {**{n: v for n, v in own.items() if v is not None and v != []}, **self.adapter, **self.extra}

    def to_yaml(self) -> str:
        """The same as a file, section by section."""
        values, parts = self.to_dict(), []
        for section in SECTIONS:
            part = {n: values[n] for n, f in FIELDS.items() if n in values and f.metadata["section"] == section}
            part |= {ADAPTER: self.adapter, LOOP: self.extra}.get(section, {})
            lines = [f"{name}: {_flow(value)}\n" for name, value in part.items()]
            parts.append(f"# {section}\n" + "".join(lines))
        return "\n".join(parts)


FIELDS: dict[str, dataclasses.Field[Any]] = {f.name: f for f in dataclasses.fields(TrainConfig) if f.metadata}
TYPES = types_of(TrainConfig)
SECTIONS = (DATA, ADAPTER, LOOP, SAVING, WATCHING)
# The fields of LoRA's config that the help shows; any other field, and those of every other method, are taken as well.
SHOWN = {
    "r": "The rank (LoRA: 16); auto: a short sweep of ranks comes first.",
    "lora_alpha": "The scale is lora_alpha / r (LoRA: 2 r).",
    "lora_dropout": "Dropout on the adapter's input.",
    "target_modules": "all-linear, names, or a pattern of whole paths.",
    "modules_to_save": "Modules to train whole.",
    "init_lora_weights": "How it starts: true, gaussian, orthogonal, pissa ...",
}
NOT_SAVED = frozenset({"plan", "resume", "overwrite_output_dir"})  # what one does with a run, not what it is


def read_config(
    *sources: Mapping[str, Any], where: str = "", extra: Mapping[str, Any] | None = None
) -> tuple[TrainConfig, list[str]]:
    """A config from mappings, later ones over earlier ones, and notices of names that were read as ours.

    Args:
        where: what messages begin with.
        extra: {name: type} of what is neither ours nor the method's and is welcome: it ends up in `config.extra`.

    Raises:
        ConfigError: unknown names, values of another type, and settings that contradict each other: all of them.
    """
    found = _gather(sources, extra or {})
    found.raise_for_faults(where)
    config = TrainConfig()
    config._fill(found.run, found.adapter, found.extra)
    return config, found.notices


@dataclass
class _Gathered:
    run: dict[str, Any] = field(default_factory=dict)
    adapter: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def raise_for_faults(self, where: str) -> None:
        if self.faults:
            head = f"{where}: " if where else ""
            many = f"{len(self.faults)} faults:\n  " + "\n  ".join(self.faults)
            raise ConfigError(head + (self.faults[0] if len(self.faults) == 1 else many))


def _gather(sources: Sequence[Mapping[str, Any]], extra: Mapping[str, Any]) -> _Gathered:
    """Everything that was given, under our names and read as its type."""
    found = _Gathered()
    merged: dict[str, Any] = {}
    for source in sources:
        names: dict[str, str] = {}  # ours -> theirs, within one source
        for key, value in source.items():
            theirs = key.replace("-", "_")
            ours = theirs
            if theirs not in FIELDS and theirs not in extra and theirs in ALIASES:
                ours, convert = ALIASES[theirs]
                value = convert(value)
                found.notices.append(f"{theirs} is read as {ours}.")
            if names.setdefault(ours, theirs) != theirs:
                found.faults.append(f"{ours} is given twice, as {names[ours]} and as {theirs}.")
            merged[ours] = value
    for name, value in merged.items():
        if name not in FIELDS:
            found.adapter[name] = value
            continue
        try:
            found.run[name] = parse(name, value, TYPES[name], FIELDS[name].metadata["least"])
        except Fault as e:
            found.faults.append(str(e))
    _gather_adapter(found, extra)
    if not found.faults:
        found.faults += _contradictions(found.run)
    return found


def _gather_adapter(found: _Gathered, extra: Mapping[str, Any]) -> None:
    """Read what is left as extras or as fields of the method's config, and name what is neither."""
    method = found.run.get("method", FIELDS["method"].default)
    if not found.adapter and method == FIELDS["method"].default:
        return
    from trimtab.train.methods import method_fields

    try:
        known = method_fields(method, str(FIELDS["method"].default))
    except ConfigError as e:
        found.faults.append(str(e))
        return
    given, found.adapter = found.adapter, {}
    for name, value in given.items():
        if name not in extra and name not in known:
            hint = nearest(name, [n for n in (*FIELDS, *known, *ALIASES, *extra) if len(n) > 2])
            found.faults.append(f"{name} is no setting of a run, and none of the method {method}{hint or '.'}")
            continue
        part, hints = (found.extra, extra) if name in extra else (found.adapter, known)
        hint = hints[name] | Literal["auto"] if name == "r" else hints[name]
        try:
            part[name] = parse(name, value, hint)
        except Fault as e:
            found.faults.append(str(e))


def _contradictions(run: Mapping[str, Any]) -> list[str]:
    """Settings that cannot hold at once."""
    faults = []
    if run.get("continue_from") and run.get("on_top_of"):
        faults.append("continue_from trains an adapter further, on_top_of merges it and trains a new one: give one.")
    if run.get("resume") and run.get("overwrite_output_dir"):
        faults.append("resume goes on with the run, overwrite_output_dir throws it away: give one of them.")
    best = run.get("metric_for_best_model", "loss")
    if best not in ("loss", "accuracy", *run.get("eval_generate", [])):
        faults.append(f"metric_for_best_model is {best}, which nothing measures: give eval_generate: {best}, too.")
    wants = [n for n in ("early_stopping_patience", "load_best", "eval_generate") if run.get(n)]
    if wants and not run.get("eval_data") and not run.get("val_size"):
        faults.append(f"{', '.join(wants)} takes rows to be tested on: give eval_data, or val_size.")
    if run.get("warmup_ratio", 0) > 1:
        faults.append("warmup_ratio is a share of the steps, at most 1; a number of steps is warmup_steps.")
    return faults


def _flow(value: Any) -> str:
    """A value as YAML on one line."""
    import yaml

    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, sort_keys=False, width=10**9)
    return text.removesuffix("\n").removesuffix("\n...")


def read_file(path: str | Path) -> dict[str, Any]:
    """The content of a YAML, JSON or TOML file.

    Raises:
        ConfigError: no such file, or one that is no mapping; the line is named where the parser knows it.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as e:
        raise ConfigError(f"{path} cannot be read: {e.strerror}.") from e
    import yaml

    try:
        if path.suffix == ".toml":
            import tomllib

            content: Any = tomllib.loads(text)
        else:
            content = yaml.safe_load(text)  # JSON is YAML
    except (yaml.YAMLError, ValueError) as e:
        raise ConfigError(
            f"{path} is no {path.suffix.lstrip('.').upper() or 'YAML'}: {' '.join(str(e).split())}"
        ) from e
    if not isinstance(content, dict) or not all(isinstance(k, str) for k in content):
        raise ConfigError(f"{path} must be a mapping of names to values.")
    return content
