"""Several runs at once over one base model: what `trimtab train --jobs` reads, trains and says.

output: runs/tasks          # every job has a folder in it, the one that a run by itself would have
r: 16                       # common settings
jobs:
  sql: {data: sql.jsonl, learning_rate: 2e-4}
  style: {data: style.csv, method: dora, r: 8}
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from trimtab.errors import ConfigError, PeftError, TrainError
from trimtab.train import folder as files
from trimtab.train.assembly import Assembled, assemble
from trimtab.train.checkpoint import load_checkpoint
from trimtab.train.config import TrainConfig, read_file
from trimtab.train.data import check_packing
from trimtab.train.events import Interrupt
from trimtab.train.loop import Event, Run, TrainResult
from trimtab.train.many import TOKENS, Job, check_jobs, train_many
from trimtab.train.model import Base, load_base, make_optimizer
from trimtab.train.names import ALIASES
from trimtab.train.plan import try_evaluation
from trimtab.train.preparation import encode_data, read_data, show_data
from trimtab.train.processes import Alone, require_one
from trimtab.train.progress import JointProgress
from trimtab.train.report import console_for, show_jobs, show_outcomes
from trimtab.train.run import MADE, Outcome

__all__ = ["Jobs", "read_jobs", "run_jobs"]

# What all jobs have in common, and those of them that make no sense where several are trained.
SHARED = (
    "model", "revision", "precision", "device", "gradient_checkpointing", "output", "resume", "overwrite_output_dir",
    "tokens",
)  # fmt: skip
ALONE = ("trainer", "on_top_of", "plan")
NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclass
class Jobs:
    """The runs of a file of jobs.

    Attributes:
        configs: those of the jobs by name.
        folder: where every job has a folder.
        tokens: of a shared pass.
        notices: names that were read as ours.
    """

    configs: dict[str, TrainConfig]
    folder: Path
    tokens: int = TOKENS
    notices: list[str] = field(default_factory=list)


def read_jobs(path: Path, *sources: Mapping[str, Any]) -> Jobs:
    """The runs that a file of jobs names: its common settings, the sources over them, each job's own over both.

    Raises:
        ConfigError: unknown names, settings that cannot differ: all of them, with the job that has them.
    """
    content = read_file(path)
    own, common = (
        _named(path, content.pop("jobs", None)),
        _ours({k: v for s in (content, *sources) for k, v in s.items()}),
    )
    if faults := [
        f"{n} is for one run by itself: leave it out" for n in ALONE if common.get(n) not in (None, False, "own")
    ]:
        raise ConfigError(f"{path}: {'; '.join(faults)}.")
    output, tokens = (
        Path(common.pop("output", None) or Path("runs") / path.stem),
        _whole(path, common.pop("tokens", TOKENS)),
    )
    jobs, faults_of = Jobs({}, output, tokens), {}
    for name, settings in own.items():
        settings = _ours(settings)
        if kept := [n for n in (*SHARED, *ALONE) if n in settings]:
            faults_of[name] = f"{', '.join(kept)} can only be among the common settings, for all jobs"
            continue
        try:
            config, notices = files.read_run(common, settings, {"output": str(output / name)})
        except ConfigError as e:
            faults_of[name] = str(e).rstrip(".")
            continue
        jobs.configs[name] = config
        jobs.notices += [n for n in notices if n not in jobs.notices]
    if faults_of and len(set(faults_of.values())) == 1 and len(faults_of) == len(own) > 1:
        raise ConfigError(f"{path}, common settings: {next(iter(faults_of.values()))}.")
    if faults_of:
        raise ConfigError(f"{path}: " + "; ".join(f"job '{name}': {fault}" for name, fault in faults_of.items()) + ".")
    return jobs


def _named(path: Path, jobs: Any) -> dict[str, dict[str, Any]]:
    """{job: its own settings}, of a mapping or a list of them with names."""
    if isinstance(jobs, list) and all(isinstance(job, dict) and "name" in job for job in jobs):
        named = [(str(job["name"]), {k: v for k, v in job.items() if k != "name"}) for job in jobs]
    elif isinstance(jobs, dict):
        named = [(str(name), job or {}) for name, job in jobs.items()]
    else:
        raise ConfigError(f"{path} needs `jobs:`, a mapping of names to settings, or a list of settings with a `name`.")
    names = [name for name, _ in named]
    faults = [f"job '{name}' is there twice" for name in dict.fromkeys(names) if names.count(name) > 1]
    faults += [f"job '{name}': a name has letters, digits, _ and - only" for name in names if not NAME.fullmatch(name)]
    faults += [f"job '{name}' must be a mapping of settings" for name, job in named if not isinstance(job, dict)]
    if not named or faults:
        raise ConfigError(f"{path}: {'; '.join(faults) or 'there are no jobs'}.")
    return dict(named)


def _ours(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings under our names where they are of those that are shared."""
    names = {key: key.replace("-", "_") for key in settings}
    ours = {key: ALIASES[name][0] if name in ALIASES else name for key, name in names.items()}
    return {ours[k] if ours[k] in (*SHARED, *ALONE) else k: v for k, v in settings.items()}


def _whole(path: Path, tokens: Any) -> int:
    if not str(tokens).isdigit() or int(tokens) < 1:
        raise ConfigError(f"{path}: tokens, of a shared pass, must be a whole number of at least 1, not {tokens!r}.")
    return int(tokens)


def run_jobs(jobs: Jobs, console: Console | None = None, events: Sequence[Event] = ()) -> dict[str, Outcome]:
    """Train the jobs at once, each into its folder; with `resume`, those that are not finished.

    Args:
        events: more of them, which all jobs have in common.

    Raises:
        PeftError: in one of its kinds, whatever cannot be done: before anything is trained.
    """
    require_one("Training many adapters at once")
    console = console or console_for()
    checkpoints = _claimed(jobs)
    if not checkpoints:
        console.print(f"All {len(jobs.configs)} jobs in {jobs.folder} are finished.")
        return {}
    configs = {name: jobs.configs[name] for name in checkpoints}
    rows = {}
    for name, config in configs.items():
        with _of(name):
            rows[name] = read_data(config)
    base, model = load_base(next(iter(configs.values()))), None
    runs: dict[str, Assembled] = {}
    optimizers: dict[str, Any] = {}
    for name, config in configs.items():
        with _of(name):
            data = encode_data(config, base.tokenizer, *rows[name])
            run = runs[name] = assemble(config, base, data, Alone(), model, name)
            model, optimizers[name] = run.model, make_optimizer(run.model, config)
            if config.packing:
                check_packing(model, data.examples)
            if data.held_out:
                try_evaluation(model, data.held_out, config.eval_batch_size, base.pad_id)
    _announce(jobs, runs, base, console)
    return _train(jobs, runs, optimizers, checkpoints, console, events)


@contextmanager
def _of(name: str) -> Iterator[None]:
    """Around what is done for one job: its errors name it."""
    try:
        yield
    except PeftError as e:
        raise type(e)(f"job '{name}': {e}") from e


def _claimed(jobs: Jobs) -> dict[str, Path | None]:
    """{job that is not finished: the checkpoint it goes on from}."""
    found: dict[str, Path | None] = {}
    for name, config in jobs.configs.items():
        if config.optimizer == "lorafa":
            raise ConfigError(f"job '{name}': optimizer lorafa freezes factors of the adapter: train it by itself.")
        with _of(name):
            checkpoint = files.claim(config)
        if not (config.resume and (config.folder / files.ADAPTER).is_dir()):
            found[name] = checkpoint
    return found


def _announce(jobs: Jobs, runs: Mapping[str, Assembled], base: Base, console: Console) -> None:
    """What is shared, and a line for each job; what there is to say of its rows."""
    show_jobs(console, jobs.folder, base, list(runs.values()), jobs.tokens)
    said: dict[str, None] = {}
    for name, run in runs.items():
        with _of(name), console.capture() as capture:
            show_data(run.data, run.model.get_base_model(), base.tokenizer, console)
        said.setdefault(capture.get(), None)
    for text in said:
        console.out(text, end="", highlight=False)
    for line in base.notices:
        console.print(line, style="yellow", markup=False)
    console.print()


class _Saves(Event):
    """Saves a job's adapter as soon as it ends."""

    def __init__(self, run: Assembled) -> None:
        self.run = run
        self.adapter: Path | None = None

    def end(self, run: Run) -> None:
        if run.stop != Interrupt.REASON:
            self.adapter, _ = self.run.save(self.run.model, run.result)
            self.run.plot(run.result)


def _train(
    jobs: Jobs,
    runs: Mapping[str, Assembled],
    optimizers: Mapping[str, Any],
    checkpoints: Mapping[str, Path | None],
    console: Console,
    more: Sequence[Event],
) -> dict[str, Outcome]:
    """Train what is ready."""
    states = {name: _state(run, checkpoints[name]) for name, run in runs.items()}
    done = sum(run.batches.tokens(0, states[name][0].step) for name, run in runs.items())
    progress = JointProgress(sum(run.batches.tokens() for run in runs.values()), done)
    interrupt, saves = Interrupt(progress.line.note), {name: _Saves(run) for name, run in runs.items()}
    made = [_job(run, *states[name], optimizers[name]) for name, run in runs.items()]
    check_jobs(made)
    for job in made:  # nothing of an earlier run is touched before this
        run = runs[job.name]
        with _of(job.name):
            if not run.config.resume:
                files.clear(run.config)
            files.save_config(run.config, MADE)
            own = run.events([*more, interrupt, progress], _saying(job.name, progress.line.note))
        job.events = [*own, saves[job.name]]
    model = next(iter(runs.values())).model
    try:
        results = train_many(model, made, tokens=jobs.tokens, events=[progress])
    except torch.OutOfMemoryError as e:
        raise TrainError(
            f"A pass of {jobs.tokens} tokens does not fit the memory: give fewer `tokens`, smaller batches, or "
            "gradient_checkpointing; then go on with --resume."
        ) from e
    outcomes = {}
    for name, run in runs.items():
        result, adapter = results[name], saves[name].adapter
        stopped = result.stopped == Interrupt.REASON
        outcomes[name] = Outcome(run.config.folder, adapter, result, model, interrupted=stopped)
    show_outcomes(console, {name: (runs[name], outcome) for name, outcome in outcomes.items()})
    if any(outcome.interrupted for outcome in outcomes.values()):
        console.print("\nStopped. Go on: the same command with --resume.")
    return outcomes


def _state(run: Assembled, checkpoint: Path | None) -> tuple[TrainResult, Any]:
    """What has happened in a job so far, and what gives its optimiser the state it had."""
    if checkpoint is None:
        return TrainResult(), None
    assert run.adapter is not None
    with _of(run.adapter):
        return load_checkpoint(checkpoint, run.model, run.identity(), run.adapter)


def _job(run: Assembled, result: TrainResult, restore: Any, optimizer: Any) -> Job:
    """A run as one of several."""
    config, name = run.config, run.adapter
    assert name is not None
    assert config.learning_rate is not None
    how = (config.learning_rate, config.lr_scheduler_type, run.warmup, config.weight_decay, config.max_grad_norm)
    job = Job(name, run.model.peft_config[name], run.batches, *how, config.seed)
    job.result, job.restore = result, restore
    if config.optimizer != "adamw":
        job.optimizer = lambda parameters: optimizer
    return job


def _saying(name: str, note: Callable[[str], None]) -> Callable[[str], None]:
    """`note`, with the job's name before what is said."""
    return lambda line: note(f"{name}: {line}")
