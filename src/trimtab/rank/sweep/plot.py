"""A sweep as a picture: loss against rank with the knee marked, and the map of rank against rows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from trimtab.core.extras import need
from trimtab.rank.plot import COLOURS
from trimtab.rank.sweep.result import Curve, Point, Sweep


def plot_sweep(found: Sweep, path: str | os.PathLike[str]) -> Path:
    """Write a PNG (or SVG, PDF: by suffix) of a sweep.

    Each dot is a run; the line goes through the mean over seeds, the band is within the noise of the best, and the ring
    marks what is advised. Below it stands the loss on general text.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    need("A plot", "matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    mapped = len(found.curves) > 1
    figure = Figure(figsize=(12.5 if mapped else 7.5, 6.2), layout="constrained")  # not pyplot: no global state
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2 if mapped else 1, height_ratios=[3, 1])
    above = figure.add_subplot(grid[0, 0])
    below = figure.add_subplot(grid[1, 0], sharex=above)
    _curves(above, below, found)
    if mapped:
        _map(figure, figure.add_subplot(grid[:, 1]), found)
    title = f"{found.model} on {Path(found.data).name or found.data}"
    figure.suptitle(f"{title}: {found.rows:,} rows, {found.steps:,} steps, {found.held_out:,} held out", fontsize=10)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=150)
    return target


def _curves(above: Any, below: Any, found: Sweep) -> None:
    """Held-out and general loss of every curve; a curve is one set of layers, alpha and number of rows."""
    lines = [(curve, points) for curve in found.curves for points in _lines(curve)]
    for i, (curve, points) in enumerate(lines):
        colour = COLOURS[i % len(COLOURS)]
        ranks = [p.setting.rank for p in points]
        above.plot(ranks, [p.loss for p in points], color=colour, linewidth=1.8, label=_label(found, curve, points[0]))
        for p in points:
            above.plot([p.setting.rank] * len(p.losses), p.losses, "o", color=colour, markersize=4, alpha=0.7)
        below.plot(ranks, [p.general for p in points], color=colour, linewidth=1.4, marker="o", markersize=3)
        if curve.chosen in points:
            _knee(above, curve, colour)
    last = found.curve
    margin = max((m for m in last.verdict.margins if m == m), default=0.0)
    if margin:
        of = f" of {last.rows:,} rows" if len(found.curves) > 1 else ""
        band = {"color": "0.5", "alpha": 0.13, "linewidth": 0, "label": f"within the noise of the best{of}"}
        above.axhspan(last.best.loss, last.best.loss + margin, **band)
    below.axhline(found.base.general, color="0.4", linewidth=1, linestyle="--")
    below.annotate("untrained", (1, found.base.general), xycoords=("axes fraction", "data"), xytext=(-4, 3),
                   textcoords="offset points", ha="right", fontsize=7, color="0.3")  # fmt: skip
    ranks = sorted({p.setting.rank for c in found.curves for p in c.points})
    above.set_xscale("log", base=2)
    above.set_xticks(ranks, [str(r) for r in ranks])
    above.minorticks_off()
    above.tick_params(labelbottom=False)
    above.set_ylabel("held-out loss (nats a token)", fontsize=9)
    below.set_ylabel("general text", fontsize=9)
    below.set_xlabel("rank r", fontsize=9)
    below.margins(y=0.3)
    for ax in (above, below):
        ax.tick_params(labelsize=8)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
    above.legend(fontsize=8, frameon=False)


def _lines(curve: Curve) -> list[list[Point]]:
    """The points of a curve by alpha and set of layers, in the order of their ranks."""
    found: dict[tuple[str, float], list[Point]] = {}
    for p in curve.points:
        found.setdefault((p.setting.targets, p.setting.alpha), []).append(p)
    return [sorted(points, key=lambda p: p.setting.rank) for points in found.values()]


def _label(found: Sweep, curve: Curve, point: Point) -> str:
    every = [p.setting for c in found.curves for p in c.points]
    words = [point.setting.targets]
    if len({s.alpha for s in every}) > 1:
        words.append(f"alpha {point.setting.alpha}")
    if len(found.curves) > 1:
        words.append(f"{curve.rows:,} rows")
    return ", ".join(words)


def _knee(ax: Any, curve: Curve, colour: str) -> None:
    """The ring around what is advised."""
    point = curve.chosen
    at = (point.setting.rank, point.loss)
    ax.plot(*at, "o", markersize=15, markerfacecolor="none", markeredgecolor=colour, markeredgewidth=2)
    ax.annotate(f"r={point.setting.rank}, rate {point.rate:g}", at, xytext=(12, 12), textcoords="offset points",
                fontsize=8, color=colour)  # fmt: skip


def _map(figure: Any, ax: Any, found: Sweep) -> None:
    """How much worse than the best of its number of rows each rank is; the best alpha and set of layers of each."""
    ranks = sorted({p.setting.rank for c in found.curves for p in c.points})
    grid = []
    for rank in ranks:
        row = []
        for curve in found.curves:
            some = [p.loss for p in curve.points if p.setting.rank == rank]
            row.append(min(some) - curve.best.loss if some else float("nan"))
        grid.append(row)
    top = max((v for row in grid for v in row if v == v), default=0.0) or 1.0
    image = ax.imshow(grid, aspect="auto", cmap="viridis_r", vmin=0, vmax=top, origin="lower", interpolation="nearest")
    for i, row in enumerate(grid):
        for j, value in enumerate(row):
            if value == value:
                knee = found.curves[j].chosen.setting.rank == ranks[i]
                ax.text(j, i, f"{value:.4f}", ha="center", va="center", fontsize=8, weight="bold" if knee else "normal",
                        color="white" if value > 0.5 * top else "black")  # fmt: skip
                if knee:
                    ax.plot(j, i, "o", markersize=38, markerfacecolor="none", markeredgecolor="#e34948",
                            markeredgewidth=2)  # fmt: skip
    ax.set_xticks(range(len(found.curves)), [f"{c.rows:,}" for c in found.curves], fontsize=8)
    ax.set_yticks(range(len(ranks)), [str(r) for r in ranks], fontsize=8)
    ax.set_xlabel("rows to learn from", fontsize=9)
    ax.set_ylabel("rank r", fontsize=9)
    ax.set_title("held-out loss above the best of the same rows; rings: what is advised", fontsize=9)
    figure.colorbar(image, ax=ax, shrink=0.7, pad=0.02).ax.tick_params(labelsize=8)
