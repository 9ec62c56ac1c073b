"""trimtab eval"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trimtab.cli import common
from trimtab.cli.quiet import quietly

if TYPE_CHECKING:
    from trimtab.shell.opening import Opened
    from trimtab.train.data import Example
    from trimtab.train.evaluate import Evaluation


METRICS = {  # how they are called, and what they say
    "exact_match": ("exact match", "to the character"),
    "field_f1": ("field F1", "of the fields of its JSON"),
    "json_valid": ("valid JSON", "of the answers, as a whole"),
}


@quietly
def evaluate(
    model_or_adapter: Annotated[str, typer.Argument(help="An adapter, or a model: folder, Hub id, GGUF, packaged.")],
    data: Annotated[Path, typer.Option(help="Rows: .jsonl, .json or .csv.")],
    model: common.Base = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help="loss, accuracy, exact_match, field_f1 or json_valid; several times. Default: those that fit."
        ),
    ] = None,
    limit: common.Limit = None,
    system: common.System = None,
    prompt_field: common.PromptField = None,
    completion_field: common.CompletionField = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer. Default: as the rows need.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers that are generated at a time.")] = 16,
    show: Annotated[int, typer.Option(min=0, help="How many wrong answers to show.")] = 3,
    dtype: common.Dtype = None,
    device: common.Device = None,
    as_json: common.Json = False,
) -> None:
    """Score a model or adapter on rows: loss, perplexity, exact match, accuracy, fields of JSON.

    Example: trimtab eval runs/a/adapter --data examples/data/addresses/test.jsonl
    """
    common.ready()
    if model is None:
        opened = common.open_checked(model_or_adapter, None, dtype, device)
    else:
        opened = common.open_checked(model, [model_or_adapter], dtype, device)
    from trimtab.train.evaluate import evaluate_rows, examples_of

    tokenizer = opened.need_tokenizer()
    columns = common.fields(prompt_field, completion_field)
    examples = examples_of(data, tokenizer, limit, columns, system=system)
    began = time.monotonic()
    result = evaluate_rows(opened.model, tokenizer, examples, metric or (), max_new_tokens, batch_size, common.counting)
    seconds = time.monotonic() - began
    if as_json:
        common.emit({"model": opened.base, "adapters": opened.adapters, "data": str(data), "rows": len(examples),
                     "perplexity": result.loss.perplexity, "seconds": seconds, **common.plain(result)})  # fmt: skip
    else:
        _render(opened, data, examples, result, seconds, show)
    if result.loss.loss != result.loss.loss:
        common.note("The loss is not a number: trimtab inspect says whether the adapter holds NaN.")
        raise typer.Exit(1)


def _render(opened: Opened, data: Path, examples: list[Example], result: Evaluation, seconds: float, show: int) -> None:
    from rich.markup import escape
    from rich.table import Table

    out, loss = common.console(), result.loss
    who = " + ".join(opened.adapters.values())
    out.print(f"[bold]{escape(who or opened.base)}[/bold]" + (f" on {escape(opened.base)}" if who else ""))
    out.print(f"{len(examples)} rows of {escape(str(data))}, {loss.tokens:,} trained tokens ({opened.where})\n")
    table = common.grid()
    table.add_row("loss", common.figure(loss.loss), "nats a trained token")
    table.add_row("perplexity", common.figure(loss.perplexity, 2), "exp(loss)")
    table.add_row("next token", common.percent(loss.next_token), "of the trained tokens are its own choice")
    if loss.accuracy is not None:
        table.add_row("accuracy", f"[bold]{common.percent(loss.accuracy)}[/bold]", "its choice of all tokens")
        table.add_row("", common.percent(loss.among_labels), f"its choice among the {loss.labels} labels")
        table.add_row("", common.percent(loss.commonest), "always the commonest label")
    for name, value in (result.answers.metrics if result.answers else {}).items():
        label, words = METRICS.get(name, (name, ""))
        table.add_row(label, f"[bold]{common.percent(value)}[/bold]", words)
    out.print(table)
    out.print(f"\n[dim]{escape(result.why)}; {seconds:.1f} s[/dim]")
    answers = result.answers
    wrong = [(a, b, i) for i, (a, b) in enumerate(zip(answers.answers, answers.expected)) if a != b] if answers else []
    if wrong[:show]:
        table = Table(
            "row", "expected", "answer", show_lines=True, title=f"{len(wrong)} answers are not exact", expand=True
        )
        table.columns[0].no_wrap = True
        for answer, expected, i in wrong[:show]:
            table.add_row(str(i + 1), common.shown(expected[:400]), common.shown(answer[:400]))
        out.print()
        out.print(table)
