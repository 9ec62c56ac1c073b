"""What the verbs share: options, quiet libraries, one JSON object, tables, and rows counted as they are done."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import time
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trimtab.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from trimtab.shell.opening import Opened

Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, and nothing else.")]
Base = Annotated[
    str | None, typer.Option("--model", "-m", help="Base model; by default the one that the adapter names.")
]
Model = Annotated[
    str | None, typer.Option("--model", "-m", help="Folder, Hub id, GGUF file, packaged model, or an adapter.")
]
Adapters = Annotated[
    list[str] | None, typer.Option("--adapter", "-a", help="PATH or NAME=PATH; can be given several times.")
]
Dtype = Annotated[
    str | None,
    typer.Option(help="float32, bfloat16, float16 or auto (as stored). Default: float32 on a CPU, else auto."),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ... Default: cuda where there is one.")]
System = Annotated[str | None, typer.Option(help="System message; by default the chat template's own. '' for none.")]
Raw = Annotated[bool, typer.Option("--raw", help="Prompts go in as they are, without the chat template.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first so many rows.")]
PromptField = Annotated[str | None, typer.Option(help="Column of the prompt, where it is called otherwise.")]
CompletionField = Annotated[str | None, typer.Option(help="Column of the answer, where it is called otherwise.")]


def ready() -> None:
    """Set what libraries read as they are imported."""
    # Threads that wait should sleep, not spin: on a machine that others use too, spinning is several times as slow.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def open_checked(
    model: str | None,
    adapters: list[str] | None,
    dtype: str | None,
    device: str | None,
    task: str | None = "CAUSAL_LM",
) -> Opened:
    """`open_model`, of language models unless `task` says otherwise; says where an adapter is for another base."""
    warnings.filterwarnings("ignore", "Adapter name '.*' should not be contained")  # that is for those who train
    from trimtab.shell.opening import open_model
    from trimtab.train.provenance import check_provenance

    opened = open_model(model, adapters or [], dtype=dtype, device=device, task=task)
    for path in opened.adapters.values():
        for line in check_provenance(path, opened.model, opened.base, opened.tokenizer):
            note(f"Warning: {line}")
    return opened


def note(line: str) -> None:
    """A line on stderr."""
    print(line, file=sys.stderr, flush=True)


def console() -> Console:
    """Where tables go: stdout, in its own width, or 100 columns where it is no terminal."""
    from rich.console import Console

    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 100
    return Console(width=width, highlight=False)


def grid(*heads: str, right: bool = True) -> Table:
    """A table without lines, so narrow that eighty columns do; figures stand on the right."""
    from rich.table import Table

    table = Table(*heads, show_header=bool(heads), box=None, padding=(0, 2, 0, 0))
    for column in table.columns[1:] if right else ():
        column.justify, column.no_wrap = "right", True
    return table


def emit(value: Any) -> None:
    """One JSON object on stdout; what is no number is null."""
    print(json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False))


def plain(value: Any) -> Any:
    """Dataclasses as dicts, with what JSON cannot hold as null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def figure(value: float | None, digits: int = 3) -> str:
    """A number for people: "0.412", "12,345", "2.1e-06", "-" where there is none."""
    if value is None or math.isnan(value):
        return "-"
    if value and (abs(value) < 10 ** -(digits - 1) or abs(value) >= 1e7):
        return f"{value:.2g}"
    return f"{value:,.{digits}f}" if abs(value) < 1000 else f"{value:,.0f}"


def printable(text: str) -> str:
    """A model's text without what would steer a terminal; lines and tabs stay."""

    def harmless(c: str) -> bool:
        return c in "\n\t" or unicodedata.category(c)[0] != "C"

    return "".join(c if harmless(c) else "\N{REPLACEMENT CHARACTER}" for c in text)


def shown(text: str) -> str:
    """A model's or a user's text as a table takes it."""
    from rich.markup import escape

    return escape(printable(text)) or "(nothing)"


def percent(value: float | None) -> str:
    """A share for people."""
    return "-" if value is None else f"{100 * value:.1f} %"


def size(n: int) -> str:
    """Bytes for people."""
    for unit, power in (("GB", 9), ("MB", 6), ("kB", 3)):
        if n >= 10**power:
            return f"{n / 10**power:.1f} {unit}"
    return f"{n} bytes"


def numbers(option: str, text: str, kind: type) -> tuple[Any, ...]:
    """ "1,4,16" or "1 4 16", as an option's value."""
    try:
        return tuple(kind(part) for part in text.replace(",", " ").split())
    except ValueError:
        raise ConfigError(f"--{option}: {text} is not a list of numbers, such as 1,4,16.") from None


def fields(prompt: str | None, completion: str | None) -> dict[str, str]:
    """Our names of columns -> the file's."""
    return {k: v for k, v in (("prompt", prompt), ("completion", completion)) if v is not None}


@contextmanager
def counting(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Counts what is done, on stderr: a bar on a terminal, a line every ten seconds elsewhere."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(title, total=total)
            yield lambda n: bar.advance(task, n)
        return
    began = last = time.monotonic()
    count = 0

    def done(n: int) -> None:
        nonlocal count, last
        count, now = count + n, time.monotonic()
        if now - last >= 10:
            last = now
            left = (now - began) * (total - count) / count
            note(f"{title}: {count} of {total}, about {max(left, 0):.0f} s left")

    yield done
