"""trimtab inspect"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from trimtab.cli import common
from trimtab.cli.quiet import quietly

if TYPE_CHECKING:
    from trimtab.rank.inspect import Inspection, Layer


@quietly
def inspect(
    adapter: Annotated[str, typer.Argument(help="The adapter: a folder or a Hub id.")],
    layers: Annotated[bool, typer.Option("--layers", help="Every layer, not groups of them.")] = False,
    as_json: common.Json = False,
) -> None:
    """Show what is in an adapter's files: config, sizes, norms, ranks that are used, NaN. No base model is needed.

    Example: trimtab inspect runs/a/adapter

    Ends with 1 where the adapter is damaged or changes nothing.
    """
    common.ready()
    from trimtab.rank.inspect import inspect as run

    found = run(adapter)
    if as_json:
        common.emit(found)
    else:
        _render(found, layers)
    if found.faults:
        raise typer.Exit(1)


def _render(found: Inspection, whole: bool) -> None:
    from rich.markup import escape

    out = common.console()
    out.print(f"[bold]{escape(found.source)}[/bold]\n")
    table = common.grid()
    table.add_row("method", found.method + (f", {found.task}" if found.task else ""))
    table.add_row("base", escape(str(found.base)) + (f" at {found.revision}" if found.revision else ""))
    if found.layers:
        ranks, scales = ({getattr(x, n) for x in found.layers} for n in ("rank", "scale"))
        table.add_row("rank", _span(ranks) + f", scale {_span(scales)}")
    formats = ", ".join(f"{n:,} {name}" for name, n in found.dtypes.items())
    table.add_row("parameters", f"{formats} ({common.size(found.bytes)})")
    table.add_row("sha256", found.sha256)
    table.add_row(
        "norm of dW", common.figure(found.norm) + f" over {len(found.layers)} layers" if found.layers else "-"
    )
    for name, value in _provenance(found.provenance or {}):
        table.add_row(name, escape(value))
    out.print(table)
    if found.layers:
        out.print()
        out.print(_layers(found.layers, whole))
        out.print("[dim]used: exp of the entropy of the singular values, of r; stable: norm² / largest²[/dim]")
    if found.rest:
        few = list(found.rest.items())[: None if whole else 5]
        listed = ", ".join(f"{escape(k)} {common.figure(v)}" for k, v in few)
        out.print(
            f"\n{len(found.rest)} other tensors, by norm: {listed}" + (" ..." if len(few) < len(found.rest) else "")
        )
    for line in found.notes:
        out.print(f"\n[dim]{escape(line)}[/dim]")
    for line in found.faults:
        out.print(f"\n[bold red]Fault:[/bold red] {escape(line)}")


def _provenance(content: dict[str, Any]) -> list[tuple[str, str]]:
    """What a training run wrote beside the adapter, in a few lines."""
    base, data = content.get("base_model") or {}, content.get("data") or {}
    hashes = base.get("fingerprint") or {}
    mark = f", fingerprint {next(iter(hashes.values()))} ..." if hashes else ""
    rows = [("trained on", f"{base.get('name')}{mark}")] if base else []
    if data:
        rows.append(("rows", f"{data.get('rows')} of {data.get('from')}, sha256 {str(data.get('sha256'))[:12]}"))
    if scores := content.get("scores"):
        rows.append(("scores", ", ".join(f"{k} {common.figure(v)}" for k, v in scores.items())))
    if versions := content.get("versions"):
        rows.append(("versions", ", ".join(f"{k} {v}" for k, v in versions.items())))
    return rows


def _layers(layers: list[Layer], whole: bool) -> object:
    """A table with a row a layer, or a row for all layers of one name."""
    from rich.markup import escape

    table = common.grid("layers", "dW", "r", "norm", "largest", "used", "stable")
    groups: dict[str, list[Layer]] = {}
    for x in layers:
        groups.setdefault(x.path if whole else x.path.rpartition(".")[2], []).append(x)
    for name, some in groups.items():
        label = name if whole or len(some) == 1 else f"{name} x {len(some)}"

        def span(field: str, digits: int = 2, some: list[Layer] = some) -> str:
            return _span({getattr(x, field) for x in some}, digits)

        shapes = {"x".join(map(str, x.shape)) for x in some}
        shape = shapes.pop() if len(shapes) == 1 else "various"
        cells = (span("norm"), span("largest"), span("effective_rank", 1), span("stable_rank", 1))
        table.add_row(escape(label), shape, _span({x.rank for x in some}), *cells)
    return table


def _span(values: set[float], digits: int = 2) -> str:
    """ "8", or "4-16"."""
    low, high = min(values), max(values)
    text = [str(v) if isinstance(v, int) else common.figure(v, digits) for v in (low, high)]
    return text[0] if text[0] == text[1] else f"{text[0]}-{text[1]}"
