"""What `trimtab rank` prints: tables for people, one JSON object for programs."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

from trimtab.rank.intruders import Mended
from trimtab.rank.resize import Resized, ResizedLayer
from trimtab.rank.suggest import RankEstimate, Suggestion
from trimtab.rank.survey import LayerSpectrum, Survey, by_module

MANY = 40  # layers, from which on they are shown by module

Item = TypeVar("Item")


def emit(value: Any) -> None:
    """One JSON object on stdout."""
    print(json.dumps(_plain(value), indent=2, ensure_ascii=False))


def survey(found: Survey, whole: bool = False) -> None:
    """The table of `trimtab rank inspect`; `whole`: every layer, however many there are."""
    whole = whole or len(found.layers) <= MANY
    based = any(x.relative is not None for x in found.layers)
    head = ["layer", "dW", "r", "alpha", "‖dW‖", "largest", "90 %", "99 %", "entropy", "stable"]
    table = _table(*head, *(["‖dW‖/‖W‖", "intruders"] if based else []))
    for name, some in _grouped(found.layers, lambda x: x.path, whole).items():
        cells = [_span(column) for column in zip(*map(_numbers, some), strict=True)]
        if based:
            cells += [
                _span(x.relative and 100 * x.relative for x in some) + " %",
                f"{sum(x.intruders or 0 for x in some):,}",
            ]
        table.add_row(_times(name, some, whole), _by(some[0].shape), *cells)
    out = _console()
    beside = f", {found.other:,} of them beside the factors" if found.other else ""
    out.print(f"{found.method} adapter in {found.source}: {found.parameters:,} parameters{beside}\n", markup=False)
    out.print(table)
    _small(
        out,
        "90 %, 99 %: the fewest singular values S that hold so much of ΣS²; entropy: exp of that of S/ΣS; stable: "
        "‖dW‖² / largest²." + ("" if whole else " a-b: the least and the most of the layers."),
    )
    if found.note:
        out.print(found.note, markup=False)


def _numbers(x: LayerSpectrum) -> tuple[float | None, ...]:
    largest, e = x.values[0] if x.values else 0.0, x.effective
    return x.rank, x.alpha, x.norm, largest, e.energy90, e.energy99, e.entropy, e.stable


def resized(done: Resized, whole: bool = False) -> None:
    """The table of `trimtab rank resize`."""
    whole = whole or len(done.layers) <= MANY
    table = _table("layer", "r", "new r", "‖dW‖", "error", "relative")
    for name, some in _grouped(done.layers, lambda x: x.path, whole).items():
        cells = [_span(getattr(x, field) for x in some) for field in ("old_rank", "rank", "norm", "error")]
        table.add_row(_times(name, some, whole), *cells, _percent(some))
    out = _console()
    out.print(table)
    left_out = sum(x.rank == 0 for x in done.layers)
    out.print(
        f"\n{done.old_parameters:,} -> {done.parameters:,} parameters, {done.old_bytes / 1e6:.2f} -> "
        f"{done.bytes / 1e6:.2f} MB; the error of all layers together is {done.relative:.2%} of their norm"
        + (f"; layers left out: {left_out}." if left_out else ".")
    )
    scores(done.old_score, done.score)
    out.print(f"Written to {done.output}" if done.output else "Nothing is written: give --output.", markup=False)


def _percent(some: Sequence[ResizedLayer]) -> str:
    return _span(100 * x.relative for x in some) + " %"


def mended(done: Mended) -> None:
    """What `trimtab rank mend` says."""
    out = _console()
    touched = [x for x in done.layers if x.intruders]
    out.print(f"{done.intruders} intruder dimensions in {len(touched)} of {len(done.layers)} layers were scaled down.")
    if touched:
        most = max(touched, key=lambda x: x.moved)
        out.print(f"Their changes moved by up to {most.moved:.1%} ({most.path}).", markup=False)
    scores(done.old_score, done.score)
    out.print(f"Written to {done.output}", markup=False)


def scores(before: float | None, after: float | None) -> None:
    """Held-out losses, where there are any."""
    if before is not None and after is not None:
        change = after - before
        _console().print(f"Held-out loss: {before:.4f} before, {after:.4f} after ({change:+.4f} nats a token).")


def suggestion(said: Suggestion, rows: int) -> None:
    """What `trimtab rank suggest` says by the size of a task."""
    table = _table("layers", "", "parameters of r=1", "least r")
    for s in said.sets:
        modules = ", ".join(s.modules[:7]) + (" ..." if len(s.modules) > 7 else "")
        table.add_row(f"{s.name}: {modules}", f"x {s.layers}", f"{s.parameters:,}", f"{s.rank(said.tokens):,}")
    out = _console()
    out.print(f"{rows:,} rows train {said.tokens:,} tokens.\n")
    out.print(table)
    first = said.sets[0]
    if said.flat:
        out.print(
            f"\nr=1 on {first.name} has {first.parameters / said.tokens:,.1f} parameters a token: capacity is no limit "
            "here, and quality should hardly depend on the rank. Take a small one."
        )
    else:
        out.print(f"\nTake r={said.rank} on {first.name}: the least power of two with a parameter for each token.")
    out.print(
        f"Start the search for the learning rate at {said.learning_rate:g} with lora_alpha={said.alpha}, and try a "
        "factor of 3 either way: it matters more than the rank, and at a fixed alpha hardly depends on it."
    )
    _small(
        out,
        "Rule: at least as many parameters as tokens trained on; the best rate is about 10 times full fine-tuning's, "
        "15 times in runs below 100 steps (Schulman et al. 2025, LoRA Without Regret, thinkingmachines.ai/blog/lora). "
        "Rate: the sweep in Tinker's cookbook, for models up to 8 B and above.",
    )


def estimates(found: Sequence[RankEstimate], energy: float) -> None:
    """What `trimtab rank suggest --estimate` says by gradients."""
    table = _table("layers", "W", "‖gradient‖", "r", "median r")
    for name, some in _grouped(found, lambda e: e.path, whole=len(found) <= MANY).items():
        ranks = sorted(e.rank for e in some)
        beyond = "+" if any(e.capped for e in some) else ""
        cells = [_span(e.norm for e in some), _span(ranks) + beyond, str(ranks[len(ranks) // 2])]
        table.add_row(_times(name, some, len(found) <= MANY), _by(some[0].shape), *cells)
    out = _console()
    out.print(f"\nThe rank that holds {energy:.0%} of the energy of the gradient at the start:\n")
    out.print(table)
    ranks = sorted(e.rank for e in found)
    half, most = ranks[(len(ranks) - 1) // 2], ranks[(9 * (len(ranks) - 1)) // 10]
    out.print(f"\nHalf of the layers need no more than r={half}, nine in ten no more than r={most}.")
    _small(out, "+: more than the largest rank that is told. --json has a rank_pattern for LoraConfig.")


# ---------------------------------------------------------------------- cells
def _grouped(items: Iterable[Item], path: Callable[[Item], str], whole: bool) -> dict[str, list[Item]]:
    return {path(item): [item] for item in items} if whole else by_module(items, path)


def _times(name: str, some: Sequence[Any], whole: bool) -> str:
    return name if whole else f"{name} x {len(some)}"


def _span(values: Iterable[float | None]) -> str:
    """One number, or the least and the most of several."""
    known = [v for v in values if v is not None]
    texts = [_figure(v) for v in (min(known), max(known))] if known else ["-", "-"]
    return texts[0] if texts[0] == texts[1] else f"{texts[0]}-{texts[1]}"


def _figure(value: float) -> str:
    if value == round(value):
        return f"{round(value):,}"
    return f"{value:.2g}" if abs(value) < 0.01 else f"{value:.2f}" if abs(value) < 10 else f"{value:,.1f}"


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _plain(value: Any) -> Any:
    """Dataclasses as dicts, with their properties."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in dataclasses.fields(value)]
        names += [n for n, v in vars(type(value)).items() if isinstance(v, property)]
        return {name: _plain(getattr(value, name)) for name in names}
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    return table


def _small(out: Console, text: str) -> None:
    out.print(f"\n{text}", style="dim", markup=False)


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120, highlight=False)
