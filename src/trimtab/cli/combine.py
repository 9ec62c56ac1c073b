"""trimtab combine"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trimtab.cli import common
from trimtab.cli.quiet import quietly


@quietly
def combine(
    adapters: Annotated[list[str], typer.Argument(help="Adapters: folders or Hub ids.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the new adapter.")],
    weights: Annotated[
        str | None, typer.Option("--weights", "-w", help="One an adapter: 0.7,0.3. Default: 1 each; -1 subtracts.")
    ] = None,
    mode: Annotated[
        str,
        typer.Option(help="cat (the exact sum), svd, linear, ties, dare_linear, dare_ties, magnitude_prune, ..._svd."),
    ] = "cat",
    rank: Annotated[int | None, typer.Option(min=1, help="What svd modes cut to. Default: the largest.")] = None,
    density: Annotated[float | None, typer.Option(help="Share of entries that ties, dare and prune keep.")] = None,
    sign: Annotated[str, typer.Option(help="How ties elects signs: total or frequency.")] = "total",
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Base model, where the files do not say all.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output folder's adapter.")] = False,
    as_json: common.Json = False,
) -> None:
    """Combine adapters into one, from their files: weighted sums, SVD, TIES, DARE, magnitude pruning.

    Example: trimtab combine runs/a/adapter runs/b/adapter --weights 0.7,0.3 --mode ties --density 0.5 -o both
    """
    common.ready()
    from trimtab.export.combine import combine_adapters

    chosen = None if weights is None else common.numbers("weights", weights, float)
    base = common.open_checked(model, None, "auto", None, task=None).model if model else None
    found = combine_adapters(adapters, output, chosen, mode, rank, density, sign, base, overwrite)
    if as_json:
        common.emit(found)
        return
    from rich.markup import escape

    out = common.console()
    table = common.grid(right=False)
    for folder, weight in found.adapters.items():
        table.add_row(f"{weight:g} x", escape(folder))
    out.print(table)
    low, high = found.ranks
    ranks = f"r={high}" if low == high else f"r={low} to {high}"
    out.print(f"[bold]{escape(found.output)}[/bold]  {found.mode}: {found.layers} layers, {ranks}, ", end="")
    out.print(f"{found.parameters:,} parameters")
