"""A sweep of ranks against the same configurations one after the other, each to its end, with our own trainer.

    python bench/rank_sweep.py [--data examples/data/addresses] [--rows 96] [--epochs 1] [--ranks 1,4,16] [--seeds 2]

Both score every run that is trained to its end on the same rows. Printed are the seconds of either, and whether they
agree on which ranks lie within the noise of the best. In the reference a rank's learning rate is the one whose mean
loss over the seeds is the lowest.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from trimtab.rank.sweep.noise import judge
from trimtab.rank.sweep.result import Point
from trimtab.rank.sweep.run import Prepared, prepare_sweep
from trimtab.rank.sweep.space import Space, Trial
from trimtab.rank.sweep.trainers import train_serially
from trimtab.train.config import TrainConfig
from trimtab.train.report import console_for


def prepared(options: Any, folder: str, rows: Path, **more: Any) -> Prepared:
    config = TrainConfig(
        model=options.model, data=str(rows), eval_data=f"{options.data}/valid.jsonl", system="", output=folder,
        num_train_epochs=options.epochs, per_device_train_batch_size=options.batch, precision=options.precision,
    )  # fmt: skip
    ranks = tuple(int(r) for r in options.ranks.split(","))
    targets = (options.targets,)
    return prepare_sweep(config, Space(ranks=ranks, seeds=options.seeds, targets=targets), **more)


def one_by_one(whole: Prepared) -> list[Point]:
    """Every rank, rate and seed to its end; the points of the curve."""
    work = whole.work
    work.store.begin()
    work.scorer.whole(work.base.model)
    space, first = work.space, work.config.seed
    seeds = range(first, first + space.seeds)
    work.run([Trial(s, rate, seed) for s in whole.settings for rate in space.rates for seed in seeds], search=False)
    points = []
    for setting in whole.settings:
        every = []
        for rate in space.rates:
            outcomes = [work.store.outcomes[Trial(setting, rate, seed).name] for seed in seeds]
            every.append(Point(setting, rate, {}, tuple(outcomes)))
        points.append(min(every, key=lambda p: p.loss))
    return points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--data", default="examples/data/addresses")
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--ranks", default="1,4,16")
    parser.add_argument("--targets", default="all-linear")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--precision", default="fp32")
    options = parser.parse_args()
    quiet = console_for(quiet=True)
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        lines = Path(options.data, "train.jsonl").read_text(encoding="utf-8").splitlines()
        rows.write_text("\n".join(lines[: options.rows]), encoding="utf-8")
        sweep = prepared(options, f"{folder}/sweep", rows)
        began = time.perf_counter()
        found = sweep.run(0, quiet)
        swept = time.perf_counter() - began
        print(f"the sweep: {swept:,.1f} s; {found.advice}", flush=True)
        reference = prepared(options, f"{folder}/reference", rows, train=train_serially)
        began = time.perf_counter()
        points = one_by_one(reference)
        serial = time.perf_counter() - began
    verdict = judge([p.measured() for p in points])
    ours, theirs = found.curve.verdict, verdict
    print(f"one after the other: {serial:,.1f} s")
    for own, other in zip(found.curve.points, points, strict=True):
        print(
            f"  r={own.setting.rank}: rate {own.rate:g}, loss {own.loss:.4f}; one after the other: rate "
            f"{other.rate:g}, loss {other.loss:.4f}"
        )
    ranks = [p.setting.rank for p in points]
    print(f"within the noise: {[ranks[i] for i in ours.within]} and {[ranks[i] for i in theirs.within]}")
    print(f"ratio: {swept / serial:.2f}")


if __name__ == "__main__":
    main()
