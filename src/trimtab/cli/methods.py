"""trimtab methods"""

from __future__ import annotations

from typing import Annotated

import typer

HEAD = ("method", "when", "formula", "layers", "base products of a mixed batch", "merges")


def methods(
    markdown: Annotated[bool, typer.Option("--markdown", help="All columns, as docs/methods.md has them.")] = False,
) -> None:
    """Show what each method is for and can do: its formula, the layers it adapts, mixed batches, merging."""
    if markdown:
        from trimtab.export.methods import HEAD as COLUMNS
        from trimtab.export.methods import rows

        print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
        for row in rows():
            print("| " + " | ".join(cell.replace("|", "\\|") for cell in row.cells) + " |")
        return
    from rich.console import Console
    from rich.table import Table

    from trimtab.methods import capabilities

    table = Table(*HEAD)
    for facts in capabilities():
        batch = "none" if "model" in facts.kinds else "one" if facts.fused else "one an adapter"
        merges = "yes" if facts.mergeable else "no"
        table.add_row(facts.method, facts.when, facts.formula, ", ".join(facts.kinds), batch, merges)
    Console().print(table)
