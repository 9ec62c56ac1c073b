"""trimtab rank sweep"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from trimtab.cli.common import Json, numbers, ready
from trimtab.cli.options import CONFIGS, rest
from trimtab.cli.quiet import quietly
from trimtab.errors import ConfigError


@quietly
def sweep(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Base model: folder, Hub id, GGUF file, packaged model.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Rows to learn.")] = None,
    eval_data: Annotated[
        str | None, typer.Option(help="Rows to be tested on. Default: a fifth of the others, 100 at most.")
    ] = None,
    ranks: Annotated[str, typer.Option(metavar="A,B", help="Ranks to try.")] = "1,2,4,8,16,32,64",
    rates: Annotated[
        str, typer.Option(metavar="A,B", help="Learning rates. Default: three, by the model's width.")
    ] = "",
    alphas: Annotated[str, typer.Option(metavar="A,B", help="lora_alpha; the scale is alpha / r.")] = "32",
    targets: Annotated[
        list[str] | None, typer.Option(help="Layers, as target_modules has them; several times. Default: all-linear.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each rank that are trained to the end.")] = 2,
    data_sizes: Annotated[str, typer.Option(metavar="A,B", help="Rows to learn from: a map of rank and data.")] = "",
    general: Annotated[
        Path | None, typer.Option(exists=True, help="Rows that show what was forgotten. Default: some of ours.")
    ] = None,
    at_once: Annotated[int, typer.Option(min=0, help="Runs that are trained together, at most; 0: all.")] = 0,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Default: sweeps/NAME-OF-DATA.")] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Show the runs and the time they would take; then stop.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure which rank a task needs: every rank and learning rate over one base model, and what to take.

    Learning rates that lag behind are given up early, ranks never. What is over is kept: the same command goes on.
    Every option of `trimtab train` is one of the runs: --max-steps 40, --system '', --eval-generate exact_match ...

    Example: trimtab rank sweep --model smollm2-135m --data rows.jsonl --ranks 1,4,16 --num-train-epochs 1
    """
    ready()
    try:
        more, words = rest(context.args)
        own = {"model": model, "data": data, "eval_data": eval_data, "output": output}
        settings = {**_content(words), **more, **{k: v for k, v in own.items() if v is not None}}
        space = {
            "ranks": numbers("ranks", ranks, int), "rates": numbers("rates", rates, float),
            "alphas": numbers("alphas", alphas, float), "targets": tuple(targets or ("all-linear",)), "seeds": seeds,
            "data_sizes": numbers("data-sizes", data_sizes, int),
        }  # fmt: skip
        _sweep(settings, space, str(general) if general else None, at_once, plan, as_json)
    except ConfigError as e:
        print(f"trimtab rank sweep: {e}", file=sys.stderr)
        raise typer.Exit(2) from e
    except KeyboardInterrupt as e:
        print("\nStopped. The same command goes on with what was not over.", file=sys.stderr)
        raise typer.Exit(130) from e


def _sweep(
    settings: dict[str, Any], space: dict[str, Any], general: str | None, at_once: int, plan: bool, as_json: bool
) -> None:
    import json

    from trimtab.rank.sweep.result import plain
    from trimtab.rank.sweep.run import prepare_sweep
    from trimtab.rank.sweep.space import Space
    from trimtab.train.config import read_config
    from trimtab.train.report import console_for

    config, notices = read_config(settings)
    for line in notices:
        print(line, file=sys.stderr)
    prepared = prepare_sweep(config, Space(**space), general)
    if plan:
        prepared.plan(at_once, console_for())
        return
    found = prepared.run(at_once, console_for(quiet=as_json))
    if as_json:
        print(json.dumps(plain(found), indent=2, ensure_ascii=False))


def _content(words: list[str]) -> dict[str, Any]:
    """What a config file among the words says, and the rows among them."""
    from trimtab.train.config import read_file

    found: dict[str, Any] = {}
    for word in words:
        found |= read_file(word) if Path(word).suffix in CONFIGS else {"data": word}
    return found
