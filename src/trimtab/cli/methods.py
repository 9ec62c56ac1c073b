"""trimtab methods"""

from __future__ import annotations

from typing import Annotated

import typer

HEAD = ("method", "formula", "layers", "base products of a mixed batch", "merges")


def methods(
    markdown: Annotated[bool, typer.Option("--markdown", help="As docs/methods.md has it, with the papers.")] = False,
) -> None:
    """Show what each method can do: its formula, the layers it adapts, mixed batches, merging."""
    from trimtab.methods import capabilities

    rows = []
    for row in capabilities():
        batch = "none" if "model" in row.kinds else "one" if row.fused else "one an adapter"
        rows.append((row, [row.method, row.formula, ", ".join(row.kinds), batch, "yes" if row.mergeable else "no"]))
    if markdown:
        print("| " + " | ".join((*HEAD, "paper")) + " |\n|" + "---|" * (len(HEAD) + 1))
        for row, cells in rows:
            print("| " + " | ".join(cell.replace("|", "\\|") for cell in (*cells, row.paper)) + " |")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(*HEAD)
    for _, cells in rows:
        table.add_row(*cells)
    Console().print(table)
