"""What must be right with the data before the first step, and three examples to look at."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from trimtab.errors import DataError
from trimtab.train.example import Example
from trimtab.train.kinds import describe
from trimtab.train.prepare import Prepared, Report

__all__ = ["Finding", "Preflight", "preflight"]

SHOWN = 3  # examples, and places that a finding names
LONGEST = 600  # characters of an example that are shown
TRAINED = "bold green"


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with the data, or may be."""

    level: Literal["error", "warning"]
    message: str
    places: Sequence[str] = ()  # where

    def __str__(self) -> str:
        named = "; ".join(self.places[:SHOWN])
        more = len(self.places) - SHOWN
        return self.message + (f": {named}" if named else "") + (f" and {more} more" if more > 0 else "")


@dataclass
class Preflight:
    """The findings, and what `render` shows: the counts, and examples with what is trained in colour."""

    prepared: Prepared
    tokenizer: Any
    findings: list[Finding] = field(default_factory=list)

    @property
    def warnings(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == "warning"]

    def render(self, console: Console, examples: int = SHOWN) -> None:
        """Print it. What is trained is green; where there are no colours it stands in brackets."""
        left, right = _brackets(console)
        for line in _facts(self.prepared, bool(self.tokenizer.chat_template)):
            text = line.lstrip()  # what is too long for the console goes on below itself
            console.print(Padding(Text(text), (0, 0, 0, len(line) - len(text)), expand=False))
        console.print(Text(f"Trained is what stands in {f'{left}brackets{right}' if left else 'green'}:"))
        for example, place in list(zip(self.prepared.examples, self.prepared.places))[:examples]:
            console.print(Text(f"{place}: {len(example.ids)} tokens, {example.trained} of them trained", style="bold"))
            console.print(Padding(_shown(example, self.tokenizer, left, right), (0, 0, 0, 2), expand=False))
        for finding in self.findings:
            console.print(
                Text(f"{finding.level}: {finding}", style="bold red" if finding.level == "error" else "yellow")
            )


def preflight(
    prepared: Prepared,
    tokenizer: Any,
    *,
    stop_ids: Collection[int] | None = None,
    vocab_size: int | None = None,
) -> Preflight:
    """Check prepared rows.

    Args:
        stop_ids: the tokens at which the model's generation ends (`generation_config.eos_token_id`).
        vocab_size: rows of the model's embedding.

    Raises:
        DataError: training on them would be training on nothing, or would fail; every fault, with the rows' places.
    """
    found = Preflight(prepared, tokenizer)
    found.findings = [*_errors(prepared, tokenizer, vocab_size), *_warnings(prepared.report, tokenizer, stop_ids)]
    if errors := [str(finding) for finding in found.findings if finding.level == "error"]:
        raise DataError("The data cannot be trained on:\n  " + "\n  ".join(errors))
    return found


def _errors(prepared: Prepared, tokenizer: Any, vocab_size: int | None) -> list[Finding]:
    def places(bad: Any) -> list[str]:
        return [place for e, place in zip(prepared.examples, prepared.places) if bad(e)]

    bos = tokenizer.bos_token_id
    checks = [
        ("no token would be trained", lambda e: not e.trained),
        ("there are two BOS tokens at the beginning", lambda e: bos is not None and e.ids[:2] == [bos, bos]),
        (
            f"there are token ids that the model's embedding of {vocab_size} rows does not have",
            lambda e: vocab_size is not None and not 0 <= min(e.ids) <= max(e.ids) < vocab_size,
        ),
    ]
    found = [Finding("error", message, where) for message, bad in checks if (where := places(bad))]
    return found if prepared.examples else [Finding("error", "there are no rows to train on")]


def _warnings(report: Report, tokenizer: Any, stop_ids: Collection[int] | None) -> list[Finding]:
    messages: dict[str, Sequence[str]] = {
        "row(s) left out, because they are bad": [str(fault) for fault in report.skipped],
        "row(s) left out, because they are too long": report.dropped,
        "row(s) cut, because they are too long": report.truncated,
        "example(s) in which no end token is trained, so the model may never stop": report.without_end,
    }
    found = [Finding("warning", f"{len(w)} {text}", w) for text, w in messages.items() if w]
    found += [Finding("warning", text, where) for text, where in sorted(report.notes.items())]
    if strange := [id for id in report.ends if stop_ids is not None and id not in stop_ids]:
        ends = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(strange)))
        text = f"answers end with {ends}, at which the model's generation does not stop: it will go on after them"
        found.append(Finding("warning", f"{text} (set eos_token_id in its generation config)"))
    missing = len(report.supervised) - report.bos
    if missing and _adds_bos(tokenizer):
        found.append(
            Finding("warning", f"{missing} example(s) begin without BOS, which the tokenizer gives every text")
        )
    return found


def _adds_bos(tokenizer: Any) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]


# --- what is shown ----------------------------------------------------------------------------------------------------


def _facts(prepared: Prepared, chat: bool) -> list[str]:
    report = prepared.report
    few, total = min(report.supervised, default=0), sum(report.supervised)
    lines = [f"{report.source}: {report.used:,} of {report.rows:,} rows are used"]
    lines += [f"  {count:,} x {describe(kind, chat)}" for kind, count in report.kinds.items()]
    if report.columns:
        lines.append(f"  columns: {', '.join(f'{a} from {b!r}' for a, b in report.columns.items())}")
    if report.unused:
        lines.append(f"  columns not used: {', '.join(map(repr, report.unused))}")
    if prepared.examples:
        place = prepared.places[report.supervised.index(few)]
        lines.append(f"  {report.tokens:,} tokens, {total:,} of them trained ({total / report.tokens:.0%})")
        lines.append(f"  fewest trained in an example: {few} ({place}); longest example: {report.longest:,} tokens")
    lines.append(f"  chat template: {report.template}")
    return lines


def _brackets(console: Console) -> tuple[str, str]:
    """Marks around what is trained, where colours cannot be seen."""
    if console.color_system and not console.no_color:
        return "", ""
    return ("⟦", "⟧") if console.encoding.lower().startswith("utf") else ("[[", "]]")


def _shown(example: Example, tokenizer: Any, left: str, right: str) -> Text:
    """The example as text, its middle left out if it is long."""
    pieces = [(visible(text), trained) for text, trained in example.spans(tokenizer)]
    room = max(80, LONGEST // len(pieces))
    shown = Text()
    for text, trained in pieces:
        if len(text) > room:
            text = f"{text[: room // 2]} ({len(text) - room} characters more) {text[-(room // 2) :]}"
        shown.append(f"{left}{text}{right}" if trained else text, style=TRAINED if trained else "dim")
    return shown


def visible(text: str) -> str:
    """Text in which nothing can steer a terminal: control characters and lone surrogates are spelt out."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
