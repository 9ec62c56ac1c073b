"""All rows as examples, with a report of what became of each of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal, get_args

from trimtab.errors import DataError
from trimtab.train.encode import Encoder
from trimtab.train.example import IGNORE, Example
from trimtab.train.kinds import Row
from trimtab.train.masks import Notes, TemplateName, TrainOn
from trimtab.train.rows import Fault, Rows, raise_faults

__all__ = ["Prepared", "Report", "prepare"]

TooLong = Literal["error", "drop", "truncate", "keep_end"]


@dataclass
class Report:
    """What became of the rows, so that nothing happens to them in silence. Places are as in "data.csv, line 7"."""

    source: str
    template: str = "none is needed"  # where the masks of conversations come from
    kinds: dict[str, int] = field(default_factory=dict)  # kind -> rows
    rows: int = 0  # in the source, with those that could not be read
    used: int = 0
    skipped: list[Fault] = field(default_factory=list)  # bad rows that were left out, and why
    dropped: list[str] = field(default_factory=list)  # places of rows left out because they are too long
    truncated: list[str] = field(default_factory=list)  # places of rows that were cut
    columns: dict[str, str] = field(default_factory=dict)  # our name -> the column it is read from, where they differ
    unused: list[str] = field(default_factory=list)  # columns that nothing was made of
    notes: dict[str, list[str]] = field(default_factory=dict)  # what else is to be said -> places
    supervised: list[int] = field(default_factory=list)  # trained tokens of each example
    tokens: int = 0  # of all examples
    longest: int = 0
    without_end: list[str] = field(default_factory=list)  # places where the answer's end token is not trained
    ends: dict[int, int] = field(default_factory=dict)  # token id that ends an answer -> examples
    bos: int = 0  # examples that begin with a BOS token
    example: str = ""  # the first one as text; what is trained is in ⟦brackets⟧

    def facts(self) -> dict[str, Any]:
        """The figures alone, as JSON can hold them."""
        counts = {name: len(getattr(self, name)) for name in ("skipped", "dropped", "truncated", "without_end")}
        return {
            "source": self.source, "kinds": self.kinds, "template": self.template, "rows": self.rows,
            "used": self.used, **counts, "unused_columns": self.unused, "examples": len(self.supervised),
            "tokens": self.tokens, "longest": self.longest, "supervised": sum(self.supervised),
            "fewest_supervised": min(self.supervised, default=0),
            "notes": {note: len(places) for note, places in self.notes.items()},
        }  # fmt: skip


@dataclass
class Prepared:
    """Examples, the place each comes from, and what became of the rows."""

    examples: list[Example]
    places: list[str]
    report: Report


def prepare(
    rows: Iterable[Row],
    tokenizer: Any,
    *,
    max_length: int | None = None,
    too_long: TooLong = "error",
    system: str | None = None,
    train_on: TrainOn = "completions",
    skip_bad: bool = False,
    plain: bool = False,
    template: TemplateName = "own",
) -> Prepared:
    """Encode rows, make sure that there is something to learn in each, and report what became of them.

    Args:
        rows: of `load_rows`, or any dictionaries.
        max_length: longest example in tokens; None is the tokenizer's own limit.
        too_long: what to do with longer ones: "truncate" cuts the end off, "keep_end" the beginning (but for BOS).
        system: system message of conversations that have none; None leaves it to the chat template.
        train_on: "all" trains prompts as well; "last" only the last answer of each conversation.
        skip_bad: leave bad rows out and count them, rather than to raise.
        plain: join prompts and completions that are strings as they are, also where there is a chat template.
        template: "trl" renders conversations by TRL's training template in place of the tokenizer's own.

    Raises:
        DataError: rows of unknown kind, without trained tokens, without an end, or too long: all of them, in one error.
    """
    _check_words(too_long=(too_long, TooLong), train_on=(train_on, TrainOn), template=(template, TemplateName))
    encoder = Encoder(tokenizer, system, train_on, plain, template)
    limit = tokenizer.model_max_length if max_length is None else max_length
    rows = rows if isinstance(rows, Rows) else Rows(list(rows))
    report = Report(rows.source, rows=len(rows) + len(rows.skipped))
    report.columns = {ours: theirs for ours, theirs in rows.mapped.items() if ours != theirs}
    prepared = Prepared([], [], report)
    faults: list[Fault] = []
    for index, row in enumerate(rows):
        place = rows.where(index)
        try:
            examples, notes, kind, columns = encoder.encode(row)
            kept = [fitting for e in examples if (fitting := _fit(e, limit, too_long, tokenizer)) is not None]
        except DataError as e:
            faults.append(Fault(place, str(e)))
            continue
        _count(report, place, kind, columns, notes, examples, kept)
        prepared.examples += [replace(e, row=index) for e in kept]
        prepared.places += [place] * len(kept)
    if faults and not (skip_bad and prepared.examples):
        raise_faults(faults, "row(s) cannot be trained on")
    report.skipped = [*rows.skipped, *faults]
    if encoder.conversations:
        report.template = encoder.template.source()
    elif system is not None:
        report.notes["there is no conversation that the system message could be in"] = []
    if not prepared.examples:
        raise DataError("There are no rows to train on" + (f": all are longer than {limit} tokens." if rows else "."))
    _measure(report, prepared, tokenizer)
    return prepared


def _check_words(**words: tuple[str, Any]) -> None:
    for name, (word, allowed) in words.items():
        if word not in get_args(allowed):
            raise DataError(f"{name} is {word!r}; it can be {', '.join(map(repr, get_args(allowed)))}.")


def _fit(example: Example, limit: int, too_long: TooLong, tokenizer: Any) -> Example | None:
    """The example within the limit, or None where it is dropped."""
    ids, labels = example.ids, example.labels
    over = len(ids) - limit
    if over <= 0:
        return example
    if too_long == "drop":
        return None
    if too_long == "error":
        raise DataError(
            f"it has {len(ids)} tokens, more than {limit} (too_long='drop', 'truncate' or 'keep_end' would do)"
        )
    if too_long == "truncate":
        cut = Example(ids[:limit], labels[:limit], min(example.prompt_length, limit))
    else:
        head = 1 if ids[0] == tokenizer.bos_token_id else 0  # models read nothing well without their BOS
        rest = head + over
        start = max(head, example.prompt_length - over)
        cut = Example(ids[:head] + ids[rest:], [IGNORE] * head + labels[rest:], start)
    if not cut.trained:
        raise DataError(f"cut to {limit} tokens it has nothing left to train on")
    return cut


def _count(
    report: Report, place: str, kind: str, columns: set[str], notes: Notes, examples: list[Example], kept: list[Example]
) -> None:
    report.kinds[kind] = report.kinds.get(kind, 0) + 1
    report.unused = sorted({*report.unused, *columns})
    report.used += bool(kept)
    if len(kept) < len(examples):
        report.dropped.append(place)
    if not {id(e) for e in kept} <= {id(e) for e in examples}:
        report.truncated.append(place)
    for note in notes:
        report.notes.setdefault(note, []).append(place)


def _measure(report: Report, prepared: Prepared, tokenizer: Any) -> None:
    """What can be counted off the examples."""
    enders = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
    blank = cache(lambda id: not tokenizer.decode([id]).strip())
    report.supervised = [e.trained for e in prepared.examples]
    report.tokens = sum(len(e.ids) for e in prepared.examples)
    report.longest = max(len(e.ids) for e in prepared.examples)
    report.bos = sum(e.ids[0] == tokenizer.bos_token_id for e in prepared.examples)
    for example, place in zip(prepared.examples, prepared.places):
        # Some templates train the newline after the end token, too.
        last = next((id for id in reversed(example.labels) if id in enders or (id != IGNORE and not blank(id))), IGNORE)
        if last in enders:
            report.ends[last] = report.ends.get(last, 0) + 1
        else:
            report.without_end.append(place)
    report.example = "".join(
        f"⟦{text}⟧" if trained else text for text, trained in prepared.examples[0].spans(tokenizer)
    )
