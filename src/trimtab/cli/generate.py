"""trimtab generate"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trimtab.cli import common
from trimtab.cli.quiet import quietly

if TYPE_CHECKING:
    from trimtab.train.generate import Answer


@quietly
def generate(
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="A prompt; can be given several times.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Rows whose prompts to answer: .jsonl, .json or .csv.")] = None,
    model: common.Model = None,
    adapter: common.Adapters = None,
    base: Annotated[bool, typer.Option("--base", help="The answer of the model alone, too.")] = False,
    system: common.System = None,
    raw: common.Raw = False,
    max_new_tokens: common.MaxNewTokens = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0: the likeliest token each time.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Sample from the likeliest tokens of this mass.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    limit: common.Limit = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers at a time.")] = 8,
    dtype: common.Dtype = None,
    device: common.Device = None,
    as_json: common.Json = False,
) -> None:
    """Answer prompts, greedily by default; several adapters answer in one batch. Without a prompt, stdin is one.

    Example: trimtab generate -m smollm2-135m-instruct -a runs/a/adapter -p "What is the capital of France?"
    """
    if prompt and data:
        raise typer.BadParameter("Give --prompt or --data, not both.")
    if model is None and not adapter:
        raise typer.BadParameter("Name a model (--model), an adapter (--adapter), or both.")
    texts = list(prompt or ())
    if not texts and data is None:
        if sys.stdin.isatty():
            raise typer.BadParameter("Give a prompt: --prompt TEXT, --data FILE, or on stdin.")
        texts = [sys.stdin.read().strip()]
        if not texts[0]:
            raise typer.BadParameter("There is no prompt on stdin.")
    common.ready()
    opened = common.open_checked(model, adapter, dtype, device)
    from trimtab.train.generate import answer, sampling_of, stream
    from trimtab.train.prompts import prompts_of

    tokenizer = opened.need_tokenizer()
    prompts = texts or prompts_of(data, limit)  # type: ignore[arg-type]
    names = ["base"] * (base and bool(opened.adapters)) + list(opened.adapters)
    sampling = sampling_of(temperature, top_p, seed)
    if len(prompts) == 1 and len(names) < 2 and not as_json:

        def write(piece: str) -> None:
            print(common.printable(piece) if sys.stdout.isatty() else piece, end="", flush=True)

        stream(opened.model, tokenizer, prompts[0], write, None, max_new_tokens, system, raw, **sampling)
        print()
        return
    answers = answer(opened.model, tokenizer, prompts, names or None, max_new_tokens, batch_size, system, raw,
                     common.counting, **sampling)  # fmt: skip
    if as_json:
        common.emit({"model": opened.base, "adapters": opened.adapters, "answers": answers})
        return
    _render(answers, len(prompts), bool(names))


def _render(answers: list[Answer], prompts: int, named: bool) -> None:
    from rich.markup import escape

    out = common.console()
    for i, a in enumerate(answers):
        if prompts > 1 and i % (len(answers) // prompts) == 0:
            asked = a.prompt if isinstance(a.prompt, str) else str(a.prompt[-1]["content"])
            out.print(f"{chr(10) if i else ''}[dim]{common.shown(asked)}[/dim]")
        label = f"[bold cyan]{escape(a.adapter)}[/bold cyan]  " if named else ""
        out.print(f"{label}{common.shown(a.text)}" + ("[dim] ...[/dim]" if a.finish == "length" else ""))
