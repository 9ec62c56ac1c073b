"""trimtab methods"""

from __future__ import annotations

import typer


def methods() -> None:
    """Show what each method can do: the layers it adapts, mixed batches, merging."""
    from rich.console import Console
    from rich.table import Table

    from trimtab.methods import capabilities

    table = Table("method", "layers", "mixed batch", "merges", "source")
    for row in capabilities():
        batch = "one base product" if row.fused else "one per adapter"
        table.add_row(row.method, ", ".join(row.kinds), batch, "yes" if row.mergeable else "no", row.summary)
    Console().print(table)
    raise typer.Exit
