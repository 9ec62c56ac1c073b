"""The `trimtab` command. One file a verb; heavy imports are inside the verbs, so that --help is instant."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from trimtab.cli.chat import chat
from trimtab.cli.check import check
from trimtab.cli.combine import combine
from trimtab.cli.compare import compare
from trimtab.cli.demo import demo
from trimtab.cli.diff import diff
from trimtab.cli.eval import evaluate
from trimtab.cli.generate import generate
from trimtab.cli.inspect import inspect
from trimtab.cli.merge import merge
from trimtab.cli.methods import methods
from trimtab.cli.options import EXTRA
from trimtab.cli.quiet import quietly
from trimtab.cli.rank import rank
from trimtab.cli.train import train
from trimtab.cli.trl import dpo, grpo, kto, reward
from trimtab.cli.version import show_version, version
from trimtab.errors import PeftError

app = typer.Typer(
    name="trimtab",
    help="Adapt large frozen models with a few trained parameters.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("eval")(quietly(evaluate))
for verb in (generate, chat, compare, merge, combine, inspect, diff, check):
    app.command()(quietly(verb))
app.command("fuse", hidden=True)(quietly(merge))
for verb in (train, dpo, kto, reward, grpo):
    app.command(context_settings=EXTRA, options_metavar="[RUN.yaml | ROWS] [OPTIONS]")(verb)
app.command()(demo)
app.command()(methods)
app.command()(version)
app.add_typer(rank)


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Adapt large frozen models with a few trained parameters."""


def main() -> None:
    """Entry point of the console script. Errors that trimtab raises on purpose end in one message, not a traceback."""
    try:
        app()
    except PeftError as e:
        print(f"trimtab: {e}", file=sys.stderr)
        sys.exit(1)
