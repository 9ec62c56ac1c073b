"""trimtab methods"""

from __future__ import annotations

import typer


def methods() -> None:
    """Show what each method can do: its formula, the layers it adapts, mixed batches, merging."""
    from rich.console import Console
    from rich.table import Table

    from trimtab.methods import capabilities

    table = Table("method", "formula", "layers", "base products of a mixed batch", "merges")
    for row in capabilities():
        batch = "one" if row.fused else "one an adapter"
        table.add_row(row.method, row.formula, ", ".join(row.kinds), batch, "yes" if row.mergeable else "no")
    Console().print(table)
    raise typer.Exit
