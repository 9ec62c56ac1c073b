"""What a sweep says in words: one sentence of what to take, and what one should know beside it."""

from __future__ import annotations

import math
from typing import Any

from trimtab.rank.sweep.result import Curve, Point, Score


def advice(curve: Curve, base: Score, predicted: int) -> str:
    """What to take, why, and what the rule of capacity said beforehand.

    Args:
        base: of the untrained model.
        predicted: the rank whose parameters are as many as the tokens to learn from, on the layers that are advised.
    """
    point, verdict = curve.chosen, curve.verdict
    if curve.best.loss >= base.loss:
        return (
            f"Nothing was learned: the best run, {named(curve, curve.best)}, has a held-out loss of "
            f"{curve.best.loss:.4f}, and the untrained model {base.loss:.4f}. Try other learning rates, more steps or "
            "more rows before another rank."
        )
    said = f"Take {named(curve, point)} with lora_alpha={point.setting.alpha} and a learning rate of {point.rate:g}"
    loss = f"its held-out loss is {point.loss:.4f}"
    if len(curve.points) == 1:
        reason = f": it is the only one that was finished; {loss}."
    elif point is curve.best:
        reason = (
            f": {loss}, the best of all." if not verdict.flat else f": {loss}, the best of all, and it is the smallest."
        )
    else:
        margin = verdict.margins[verdict.chosen]
        reason = (
            f": {loss}, within the noise (±{margin:.4f}) of the best, {curve.best.loss:.4f} of "
            f"{named(curve, curve.best)}."
        )
    return said + reason + _shape(curve) + _prediction(curve, predicted)


def _shape(curve: Curve) -> str:
    """How the curve runs."""
    verdict, ranks = curve.verdict, sorted({p.setting.rank for p in curve.points})
    if len(ranks) < 2:
        return ""
    if verdict.flat:
        seen = max((m for m in verdict.margins if math.isfinite(m)), default=0.0)
        return (
            f" The curve is flat: no rank up to {ranks[-1]} is better than r={curve.chosen.setting.rank} by more than "
            f"noise, so capacity is not the limit here, as far as these seeds and rows show: differences below "
            f"{seen:.4f} are not seen."
        )
    if verdict.open:
        return f" The curve still falls at r={ranks[-1]}, the largest that was tried: try larger ones."
    below = [p for p in curve.points if p.parameters < curve.chosen.parameters]
    worse = max(below, key=lambda p: p.parameters)
    lost = worse.loss - curve.best.loss
    return f" Below it quality is lost: {named(curve, worse)} is worse by {lost:.4f} ({lost / curve.best.loss:.1%})."


def _prediction(curve: Curve, predicted: int) -> str:
    """The rule of capacity, and whether it agrees."""
    rank = curve.chosen.setting.rank
    said = f" By its size alone (a parameter for each token trained on) the task asks for r={predicted}"
    if predicted == rank:
        return f"{said}, as was measured."
    return f"{said}; measured was {'less' if rank < predicted else 'more'}."


def take(point: Point, method: str) -> dict[str, Any]:
    """The advice as settings of a training run."""
    setting = point.setting
    return {
        "method": method,
        "r": setting.rank,
        "lora_alpha": setting.alpha,
        "target_modules": setting.targets,
        "learning_rate": point.rate,
    }


def named(curve: Curve, point: Point) -> str:
    """A setting by what tells it from the others."""
    setting = point.setting
    words = f"r={setting.rank}"
    if len({p.setting.alpha for p in curve.points}) > 1:
        words += f" (alpha {setting.alpha})"
    if len({p.setting.targets for p in curve.points}) > 1:
        words += f" on {setting.targets}"
    return words


def remarks(curves: list[Curve], failed: dict[str, str], base: Score, seeds: int) -> list[str]:
    """What one should know beside the advice."""
    found = [f"{name}: no run could be finished ({why})." for name, why in failed.items()]
    last = curves[-1]
    edges = [p for p in last.points if p.edge]
    for what, pick in (("lowest", min), ("highest", max)):
        some = [named(last, p) for p in edges if p.rate == pick(p.tried)]
        if some:
            found.append(f"The {what} learning rate was the best for {', '.join(some)}: one beyond it might be better.")
    if seeds < 2:
        found.append("One seed each: what another seed would change is not known, only what other rows would.")
    if last.chosen.general - base.general > 0.05:
        found.append(
            f"On general text the loss of {named(last, last.chosen)} rose from {base.general:.3f} to "
            f"{last.chosen.general:.3f}: so much was forgotten."
        )
    short = [p for p in last.points if len(p.runs) < seeds]
    found += [f"{named(last, p)}: only {len(p.runs)} of {seeds} seeds were finished." for p in short]
    if math.isnan(last.verdict.spread) and seeds > 1:
        found.append("No rank has two finished seeds: the spread over them is not known.")
    return found
