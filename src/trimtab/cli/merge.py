"""trimtab merge"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trimtab.cli import common
from trimtab.cli.quiet import quietly

if TYPE_CHECKING:
    from trimtab.export.merge import Receipt


@quietly
def merge(
    adapters: Annotated[list[str], typer.Argument(help="Adapters, PATH or NAME=PATH; several add up.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the merged model.")],
    model: common.Base = None,
    dtype: Annotated[str | None, typer.Option(help="Number format of the saved weights. Default: the base's.")] = None,
    device: common.Device = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="A text to compare logits on; several times.")
    ] = None,
    dequantise: Annotated[
        bool, typer.Option("--dequantise", "--dequantize", help="Give a quantised base plain weights first.")
    ] = False,
    allow_quantised: Annotated[
        bool,
        typer.Option(
            "--allow-quantised", "--allow-quantized", help="Merge into quantised weights, and see what rounding took."
        ),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output folder.")] = False,
    as_json: common.Json = False,
) -> None:
    """Merge adapters into their base, save a whole model, and say how far its logits are off. Also called fuse.

    Example: trimtab merge runs/a/adapter --output merged
    """
    common.ready()
    opened = common.open_checked(model, adapters, "auto", device, task=None)
    from trimtab.export.merge import PROMPTS
    from trimtab.export.merge import merge as run

    receipt = run(opened, output, prompt or PROMPTS, dtype, dequantise, allow_quantised, overwrite, say=common.note)
    if as_json:
        common.emit(receipt)
    else:
        _render(receipt)


def _render(receipt: Receipt) -> None:
    from rich.markup import escape

    out = common.console()
    out.print(f"[bold]{escape(receipt.output)}[/bold]  {common.size(receipt.bytes)}\n")
    table = common.grid()
    table.add_row("base", escape(receipt.base))
    for name, folder in receipt.adapters.items():
        table.add_row("adapter", f"{escape(folder)} ({receipt.sha256[name][:12]})")
    table.add_row("instead of", f"{common.size(receipt.adapter_bytes)} of adapters beside the base")
    stages = zip(("base", "products", "saved"), receipt.path)
    table.add_row("number formats", ", ".join(f"{stage} {dtype}" for stage, dtype in stages))
    table.add_row(
        "logit drift",
        f"{common.figure(receipt.drift_largest, 6)} at most, {common.figure(receipt.drift_mean, 6)} in the mean; "
        f"logits spread by {common.figure(receipt.logit_scale, 2)}",
    )
    table.add_row("same next token", f"{common.percent(receipt.same_choice)} of {receipt.positions} positions")
    if receipt.lost is not None:
        table.add_row("lost to rounding", f"[bold]{common.percent(receipt.lost)}[/bold] of a layer's change, at worst")
    parts = ["tokenizer"] * receipt.tokenizer + ["chat template"] * receipt.template
    table.add_row("along with it", ", ".join(parts) or "no tokenizer: there is none beside base or adapter")
    out.print(table)
