"""trimtab dpo, grpo, kto, reward: TRL's trainers with our adapters, from the same settings as `trimtab train`."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from trimtab.cli.common import ready
from trimtab.cli.options import given_by, options
from trimtab.cli.quiet import Verbose
from trimtab.errors import ConfigError

# What the process runs: the alias has to be there before anything that imports peft.
START = """
from trimtab.cli.common import ready
from trimtab.cli.quiet import quiet
import sys
ready()
with quiet(verbose=sys.argv[3] == "verbose"):
    import trimtab.as_peft
    from trimtab.train.trl import start
    start()
"""
Config = Annotated[Path | None, typer.Option("--config", "-c", help="A file of the same names.")]


def run(verb: str, sources: Sequence[Mapping[str, Any]], verbose: bool = False) -> int:
    """Run a verb in a process of its own, in which the name `peft` means trimtab: TRL imports that. The exit code."""
    if importlib.util.find_spec("trl") is None:
        print(f"trimtab {verb}: this is done by TRL, which is not installed: pip install trl", file=sys.stderr)
        return 1
    loud = "verbose" if verbose else "quiet"
    return subprocess.call([sys.executable, "-c", START, verb, json.dumps(sources), loud])


def _start(verb: str, context: typer.Context, config: Path | None, verbose: bool, flags: Mapping[str, Any]) -> NoReturn:
    ready()
    try:
        sources = given_by(context, config, flags)
    except ConfigError as e:
        print(f"trimtab {verb}: {e}", file=sys.stderr)
        raise typer.Exit(2) from e
    raise typer.Exit(run(verb, sources, verbose))


@options
def dpo(context: typer.Context, config: Config = None, verbose: Verbose = False, **flags: Any) -> None:
    """Learn from pairs, by TRL's DPOTrainer: rows of prompt, chosen and rejected.

    The options are those of `trimtab train`, and every field of TRL's DPOConfig: --beta 0.1 --loss-type sigmoid ...

    Example: trimtab dpo --data pairs.jsonl --beta 0.1 --output runs/dpo
    """
    _start("dpo", context, config, verbose, flags)


@options
def kto(context: typer.Context, config: Config = None, verbose: Verbose = False, **flags: Any) -> None:
    """Learn from answers that are good or not, by TRL's KTOTrainer: rows of prompt, completion and label.

    The options are those of `trimtab train`, and every field of TRL's KTOConfig.

    Example: trimtab kto --data votes.jsonl --output runs/kto
    """
    _start("kto", context, config, verbose, flags)


@options
def reward(context: typer.Context, config: Config = None, verbose: Verbose = False, **flags: Any) -> None:
    """Train a model that scores answers, by TRL's RewardTrainer: rows of chosen and rejected.

    The options are those of `trimtab train`, and every field of TRL's RewardConfig.

    Example: trimtab reward --data pairs.jsonl --output runs/reward
    """
    _start("reward", context, config, verbose, flags)


@options
def grpo(context: typer.Context, config: Config = None, verbose: Verbose = False, **flags: Any) -> None:
    """Learn from rewards for the model's own answers, by TRL's GRPOTrainer: rows of prompt.

    The options are those of `trimtab train`, and every field of TRL's GRPOConfig. A reward is a function of
    (prompts, completions, and the rows' other columns) that returns a number for each.

    Example: trimtab grpo --data prompts.jsonl --reward-funcs rewards.py:short --num-generations 8 --output runs/grpo
    """
    _start("grpo", context, config, verbose, flags)
