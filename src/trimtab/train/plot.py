"""The loss of a run as a picture."""

from __future__ import annotations

import os
from pathlib import Path

from trimtab.core.extras import need
from trimtab.train.loop import TrainResult


def plot_losses(result: TrainResult, path: str | os.PathLike[str], title: str = "") -> Path:
    """Write a PNG (or SVG, PDF: by suffix) of training and held-out loss against the step.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    need("A loss plot", "matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")  # not pyplot: no global state, no display
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps, losses = zip(*result.losses, strict=True) if result.losses else ((), ())
    width = max(1, len(losses) // 20)
    smooth = [sum(losses[max(0, i - width + 1) : i + 1]) / min(i + 1, width) for i in range(len(losses))]
    axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=1)
    axes.plot(steps, smooth, color="tab:blue", label="training" + (f" (mean of {width} steps)" if width > 1 else ""))
    held_out = result.eval_losses
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color="tab:orange", marker="o", label="held out")
        for step, loss in {held_out[0], held_out[-1]}:
            axes.annotate(f"{loss:.3f}", (step, loss), xytext=(0, 6), textcoords="offset points", ha="center")
    axes.set(xlabel="step", ylabel="loss (nats a token)", title=title)
    axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
    axes.grid(alpha=0.3)
    axes.legend()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path
