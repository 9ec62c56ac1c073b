"""trimtab diff"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from trimtab.cli import common
from trimtab.cli.quiet import quietly

if TYPE_CHECKING:
    from trimtab.rank.inspect import Difference


@quietly
def diff(
    first: Annotated[str, typer.Argument(help="An adapter: a folder or a Hub id.")],
    second: Annotated[str, typer.Argument(help="Another one.")],
    layers: Annotated[bool, typer.Option("--layers", help="Every layer, not the ten most alike.")] = False,
    as_json: common.Json = False,
) -> None:
    """Show how two adapters differ: configs, the angle between their deltas, how one would disturb the other.

    Example: trimtab diff runs/a/adapter runs/b/adapter
    """
    common.ready()
    from trimtab.rank.inspect import diff as run

    found = run(first, second)
    if as_json:
        common.emit(found)
    else:
        _render(found, layers)


def _render(found: Difference, whole: bool) -> None:
    from rich.markup import escape

    out = common.console()
    out.print(f"[bold]a[/bold]  {escape(found.sources[0])}\n[bold]b[/bold]  {escape(found.sources[1])}\n")
    if found.identical:
        out.print("Every tensor is the same, bit for bit.\n")
    if found.config:
        table = common.grid("config", "a", "b", right=False)
        for name, (a, b) in found.config.items():
            table.add_row(name, escape(str(a)), escape(str(b)))
        out.print(table)
        out.print()
    if found.pairs:
        table = common.grid("all layers", "a", "b")
        table.add_row("norm of dW", *map(common.figure, found.norms))
        table.add_row("cosine of the deltas", common.figure(found.cosine))
        table.add_row("disturbed by the other", *map(common.percent, (found.into_first, found.into_second)))
        table.add_row("  by chance", *map(common.percent, found.chance))
        out.print(table)
        out.print(
            "[dim]disturbed: how strongly the other answers to the inputs this one reads, of its own answer[/dim]\n"
        )
        table = common.grid("layers", "norm a", "norm b", "cosine", "a disturbed", "b disturbed")
        ranked = sorted(found.pairs, key=lambda p: -abs(p.cosine) if p.cosine == p.cosine else 1.0)
        for p in found.pairs if whole else ranked[:10]:
            table.add_row(escape(p.path.removeprefix("model.")), *(common.figure(x) for x in (*p.norms, p.cosine)),
                          common.percent(p.into_first), common.percent(p.into_second))  # fmt: skip
        out.print(table)
        if not whole and len(found.pairs) > 10:
            out.print(f"[dim]the ten most alike of {len(found.pairs)}; --layers shows all[/dim]")
    for label, paths in zip(("only in a", "only in b", "of other shapes"), (*found.only, found.unequal)):
        if paths:
            out.print(f"\n{len(paths)} layers {label}: {escape(', '.join(paths[:5]))}" + (" ..." if paths[5:] else ""))
    if found.tensors:
        few = list(found.tensors.items())[: None if whole else 5]
        out.print("\nother tensors, by cosine: " + ", ".join(f"{escape(k)} {common.figure(v)}" for k, v in few))
    for line in found.notes:
        out.print(f"\n[yellow]{escape(line)}[/yellow]")
