"""trimtab train"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from trimtab.cli.common import ready
from trimtab.cli.options import given_by, options
from trimtab.cli.quiet import Verbose, quiet
from trimtab.errors import ConfigError


@options
def train(
    context: typer.Context,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="A file of the same names.")] = None,
    jobs: Annotated[
        Path | None, typer.Option("--jobs", help="A file of several runs (`jobs:`), trained at once on one base model.")
    ] = None,
    verbose: Verbose = False,
    **flags: Any,
) -> None:
    """Train an adapter: rows in, adapter out.

    Every option is a key of a YAML file, too, and the other way round; `trimtab train run.yaml --learning-rate 1e-4`
    takes both. So is every field of the method's own config: --r, --lora-alpha, --target-modules q_proj,v_proj ...

    Example: trimtab train --data rows.jsonl --eval-data valid.jsonl --output runs/a
    """
    ready()
    with quiet(verbose):
        code = _train(context, config, flags, verbose) if jobs is None else _jobs(context, config, jobs, flags)
    raise typer.Exit(code)


def _train(context: typer.Context, config: Path | None, flags: Mapping[str, Any], verbose: bool) -> int:
    """Do it; the exit code."""
    try:
        sources = given_by(context, config, flags)
        if any(source.get("trainer") == "trl" for source in sources):
            from trimtab.cli.trl import run

            return run("train", sources, verbose)
        from trimtab.train.folder import read_run

        settings, notices = read_run(*sources)
    except ConfigError as e:
        print(f"trimtab train: {e}", file=sys.stderr)
        return 2
    for line in notices:
        print(line, file=sys.stderr)
    from trimtab.train.run import run_training

    try:
        outcome = run_training(settings, choose=_choose)
    except KeyboardInterrupt:
        print("\nStopped at once. What the last checkpoint holds is safe: --resume goes on from it.", file=sys.stderr)
        return 130
    return 130 if outcome.interrupted else 0


def _choose(*args: Any) -> Any:
    from trimtab.rank.sweep.auto import choose_rank  # only where it is wanted

    return choose_rank(*args)


def _jobs(context: typer.Context, config: Path | None, jobs: Path, flags: Mapping[str, Any]) -> int:
    """Train the jobs of a file; the exit code."""
    from trimtab.train.jobs import read_jobs, run_jobs

    try:
        found = read_jobs(jobs, *given_by(context, config, flags))
    except ConfigError as e:
        print(f"trimtab train: {e}", file=sys.stderr)
        return 2
    for line in found.notices:
        print(line, file=sys.stderr)
    try:
        outcomes = run_jobs(found).values()
    except KeyboardInterrupt:
        print("\nStopped at once. What the last checkpoints hold is safe: --resume goes on from them.", file=sys.stderr)
        return 130
    if any(outcome.interrupted for outcome in outcomes):
        return 130
    return 1 if any(outcome.result.failed for outcome in outcomes) else 0
