"""trimtab chat"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trimtab.cli import common
from trimtab.cli.quiet import quietly

if TYPE_CHECKING:
    from trimtab.train.generate import Answer


@quietly
def chat(
    model: common.Model = None,
    adapter: common.Adapters = None,
    system: common.System = None,
    max_new_tokens: common.MaxNewTokens = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0: the likeliest token each time.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Sample from the likeliest tokens of this mass.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    dtype: common.Dtype = None,
    device: common.Device = None,
    as_json: common.Json = False,
) -> None:
    """Talk to a model and switch its adapters as you go: /adapter NAME, /base, /compare, /reset, /help, /quit.

    Example: trimtab chat -m smollm2-135m-instruct -a addresses=runs/a/adapter -a devil=runs/b/adapter
    """
    if model is None and not adapter:
        raise typer.BadParameter("Name a model (--model), an adapter (--adapter), or both.")
    common.ready()
    opened = common.open_checked(model, adapter, dtype, device)
    from trimtab.train.chat import Chat
    from trimtab.train.generate import sampling_of

    talk = Chat(opened, system, max_new_tokens, **sampling_of(temperature, top_p, seed))
    show = _Quiet() if as_json else _Terminal()
    person = sys.stdin.isatty() and not as_json
    if person:
        import readline  # noqa: F401  lines can be edited and called back

        who = f" with {', '.join(talk.names)}" if talk.names else ""
        show.note(f"{opened.base}{who} ({opened.where}). /help shows the commands.")
    while True:
        try:
            line = input("\n> " if person else "")
        except (EOFError, KeyboardInterrupt):
            if person:
                print()
            break
        if not talk.handle(line, show):
            break
    if as_json:
        common.emit(
            {"model": opened.base, "adapters": opened.adapters, "messages": talk.messages, "events": show.events}
        )


class _Terminal:
    """Answers as they come; what is no answer on stderr, dimmed."""

    events: tuple[Any, ...] = ()

    def __init__(self) -> None:
        self.out = common.console()

    def begin(self, name: str) -> None:
        if sys.stdout.isatty():
            self.out.print(f"{name}  ", style="bold cyan", end="", markup=False)

    def write(self, text: str) -> None:
        print(common.printable(text) if sys.stdout.isatty() else text, end="", flush=True)

    def end(self) -> None:
        print()

    def note(self, text: str) -> None:
        from rich.console import Console

        Console(stderr=True, highlight=False).print(text, style="dim", markup=False)

    def beside(self, answers: list[Answer]) -> None:
        from rich.table import Table

        table = Table(*(a.adapter for a in answers), expand=True)
        for column in table.columns:
            column.ratio = 1
        table.add_row(*(common.shown(a.text) for a in answers))
        self.out.print(table)


class _Quiet:
    """Everything kept, for one JSON object at the end."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def begin(self, name: str) -> None:
        self.events.append({"adapter": name, "text": ""})

    def write(self, text: str) -> None:
        self.events[-1]["text"] += text

    def end(self) -> None:
        self.events[-1]["text"] = self.events[-1]["text"].strip()

    def note(self, text: str) -> None:
        self.events.append({"note": text})

    def beside(self, answers: list[Answer]) -> None:
        self.events.append({"compare": {a.adapter: a.text for a in answers}})
