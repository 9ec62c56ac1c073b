"""trimtab check"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from trimtab.cli import common
from trimtab.cli.quiet import quietly

if TYPE_CHECKING:
    from trimtab.export.check import Finding


@quietly
def check(
    adapter: Annotated[str, typer.Argument(help="The adapter: a folder or a Hub id.")],
    engines: Annotated[
        str, typer.Option("--for", help="Whom to ask about: vllm,llama.cpp,ollama,mlx,peft.")
    ] = "vllm,llama.cpp,ollama,mlx,peft",
    as_json: common.Json = False,
) -> None:
    """Show what other programs would refuse of an adapter, or silently compute otherwise, and what to do about it.

    Example: trimtab check runs/a/adapter --for vllm,llama.cpp

    Ends with 1 where one of them could not use it as it is.
    """
    common.ready()
    from trimtab.export.check import check_adapter, known
    from trimtab.export.rules import ENGINES

    wanted = known([e.strip() for e in engines.split(",") if e.strip()])
    found = check_adapter(adapter, wanted)
    if as_json:
        read_in = {e: ENGINES[e].read_in for e in wanted}
        common.emit({"adapter": adapter, "engines": read_in, "fit": not any(f.fault for f in found), "findings": found})
    else:
        _render(adapter, {e: ENGINES[e].read_in for e in wanted}, found)
    if any(f.fault for f in found):
        raise typer.Exit(1)


def _render(adapter: str, engines: dict[str, str], found: list[Finding]) -> None:
    from rich.markup import escape
    from rich.padding import Padding
    from rich.table import Table

    out = common.console()
    out.print(f"[bold]{escape(adapter)}[/bold]\n")
    style = {"refused": "bold red", "wrong": "bold yellow", "needs": "cyan"}
    for engine, version in engines.items():
        own = [f for f in found if f.engine == engine]
        verdict = "[bold red]no [/bold red]" if any(f.fault for f in own) else "[bold green]yes[/bold green]"
        out.print(f"{verdict}  [bold]{engine}[/bold] [dim]{version}[/dim]")
        for f in own:
            table = Table.grid(padding=(0, 2, 0, 0))
            table.add_row(f"[{style[f.verdict]}]{f.verdict}[/]", f"it {escape(f.what)}")
            table.add_row("", f"[dim]-> {escape(f.fix)}[/dim]")
            out.print(Padding(table, (0, 0, 0, 5)))
