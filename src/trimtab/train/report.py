"""What a run prints: its header, the plan, and how it ended."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from trimtab.train.plan import Cost, Target, targets
from trimtab.train.progress import clock, size
from trimtab.train.provenance import base_tensors

if TYPE_CHECKING:
    from trimtab.train.loop import TrainResult
    from trimtab.train.translate import Translation

__all__ = [
    "card_facts", "console_for", "facts_of", "show_end", "show_facts", "show_jobs", "show_outcomes",
    "show_plan", "show_translation",
]  # fmt: skip


def facts_of(
    config: Any, base: Any, data: Any, batches: Any, model: Any, count: int, by_width: bool
) -> list[tuple[str, str]]:
    """The header of a run: (what, what is true of it)."""
    trainable, total = model.get_nb_trainable_parameters()
    device = next(model.parameters()).device.type
    width = " (by the model's width)" if by_width else ""
    rows = config.per_device_train_batch_size * config.gradient_accumulation_steps * count  # of a step
    kind = f"sequences of up to {data.packed(config):,} tokens" if config.packing else "rows"
    facts = [
        ("model", f"{base.name}, {parameters(total - trainable)} in {base.precision.name} on {device} "
                  f"({base.precision.why})"),
        ("rows", f"{len(data.examples):,} to learn, " + (f"{len(data.held_out):,}" if data.held_out else "none")
                 + " held out"),
        ("adapter", f"{adapter_in_words(model)}; {trainable:,} trainable parameters ({trainable / total:.2%})"),
        ("steps", f"{len(batches):,} of {rows} {kind}, {batches.epoch(len(batches)):.4g} passes; {config.optimizer}, "
                  f"learning rate {config.learning_rate:g}{width}, {config.lr_scheduler_type}"),
    ]  # fmt: skip
    if count > 1:
        facts.append(("processes", f"{count}, each with its part of every step"))
    return facts


def parameters(count: int) -> str:
    """ "134.5 M parameters"."""
    return f"{count / 1e6:,.1f} M parameters" if count >= 1e6 else f"{count:,} parameters"


def adapter_in_words(model: Any) -> str:
    """ "LORA, r 16, alpha 32: scale 2, on 210 modules"."""
    found = targets(model)
    method = getattr(model.active_peft_config.peft_type, "value", model.active_peft_config.peft_type)
    words = [f"{method}"]
    for name, field in (("r", "r"), ("alpha", "alpha"), ("effective scale", "scale")):
        values = list(dict.fromkeys(v for t in found if (v := getattr(t, field))))
        if values:
            words.append(f"{name} {' or '.join(values[:4])}")
    return ", ".join(words) + f", on {sum(t.count for t in found)} modules"


def card_facts(config: Any, base: Any, data: Any, result: TrainResult, kept: int, advice: str = "") -> dict[str, str]:
    """What the model card lists; `advice`: what a sweep of ranks said, where one chose the rank."""
    own = {k: v for k, v in config.adapter.items() if not isinstance(v, dict)}
    settings = ", ".join(f"{k} {v}" for k, v in own.items())
    return {
        "Base model": f"{base.name}"
        + (f" at {config.revision}" if config.revision else "")
        + f", in {base.precision.name}",
        "Method": f"{config.method}" + (f" ({settings})" if settings else ""),
        "Rows": f"{len(data.examples):,} learned, {len(data.held_out):,} held out",
        "Steps": f"{result.step:,}" + (f"; the weights are of step {kept:,}, the best" if kept != result.step else ""),
        "Optimiser": f"{config.optimizer}, learning rate {config.learning_rate:g}, {config.lr_scheduler_type}",
        "Tokens": f"{result.tokens:,} in {span(result.seconds)}",
        **({"Rank": f"chosen by a short sweep. {advice}"} if advice else {}),
    }


def console_for(quiet: bool = False) -> Console:
    """Where tables go: stdout, in the terminal's width, or 100 columns where it is none."""
    import os

    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 100
    return Console(width=width, highlight=False, quiet=quiet)


def show_facts(console: Console, title: str, facts: Iterable[tuple[str, str]]) -> None:
    """A title, and a line for each fact."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(name, escape(value))
    console.print(f"[bold]{escape(title)}[/bold]")
    console.print(table)
    console.print()


def show_jobs(console: Console, folder: Path, base: Any, runs: Sequence[Any], tokens: int) -> None:
    """The header of jobs that are trained at once: what they share, and a line for each."""
    model = runs[0].model
    count = sum(p.numel() for p in base_tensors(model).values())
    device = next(model.parameters()).device.type
    facts = [
        ("model", f"{base.name}, {parameters(count)} in {base.precision.name} on {device} ({base.precision.why}); "
                  f"one for all {len(runs)} jobs"),
        ("passes", f"rows of several jobs together, up to {tokens:,} tokens"),
    ]  # fmt: skip
    show_facts(console, f"Jobs in {folder}", facts)
    table = Table("job", "adapter", "rows", "held out", "steps", "learning rate", box=None, header_style="dim",
                  padding=(0, 2, 0, 0), pad_edge=False)  # fmt: skip
    for run in runs:
        model.set_adapter(run.adapter)
        config, data = run.config, run.data
        rows = f"{config.per_device_train_batch_size * config.gradient_accumulation_steps}"
        table.add_row(
            escape(run.adapter), f"{adapter_in_words(model)}", f"{len(data.examples):,}", f"{len(data.held_out):,}",
            f"{len(run.batches):,} of {rows}", f"{config.learning_rate:g}, {config.lr_scheduler_type}",
        )  # fmt: skip
    console.print(table)
    console.print()


def show_outcomes(console: Console, outcomes: Mapping[str, tuple[Any, Any]]) -> None:
    """What became of each job: {name: (its run, its outcome)}."""
    table = Table("job", "steps", "loss", "held-out loss", "", box=None, header_style="dim", padding=(0, 2, 0, 0),
                  pad_edge=False)  # fmt: skip
    table.columns[4].overflow = "fold"
    for name, (run, outcome) in outcomes.items():
        result = outcome.result
        losses = [loss for _, loss in (*result.losses[:1], *result.losses[-1:])]
        held = [loss for _, loss in (*result.eval_losses[:1], *result.eval_losses[-1:])]
        where = f"{outcome.adapter}" + (f" (stopped: {result.stopped})" if result.stopped else "")
        table.add_row(
            escape(name), f"{result.step:,} of {len(run.batches):,}", " -> ".join(f"{x:.4f}" for x in losses),
            " -> ".join(f"{x:.4f}" for x in held),
            escape(where) if outcome.adapter else f"[red]{escape(result.stopped)}[/red]",
        )  # fmt: skip
    console.print()
    console.print(table)
    spent = sum(outcome.result.seconds for _, outcome in outcomes.values())
    tokens = sum(outcome.result.tokens for _, outcome in outcomes.values())
    console.print(f"\n{tokens:,} tokens in {span(spent)}, {tokens / max(spent, 1e-9):,.0f} tokens/s")


def show_translation(console: Console, translation: Translation, path: Path) -> None:
    """A file of another tool, line by line."""
    table = Table(translation.tool, "here", "", box=None, header_style="dim", padding=(0, 2, 0, 0), pad_edge=False)
    for column in table.columns:
        column.overflow = "fold"
    for line in translation.lines:
        table.add_row(escape(line.theirs), escape(line.ours) or "[dim]-[/dim]", f"[dim]{escape(line.note)}[/dim]")
    console.print(f"[bold]{escape(str(path))}[/bold] is a file of {translation.tool}. It is read as:")
    console.print(table)
    for note in translation.notes:
        console.print(f"[yellow]{escape(note)}[/yellow]")
    console.print()


def show_plan(console: Console, targets: list[Target], cost: Cost, steps: int) -> None:
    """The table of targets, and what the run would take."""
    table = Table("module", "", "kind", "r", "alpha", "trained", "why", box=None, header_style="dim",
                  padding=(0, 2, 0, 0), pad_edge=False)  # fmt: skip
    for column in (1, 3, 4, 5):
        table.columns[column].justify = "right"
    table.columns[0].overflow = table.columns[6].overflow = "fold"
    table.columns[0].min_width = min(max(len(t.name) for t in targets), max(20, console.width - 56))
    for t in targets:
        count = f"x {t.count}" if t.count > 1 else ""
        table.add_row(escape(t.name), count, t.kind, t.r, t.alpha, f"{t.trainable:,}", escape(t.why))
    console.print(table)
    console.print(f"\n{sum(t.trainable for t in targets):,} trainable parameters")
    console.print(f"{size(cost.memory)} of memory (measured on the longest batch, with the optimiser's state added)")
    console.print(
        f"{span(cost.seconds)} for {steps:,} steps, {cost.tokens_per_second:,.0f} tokens/s (a few were timed)"
    )
    console.print("\nNothing was trained or written: that was the plan.")


def show_end(console: Console, result: TrainResult, adapter: Path, kept: int, extra: dict[str, Any]) -> None:
    """Scores before and after, and where everything is.

    Args:
        kept: the step whose weights were saved.
        extra: {what: path} of the other files.
    """
    console.print()
    if result.scores:
        after = next((s for s in reversed(result.scores) if s[0] == kept), result.scores[-1])
        shown = [result.scores[0], after] if after is not result.scores[0] else [after]
        table = Table("held-out rows", *[f"step {step}" for step, _ in shown], box=None, header_style="dim",
                      padding=(0, 3, 0, 0), pad_edge=False)  # fmt: skip
        for name in shown[0][1]:
            values = [s.get(name) for _, s in shown]
            form = "{:.4f}" if name == "loss" else "{:.1%}"
            cells = [form.format(v) if v is not None else "" for v in values]
            table.add_row(name.replace("_", " "), *cells[:-1], f"[bold]{cells[-1]}[/bold]")
        console.print(table)
        console.print()
    weights = sum(f.stat().st_size for f in adapter.glob("*.safetensors"))
    facts = [("adapter", f"{adapter} ({size(weights)})"), *((k, str(v)) for k, v in extra.items() if v)]
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(name, escape(value))
    console.print(table)
    rate = f"{result.tokens_per_second:,.0f} tokens/s"
    console.print(f"[dim]{result.tokens:,} tokens in {span(result.seconds)}, {rate}[/dim]")


def span(seconds: float) -> str:
    """ "1:15 (min:s)"."""
    return f"{clock(seconds)} ({'h:min:s' if seconds >= 3600 else 'min:s'})"
