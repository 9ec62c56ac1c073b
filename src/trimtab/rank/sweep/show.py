"""What a sweep prints: its header, the plan, and the table with the advice; the table as Markdown, too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from trimtab.rank.sweep.advice import remarks
from trimtab.rank.sweep.cost import planned_steps
from trimtab.rank.sweep.result import Curve, Point, Sweep
from trimtab.rank.sweep.space import Setting
from trimtab.train.plan import Cost
from trimtab.train.progress import size
from trimtab.train.report import show_facts, span

RULE = (
    "after 1/4 and 1/2 of the steps the better half of a rank's learning rates goes on, rounded up; no rank is given up"
)


def header(console: Console, work: Any, settings: Sequence[Setting], repeated: int) -> None:
    """What is about to be done."""
    space, config = work.space, work.config
    steps = sorted({len(work.batches(s.rows, config.seed)) for s in settings})
    sizes = f"; {_list(space.data_sizes)} rows" if space.data_sizes else ""
    facts = [
        ("model", f"{work.base.name} in {work.base.precision.name}"),
        ("rows", f"{len(work.data.examples):,} to learn, {len(work.data.held_out):,} held out"),
        ("tried", f"{len(settings)} settings: ranks {_list(space.ranks)}; alpha {_list(space.alphas)}; on "
                  f"{' and on '.join(space.targets)}{sizes}"),
        ("rates", f"{_list(space.rates)}" + (f"; {RULE}" if len(space.rates) > 1 else "")),
        ("runs", f"{_range(steps)} steps of {config.per_device_train_batch_size * config.gradient_accumulation_steps} "
                 f"rows; {space.seeds} seed{'s' * (space.seeds > 1)} of each setting are trained to the end"),
    ]  # fmt: skip
    if repeated:
        facts.append(("there", f"{repeated} runs are over already and are not repeated"))
    show_facts(console, f"Sweep in {work.store.folder}", facts)


def plan(console: Console, work: Any, settings: Sequence[Setting], seconds: float, cost: Cost, at_once: int) -> None:
    """The runs, and what they would take."""
    header(console, work, settings, len(work.store.outcomes))
    table = _table("setting", "rows", "steps", "searched", "repeated", "steps in all")
    space = work.space
    for setting in settings:
        steps = len(work.batches(setting.rows, work.config.seed))
        table.add_row(
            f"r={setting.rank}, alpha {setting.alpha}, {escape(setting.targets)}", f"{setting.rows:,}", f"{steps:,}",
            f"{len(space.rates)} rates", f"{space.seeds - 1} seeds", f"{planned_steps(space, steps):,}",
        )  # fmt: skip
    console.print(table)
    whole = sum((len(space.rates) * space.seeds) * len(work.batches(s.rows, work.config.seed)) for s in settings)
    part = sum(planned_steps(space, len(work.batches(s.rows, work.config.seed))) for s in settings)
    together = min(len(settings) * len(space.rates), at_once or len(settings) * len(space.rates))
    console.print(
        f"\n{part:,} steps in all, where every rate and seed to its end would be {whole:,}; up to {together} runs are "
        f"trained at once\nabout {span(seconds)} at {cost.tokens_per_second:,.0f} tokens/s (a few steps of one run, "
        "alone, were timed)\n\nNothing was trained or written: that was the plan."
    )


def sweep(console: Console, found: Sweep, seeds: int, drawn: Path | None) -> None:
    """The table, the advice, and where everything is."""
    for curve in found.curves:
        if len(found.curves) > 1:
            console.print(f"\n{curve.rows:,} rows")
        heads, rows = cells(found, curve)
        table = _table(*heads)
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)
    console.print(f"\n{found.advice}", markup=False, style="bold")
    if len(found.curves) > 1:
        knees = ", ".join(f"r={c.chosen.setting.rank} for {c.rows:,}" for c in found.curves)
        console.print(f"By rows to learn from: {knees}.", markup=False)
    for line in remarks(found.curves, found.failed, found.base, seeds):
        console.print(line, markup=False, style="yellow")
    console.print(
        "\n*: within the noise of the best (seeds and held-out rows, 95 % for all comparisons together). Losses in "
        "nats a token; ±: standard deviation over the seeds. general: loss on text that is none of the task's.",
        style="dim", markup=False,
    )  # fmt: skip
    facts = [
        ("adapter", str(found.adapter)),
        ("results", str(found.folder / "sweep.json")),
        ("plot", str(drawn) if drawn else "none: matplotlib is not installed"),
        ("time", f"{span(found.seconds)}; {found.done} runs trained to the end, {found.repeated} were there before"),
    ]
    console.print()
    show_facts(console, "", facts)


def cells(found: Sweep, curve: Curve) -> tuple[list[str], list[list[str]]]:
    """(heads, rows) of a curve's table."""
    several = {name: len({getattr(p.setting, name) for p in curve.points}) > 1 for name in ("alpha", "targets")}
    heads = ["r", *(name for name in several if several[name]), "rate", "trained", "file", "step", "held-out loss"]
    tasks = list(found.base.task)
    heads += [*(t.replace("_", " ") for t in tasks), "general"]
    untrained = [""] * (len(heads) - 2 - len(tasks)) + [f"{found.base.loss:.4f}"]
    untrained += [f"{found.base.task[t]:.1%}" for t in tasks] + [f"{found.base.general:.3f}"]
    untrained[0] = "none"
    rows = [untrained]
    for i, p in enumerate(curve.points):
        row = [str(p.setting.rank), *(str(getattr(p.setting, name)) for name in several if several[name])]
        row += [f"{p.rate:g}", f"{p.parameters:,}", size(p.runs[0].bytes), _seconds(p)]
        mark = " *" if i in curve.verdict.within else "  "
        row.append(_with(p.loss, _deviation(p.losses), "{:.4f}") + mark)
        row += [_with(*p.task[t], "{:.1%}") for t in tasks] + [f"{p.general:.3f}"]
        rows.append(row)
    return heads, rows


def markdown(found: Sweep) -> str:
    """The tables and the advice as Markdown."""
    parts = []
    for curve in found.curves:
        heads, rows = cells(found, curve)
        parts.append(f"{found.model}, {found.data}: {curve.rows:,} rows to learn, {found.held_out:,} held out\n")
        parts.append("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
        parts += ["| " + " | ".join(cell.strip() for cell in row) + " |" for row in rows]
        parts.append("")
    return "\n".join([*parts, found.advice, ""])


def _seconds(point: Point) -> str:
    return "-" if math.isnan(point.step_seconds) else f"{1000 * point.step_seconds:,.0f} ms"


def _deviation(values: Sequence[float]) -> float:
    from statistics import stdev

    return stdev(values) if len(values) > 1 else math.nan


def _with(mean: float, deviation: float, form: str) -> str:
    """A mean with its spread, where there is one."""
    return form.format(mean) + ("" if math.isnan(deviation) else f" ±{form.format(deviation)}")


def _table(*heads: str) -> Table:
    table = Table(*heads, box=None, header_style="dim", padding=(0, 2, 0, 0), pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for column in table.columns:
        column.no_wrap = True
    return table


def _list(values: Sequence[float]) -> str:
    return ", ".join(f"{v:g}" for v in values)


def _range(values: Sequence[int]) -> str:
    return f"{values[0]:,}" if values[0] == values[-1] else f"{values[0]:,} to {values[-1]:,}"
