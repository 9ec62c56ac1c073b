"""trimtab compare"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trimtab.cli import common
from trimtab.cli.quiet import quietly

if TYPE_CHECKING:
    from trimtab.train.compare import Comparison


@quietly
def compare(
    adapter: Annotated[str, typer.Argument(help="The adapter: a folder or a Hub id.")],
    model: common.Base = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="A prompt; can be given several times.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Rows to score both on: .jsonl, .json or .csv.")] = None,
    null: Annotated[bool, typer.Option(help="Compare to a random adapter of the same norm, too.")] = True,
    limit: common.Limit = None,
    system: common.System = None,
    raw: common.Raw = False,
    prompt_field: common.PromptField = None,
    completion_field: common.CompletionField = None,
    max_new_tokens: common.MaxNewTokens = 64,
    seed: Annotated[int, typer.Option(help="Of the null adapter.")] = 0,
    dtype: common.Dtype = None,
    device: common.Device = None,
    as_json: common.Json = False,
) -> None:
    """Show what an adapter changes: answers side by side, losses, accuracy, and a random adapter of the same size.

    Example: trimtab compare runs/a/adapter --data examples/data/addresses/test.jsonl

    Ends with 1 where the adapter changes nothing.
    """
    common.ready()
    opened = common.open_checked(model, [adapter], dtype, device)
    from trimtab.train.compare import compare as run
    from trimtab.train.evaluate import examples_of
    from trimtab.train.prompts import asked_in

    tokenizer = opened.need_tokenizer()
    columns = common.fields(prompt_field, completion_field)
    examples = examples_of(data, tokenizer, limit, columns, system=system) if data is not None else []
    (name,) = opened.adapters
    prompts = prompt or (asked_in(data, 3, columns) if data is not None else [])
    result = run(opened.model, tokenizer, name, prompts, examples, null, max_new_tokens, system, raw, seed,
                 common.counting)  # fmt: skip
    nothing = result.changes_nothing
    if as_json:
        common.emit({"model": opened.base, "path": adapter, "changes_nothing": nothing is not None, "why": nothing,
                     **common.plain(result)})  # fmt: skip
    else:
        _render(result, adapter, opened.base)
    if result.broken:
        common.note("The adapter answers with NaN: trimtab inspect says which tensors.")
    if nothing is not None or result.broken:
        raise typer.Exit(1)


def _render(result: Comparison, adapter: str, base: str) -> None:
    from rich.markup import escape
    from rich.table import Table

    out, names = common.console(), result.names
    size = "" if result.norm is None else f", norm of its delta {common.figure(result.norm)}"
    out.print(f"[bold]{escape(adapter)}[/bold] on {escape(base)}{size}\n")
    for p in result.prompts:
        table = Table(
            "base", escape(result.adapter), title=common.shown(p.prompt[-300:]), title_justify="left", expand=True
        )
        for column in table.columns:
            column.ratio = 1
        table.add_row(*(common.shown(p.sides[n].text) for n in names[:2]))
        place = p.sides[result.adapter].diverges
        table.caption = "the same answer" if place is None else f"they part at token {place + 1}"
        table.caption_justify = "left"
        out.print(table)
        out.print()
    table = common.grid("", *map(escape, names))
    for label, cells in _rows(result):
        table.add_row(label, *(cells.get(n, "") for n in names))
    out.print(table)
    if result.no_null and "null" not in names:
        out.print(f"[dim]No null adapter: {escape(result.no_null)}[/dim]")
    elif "null" in names:
        left = f"; {result.no_null}" if result.no_null else ""
        out.print(
            f"[dim]null: random B·A of the same norm in every layer{escape(left)}. What it does, noise does.[/dim]"
        )
    if (why := result.changes_nothing) is not None:
        out.print(f"\n[bold yellow]This adapter changes nothing:[/bold yellow] {escape(why)}.")


def _rows(result: Comparison) -> list[tuple[str, dict[str, str]]]:
    rows: list[tuple[str, dict[str, str]]] = []
    losses, others = result.losses, result.names[1:]

    def change(name: str, digits: int = 3) -> str:
        return f"{losses[name].loss - losses['base'].loss:+.{digits}f}"

    if losses:
        rows.append(("loss", {n: common.figure(x.loss) for n, x in losses.items()}))
        rows.append(("  change", {n: change(n) for n in others}))
        rows.append(("next token right", {n: common.percent(x.next_token) for n, x in losses.items()}))
        if losses["base"].accuracy is not None:
            rows.append(("accuracy", {n: common.percent(x.accuracy) for n, x in losses.items()}))
            rows.append(("  among the labels", {n: common.percent(x.among_labels) for n, x in losses.items()}))
    if result.prompts:
        total = len(result.prompts)
        rows.append(("answers changed", {n: f"{result.changed(n)} of {total}" for n in others}))
        places = {n: result.first_change(n) for n in others}
        rows.append(("  from token", {n: "-" if p is None else str(p + 1) for n, p in places.items()}))
        rows.append(
            (
                "largest change of a logit",
                {n: common.figure(max(p.sides[n].shift for p in result.prompts)) for n in others},
            )
        )
        rows.append(("KL from the base", {n: common.figure(result.mean(n, "divergence")) for n in others}))
    return rows
