"""trimtab demo"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from trimtab.cli.quiet import Verbose, quiet


def demo(
    out: Annotated[
        Path | None, typer.Option(help="Folder for adapter, metrics and loss plot. Default: runs/demo, runs/tasks.")
    ] = None,
    model: Annotated[str, typer.Option(help="Packaged model, local folder, GGUF file, or Hub id.")] = (
        "smollm2-135m-instruct"
    ),
    data: Annotated[Path | None, typer.Option(help="Folder with {train,valid,test}.jsonl. Default: addresses.")] = None,
    rows: Annotated[int, typer.Option(help="Rows to train on. Default: 400, fewer on a slow machine.")] = 0,
    epochs: Annotated[float, typer.Option(help="Passes over the rows.")] = 2.0,
    tasks: Annotated[bool, typer.Option("--tasks", help="Three tasks at once, an adapter each, on one model.")] = False,
    verbose: Verbose = False,
) -> None:
    """Fine-tune a LoRA on real data, show what it learned, and load it again in a fresh process.

    10 to 15 minutes on 2 cores: it times the machine first, says what to expect, and takes fewer rows where all would
    train for more than 8 minutes. No GPU and no hub is needed.
    """
    # Before torch is imported: threads that wait should sleep, not spin. On a machine that others use too, spinning
    # made training 4 times as slow.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with quiet(verbose):
        if tasks:
            from trimtab.train.demo_tasks import run
        else:
            from trimtab.train.demo import run
        code = run(
            out=out or Path("runs/tasks" if tasks else "runs/demo"), base=model, data=data, rows=rows, epochs=epochs
        )
    raise typer.Exit(code)
