"""Every method on one real task: quality, parameters, time, memory and file, each at its best learning rate.

    python bench/methods.py [--quick] [--write] [--only NAME ...]

The task: addresses into JSON (examples/data/addresses), SmolLM2-135M. The measure: loss in nats a trained token
on rows that were held out. Every method has its own defaults, and the learning rate that is best of one small grid, the
same for all; at that rate it is trained again from other seeds. The runs of a method are trained at once over one base
(`train_many`), or one after the other where `check_jobs` says that they cannot be. Each method is a process of its own,
and its result a line of a file: what is there already is not measured again (--results FILE, --again).

--quick: few steps, to see that all of it works. Without it: about a minute a method on a core.
Time: processor seconds of a step of the method trained alone, the median, over LoRA's in the same process. Memory: the
most that such a step has allocated at a time.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import report
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trimtab import Job, get_peft_model
from trimtab.errors import ConfigError, NoMatchingPeftModuleError
from trimtab.files.sources import resolve_base
from trimtab.methods import METHODS, capabilities, config_class, load
from trimtab.rank.sweep.trainers import train_serially, train_together
from trimtab.train import loop
from trimtab.train.batches import Batches
from trimtab.train.config import TrainConfig
from trimtab.train.evaluate import evaluate_loss
from trimtab.train.events import MethodSteps
from trimtab.train.loop import Event, Run
from trimtab.train.many import check_jobs
from trimtab.train.preparation import prepare_data

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "examples" / "data" / "addresses"
QUICK = {"dtype": "bfloat16", "steps": 2, "rows": 2, "held_out": 4, "rates": [2e-3, 1e-2], "seeds": [0, 1]}
FULL = {
    "dtype": "bfloat16",
    "steps": 10,
    "rows": 2,
    "held_out": 12,
    "rates": [2e-3, 1e-2, 5e-2, 2.5e-1],
    "seeds": [0, 1],
}
TIMED = 2  # steps of the method trained by itself, after the first
FIRST = "LORA"  # what the others are relative to
ALONE = "is trained among other adapters, or on what this base does not have"
LEFT_OUT = {"XLORA": ALONE, "LORA (arrow_config)": ALONE, "LORA (use_qalora)": ALONE, "TRAINABLE_TOKENS": ALONE}


def names() -> dict[str, tuple[str, dict[str, Any]]]:
    """{method: (peft_type, the fields it needs)}."""
    found = {}
    for facts in capabilities():
        kind, _, field = facts.method.partition(" ")
        file, cls, _ = METHODS[kind]
        place = load(file, "VARIANTS")[field.strip("()")].split(":") if field else (file, cls)
        found[facts.method] = (kind, dict(load(*place).example))
    return {FIRST: found.pop(FIRST), **found}


def peak(run: Any) -> float:
    """The most that is allocated at a time in a call beside what was there before, in MB."""
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))) / 2**20


class Clock(Event):
    """Processor seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def before(self, run: Run) -> None:
        self.since = time.process_time()

    def step(self, run: Run) -> None:
        self.seconds.append(time.process_time() - self.since)


class Ends(Event):
    """Calls a function with the model when a run has done its last step."""

    def __init__(self, end: Callable[[Any], None]) -> None:
        self.end = lambda run: end(run.model)  # type: ignore[method-assign]


class OneTask(Event):
    """Rows say their task, to a method that asks: all are of one."""

    def begin(self, run: Run) -> None:
        model: Any = run.model
        asks = any("task_ids" in a.method.extras for a in model.graft.adapters.values())
        if asks and "forward" not in vars(model):
            plain = model.forward
            model.forward = lambda **inputs: plain(**inputs, task_ids=torch.zeros(len(inputs["input_ids"]), dtype=int))


class Task:
    """The base, and the rows."""

    def __init__(self, settings: dict[str, Any]) -> None:
        torch.manual_seed(0)
        folder = resolve_base("smollm2-135m-instruct")
        self.base = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, settings["dtype"]))
        config = TrainConfig(data=str(DATA / "train.jsonl"), eval_data=str(DATA / "valid.jsonl"), system="")
        data = prepare_data(config, AutoTokenizer.from_pretrained(folder))
        self.examples, self.held_out = data.examples, data.held_out[: settings["held_out"]]
        self.settings = settings
        self.targets: dict[str, str] = {}  # where the method's own select nothing in this base

    def config(self, name: str) -> Any:
        """The method's config: its defaults, and what it needs."""
        kind, fields = names()[name]
        if "total_step" in {f.name for f in dataclasses.fields(config_class(kind))}:
            fields = {**fields, "total_step": self.settings["steps"], "tinit": 1, "tfinal": 1}
        return config_class(kind)(task_type="CAUSAL_LM", **copy.deepcopy({**fields, **self.targets}))

    def batches(self, seed: int, steps: int) -> Batches:
        return Batches(self.examples, batch_size=self.settings["rows"], max_steps=steps, seed=seed)

    def score(self, model: Any) -> float:
        return evaluate_loss(model, self.held_out).loss

    def alone(self, name: str, more: dict[str, Any] | None = None) -> float:
        """The median of a step's processor seconds, of the method trained by itself; the rest goes into `more`."""
        torch.manual_seed(0)
        try:
            model = get_peft_model(self.base, self.config(name))
        except NoMatchingPeftModuleError:
            self.targets = {"target_modules": "all-linear"}
            model = get_peft_model(self.base, self.config(name))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0)
        train = lambda steps, *events: loop.train(
            model, self.batches(0, steps), optimizer, [MethodSteps(), OneTask(), *events], seed=0
        )
        train(TIMED + 1, clock := Clock())
        if more is not None:
            more["trained"], more["targets"] = model.get_nb_trainable_parameters()[0], self.targets
            more["memory"] = peak(lambda: train(1))
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                more["file"] = sum(p.stat().st_size for p in Path(folder).rglob("adapter_model.*"))
        model.unload(pristine=True)
        return statistics.median(clock.seconds[1:])

    def tune(self, name: str, runs: Sequence[tuple[float, int]]) -> tuple[list[float | None], str]:
        """The held-out loss of each (rate, seed), None where it diverged; and why they were not trained at once."""
        losses: dict[int, float] = {}
        steps = self.settings["steps"]
        jobs = [
            Job(
                f"run{i}", self.config(name), self.batches(seed, steps), rate, warmup_steps=steps // 10, seed=seed,
                events=[MethodSteps(), OneTask(), Ends(lambda model, i=i: losses.update({i: self.score(model)}))],
            )
            for i, (rate, seed) in enumerate(runs)
        ]  # fmt: skip
        try:
            check_jobs(jobs)
            results, why = train_together(self.base, jobs), ""
        except ConfigError as e:
            results, why = train_serially(self.base, jobs), str(e)
        for job in jobs:
            if results[job.name].failed:
                print(f"{name} at {job.learning_rate}: {results[job.name].stopped}", file=sys.stderr)
        return [x if (x := losses.get(i)) is not None and math.isfinite(x) else None for i in range(len(jobs))], why


def measure(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """All figures of one method."""
    task = Task(settings)
    found: dict[str, Any] = {"method": name, "settings": settings}
    if name == FIRST:
        found["start"] = task.score(task.base)
    beside = task.alone(FIRST)  # in the same process, since processors are not always equally fast
    found["time"] = task.alone(name, found) / beside
    first, *others = settings["seeds"]
    losses, found["why"] = task.tune(name, [(rate, first) for rate in settings["rates"]])
    found["losses"] = dict(zip(map(str, settings["rates"]), losses, strict=True))
    finite = [(loss, rate) for loss, rate in zip(losses, settings["rates"], strict=True) if loss is not None]
    if not finite:
        raise RuntimeError("it diverges at every rate of the grid")
    least, found["rate"] = min(finite)
    more, _ = task.tune(name, [(found["rate"], seed) for seed in others])
    found["seeds"] = [least, *(x for x in more if x is not None)]
    found["diverged"] = more.count(None)
    return found


def read(path: Path, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The results in a file, of these settings."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = [json.loads(line) for line in lines]
    return {x["method"]: x for x in found if x["settings"] == settings}


def table(results: dict[str, dict[str, Any]]) -> str:
    """The page's table, best first."""
    done = {n: x for n, x in results.items() if "seeds" in x}
    rows: list[list[object]] = []
    for name, x in sorted(done.items(), key=lambda item: statistics.mean(item[1]["seeds"])):
        loss = f"{statistics.mean(x['seeds']):.3f}" + (
            f" ± {statistics.stdev(x['seeds']):.3f}" if x["seeds"][1:] else ""
        )
        edge = {min(x["settings"]["rates"]): " ↓", max(x["settings"]["rates"]): " ↑"}.get(x["rate"], "")
        memory = f"{x['memory'] / done[FIRST]['memory']:.2f}" if FIRST in done else ""
        mark, runs = " \\*" if x["targets"] else "", "one by one" if x["why"] else "at once"
        size = f"{x['file'] / 1000:,.0f} KB"
        rows.append(
            [name + mark, loss, f"{x['rate']:g}{edge}", runs, f"{x['trained']:,}", f"{x['time']:.2f}", memory, size]
        )
    head = ["method", "held-out loss", "rate", "runs", "trained", "step / LoRA's", "memory / LoRA's", "file"]
    start = f"The base's loss is {done[FIRST]['start']:.3f}. " if FIRST in done else ""
    marks = (
        f"{start}Mean and standard deviation over the seeds. ↓, ↑: the best rate is the least, or the greatest, of the "
        "grid, and one beyond it might be better. *Runs*: those of a method are trained at once, in shared passes, or "
        "one by one, where a batch cannot have rows of several. Step and memory are those of the method alone; "
        "LoRA's own row, against itself, says how much a step's time varies."
    )
    if any(x["targets"] for x in done.values()):
        marks += " \\*: on all linear layers, since its own targets are none in this base."
    out = {**LEFT_OUT, **{name: x["left_out"] for name, x in results.items() if "left_out" in x}}
    missing = [name for name in names() if name not in results and name not in out]
    rest = [f"Left out. {'; '.join(map(': '.join, out.items()))}."] + [f"Not measured: {', '.join(missing)}."] * bool(
        missing
    )
    return "\n\n".join([marks, report.table(head, rows), *rest])


def short(name: str) -> str:
    """A method's name in the plot: a variant's class."""
    kind, _, field = name.partition(" ")
    return load(METHODS[kind][0], "VARIANTS")[field.strip("()")].split(":")[1].lower() if field else kind.lower()


def plot(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Held-out loss against trained parameters."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    start = results[FIRST]["start"]
    done = {n: (x["trained"], statistics.mean(x["seeds"]), x["seeds"]) for n, x in results.items() if "seeds" in x}
    shown = {n: x for n, x in done.items() if x[1] < start}
    for name, (trained, y, seeds) in shown.items():
        axes.vlines(trained, min(seeds), max(seeds), color="0.75", lw=1, zorder=1)
        axes.plot(
            trained, y, "o", color="tab:orange" if name == FIRST else "tab:blue", ms=4, zorder=3 if name == FIRST else 2
        )
    axes.axhline(start, color="0.5", lw=0.8, ls="--")
    axes.annotate(
        "the base", (0.995, start), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8, color="0.4"
    )
    axes.set(xscale="log", yscale="log", xlabel="trained parameters", ylabel="held-out loss (nats a token)")
    least = min(y for _, y, _ in shown.values())
    axes.set_ylim(least * 0.93, start * 1.07)
    ticks = [t for t in (0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1, 1.5, 2, 3) if least * 0.93 < t < start * 1.07]
    axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
    axes.set_yticks([], minor=True)
    above = [short(n) for n in done if n not in shown]
    axes.set_title(f"worse than the base: {', '.join(above)}" if above else "", fontsize=8)
    axes.grid(alpha=0.3)
    figure.draw_without_rendering()  # the scales are settled
    label(axes, {short(n): (x, y) for n, (x, y, _) in shown.items()})
    figure.savefig(path, dpi=150)


def label(axes: Any, points: dict[str, tuple[float, float]], size: int = 7) -> None:
    """Names beside points, each at the nearest place where it covers no point and no other name, with a line to it."""
    from matplotlib.transforms import Bbox

    places = {name: axes.transData.transform(p) for name, p in points.items()}
    pixels = axes.figure.dpi / 72
    taken = [Bbox.from_bounds(x - 3, y - 3, 6, 6) for x, y in places.values()]
    for name, (x, y) in sorted(places.items(), key=lambda item: -item[1][1]):
        width, height = len(name) * size * 0.62 * pixels, size * 1.25 * pixels
        turns = [(r, k * math.pi / 8) for r in range(6, 160, 6) for k in (0, 1, 15, 8, 4, 12, 2, 14, *range(3, 14))]
        for r, turn in turns:
            dx, dy = r * math.cos(turn) * 1.4, r * math.sin(turn)
            left = x + dx - (width if dx < -1 else width / 2 if abs(dx) <= 1 else 0)
            box = Bbox.from_bounds(left, y + dy - height / 2, width, height)
            inside = axes.bbox.x0 < box.x0 and box.x1 < axes.bbox.x1 and axes.bbox.y0 < box.y0 and box.y1 < axes.bbox.y1
            if inside and not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)
        line = {"arrowstyle": "-", "color": "0.6", "lw": 0.5, "shrinkA": 0, "shrinkB": 2} if r > 12 else None
        at = ((box.x0 - x) / pixels, (box.y0 + box.y1) / 2 / pixels - y / pixels)
        axes.annotate(name, points[name], at, textcoords="offset points", fontsize=size, va="center", arrowprops=line)


def one(name: str, options: Any, settings: dict[str, Any]) -> None:
    """Measure a method in a process of its own, and note the result."""
    start = time.monotonic()
    found: dict[str, Any] = {"method": name, "settings": settings}
    if name in LEFT_OUT:
        found["left_out"] = LEFT_OUT[name]
    else:
        command = [sys.executable, "-W", "ignore", __file__, "--one", name, *(["--quick"] if options.quick else [])]
        done = subprocess.run(command, capture_output=True, text=True)
        lines = [x for x in done.stdout.splitlines() if x.startswith("RESULT ")]
        if lines:
            found = json.loads(lines[-1].removeprefix("RESULT "))
        else:
            found["left_out"] = (done.stderr.strip().splitlines() or ["no result"])[-1][:200]
        print(done.stderr[-2000:] if "left_out" in found else "", end="", file=sys.stderr)
    with options.results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(found) + "\n")
    said = found.get("left_out") or f"{statistics.mean(found['seeds']):.3f} at {found['rate']}"
    print(f"{name}: {said} ({time.monotonic() - start:.0f} s)", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps, a small grid")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these methods")
    parser.add_argument("--results", type=Path, default=ROOT / "runs" / "methods.jsonl")
    parser.add_argument("--again", action="store_true", help="measure anew what is there")
    parser.add_argument("--write", action="store_true", help="write table and plot into docs/")
    parser.add_argument("--processes", type=int, default=1, help="methods that are measured side by side")
    parser.add_argument("--table", action="store_true", help="of what is there; measure nothing")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    settings = QUICK if options.quick else FULL
    warnings.filterwarnings("ignore")
    if options.one:
        print("RESULT " + json.dumps(measure(options.one, settings)))
        return
    options.results.parent.mkdir(parents=True, exist_ok=True)
    known = {} if options.again else read(options.results, settings)
    wanted = [n for n in options.only or names() if n not in known]
    if not options.table:
        with ThreadPoolExecutor(options.processes) as pool:
            list(pool.map(lambda name: one(name, options, settings), wanted))
    results = read(options.results, settings)
    steps = f"{settings['steps']} steps of {settings['rows']} rows"
    title = f"Every method on one task: addresses into JSON, SmolLM2-135M, {settings['dtype']}, {steps}"
    if options.write:
        plot(results, ROOT / "docs" / "methods.png")
        report.write("methods", title, f"{table(results)}\n\n![loss against parameters](methods.png)")
    else:
        print(f"{title}\n\n{table(results)}")


if __name__ == "__main__":
    main()
