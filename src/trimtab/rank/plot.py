"""A survey as a picture: a map of the effective ranks, layer by module, and the spectra beside it."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from trimtab.core.extras import need
from trimtab.rank.survey import LayerSpectrum, Survey, by_module, medians

COLOURS = ("#2a78d6", "#1baf7a", "#eda100", "#4a3aa7", "#e34948", "#e87ba4", "#008300", "#eb6834", "#888888")


def plot_survey(survey: Survey, path: str | os.PathLike[str]) -> Path:
    """Write a PNG (or SVG, PDF: by suffix) of a survey.

    Maps show how many singular values hold 90 % of each layer's energy, how large its change is, and, where the base
    was known, its intruder dimensions. The curves are the spectra, relative to the largest value of each layer.

    Raises:
        MissingPackageError: matplotlib is not installed (`pip install 'trimtab[demo]'`).
    """
    need("A plot", "matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    modules = by_module(survey.layers, lambda x: x.path)
    rows = sorted({-1 if x.layer is None else x.layer for x in survey.layers})
    maps = [("singular values for\n90 % of the energy", lambda x: float(x.effective.energy90), "viridis")]
    relative = any(x.relative is not None for x in survey.layers)
    change = (lambda x: 100 * x.relative) if relative else (lambda x: x.norm)
    maps.append(("size of the change,\n‖dW‖" + (" in % of ‖W‖" if relative else ""), change, "magma"))
    title = f"{survey.method} adapter in {survey.source}, {survey.parameters:,} parameters"
    if any(x.intruders for x in survey.layers):
        maps.append(("intruder\ndimensions", lambda x: float(x.intruders or 0), "Reds"))
    elif relative:
        title += ", no intruder dimensions"
    width = max(2.6, 0.9 + 0.55 * len(modules))
    height = min(12.0, max(4.2, 1.9 + 0.24 * len(rows)))
    figure = Figure(figsize=(width * len(maps) + 5.2, height), layout="constrained")  # not pyplot: no global state
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(maps) + 1, width_ratios=[width] * len(maps) + [5.2])
    for ax, (name, value, colours) in zip(axes, maps, strict=False):
        _map(figure, ax, modules, rows, value, name, colours)
    axes[0].set_ylabel("layer", fontsize=9)
    _curves(axes[-1], modules)
    figure.suptitle(title, fontsize=10)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=150)
    return target


def _map(figure: Any, ax: Any, modules: dict[str, list[LayerSpectrum]], rows: list[int], value: Any, name: str,
         colours: str) -> None:  # fmt: skip
    """One number of every layer: a row a block, a column a module."""
    grid = [[math.nan] * len(modules) for _ in rows]
    for column, layers in enumerate(modules.values()):
        for layer in layers:
            grid[rows.index(-1 if layer.layer is None else layer.layer)][column] = value(layer)
    top = max((v for row in grid for v in row if not math.isnan(v)), default=0.0)
    image = ax.imshow(grid, aspect="auto", cmap=colours, vmin=0, vmax=top or 1, interpolation="nearest")
    ax.set_title(name, fontsize=9)
    ax.set_xticks(range(len(modules)), modules, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    every = max(1, round(len(rows) / 16))
    ticks = [i for i in range(len(rows)) if rows[i] < 0 or rows[i] % every == 0]
    ax.set_yticks(ticks, ["none" if rows[i] < 0 else str(rows[i]) for i in ticks], fontsize=8)
    ax.set_xticks([i - 0.5 for i in range(1, len(modules))], minor=True)
    ax.set_yticks([i - 0.5 for i in range(1, len(rows))], minor=True)
    ax.grid(which="minor", color="white", linewidth=0.6)
    ax.tick_params(which="both", length=0)
    bar = figure.colorbar(image, ax=ax, shrink=0.7, pad=0.02)
    bar.ax.tick_params(labelsize=8)
    if all(math.isnan(v) or v == round(v) for row in grid for v in row):  # counts
        bar.ax.yaxis.get_major_locator().set_params(integer=True)
    if len(rows) * len(modules) <= 240:
        for i, row in enumerate(grid):
            for j, v in enumerate(row):
                if not math.isnan(v):
                    dark = (v / top if top else 0) < 0.55
                    light_map = colours == "Reds"
                    ax.text(j, i, _short(v), ha="center", va="center", fontsize=6.5,
                            color="white" if dark != light_map else "black")  # fmt: skip


def _curves(ax: Any, modules: dict[str, list[LayerSpectrum]]) -> None:
    """The spectrum of each module, the median over its layers."""
    longest = 1
    for i, (name, layers) in enumerate(modules.items()):
        points = medians(layers)
        longest = max(longest, len(points))
        marker = "o" if len(points) <= 32 else None
        colour = COLOURS[i % len(COLOURS)]
        ax.plot(range(1, len(points) + 1), points, color=colour, linewidth=1.6, marker=marker, markersize=3, label=name)
    ax.set(ylim=(0, 1.03), xlim=(0.5, longest + 0.5))
    ax.set_xlabel("singular value", fontsize=9)
    ax.set_ylabel("relative to the largest", fontsize=9)
    ax.set_title("spectra,\nmedian over the layers", fontsize=9)
    ax.tick_params(labelsize=8)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25)
    ax.legend(fontsize=8, frameon=False, loc="upper right")


def _short(value: float) -> str:
    return (
        str(round(value))
        if value >= 9.95 or value == round(value)
        else f"{value:.1f}"
        if value >= 0.095
        else f"{value:.2g}"
    )
