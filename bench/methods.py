"""Every method on one real task: quality, parameters, time, memory and file, each at its best learning rate.

    python bench/methods.py [--quick] [--write] [--only NAME ...]

The task: addresses into JSON (examples/data/addresses), SmolLM2-135M. The measure: loss in nats a trained token
on rows that were held out. Every method has its own defaults, and the learning rate that is best of one small grid, the
same for all; at that rate it is trained again from other seeds. Each method is a process of its own, and its result a
line of a file: what is there already is not measured again (--results FILE, --again).

--quick: few steps, a small grid, two seeds, the base in bfloat16: half a minute to a minute a method on two free cores.
Without it: a quarter of an hour a method, in fp32.
Time: processor seconds of a step, the median. Memory: the most that a step has allocated at a time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "examples" / "data" / "addresses"
QUICK = {
    "dtype": "bfloat16",
    "steps": 6,
    "rows": 2,
    "held_out": 12,
    "rates": [2e-3, 1e-2, 5e-2],
    "seeds": [0, 1],
}
FULL = {
    "dtype": "float32",
    "steps": 120,
    "rows": 4,
    "held_out": 100,
    "rates": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2],
    "seeds": [0, 1, 2],
}
FIRST = "LORA"  # what the others are relative to
ALONE = "is trained among other adapters, or on what this base does not have"
LEFT_OUT = {"XLORA": ALONE, "LORA (arrow_config)": ALONE, "LORA (use_qalora)": ALONE, "TRAINABLE_TOKENS": ALONE}


def names() -> dict[str, tuple[str, dict[str, Any]]]:
    """{method: (peft_type, the fields it needs)}."""
    from trimtab.methods import METHODS, capabilities, load

    found = {}
    for facts in capabilities():
        kind, _, field = facts.method.partition(" ")
        file, cls, _ = METHODS[kind]
        place = load(file, "VARIANTS")[field.strip("()")].split(":") if field else (file, cls)
        found[facts.method] = (kind, dict(load(*place).example))
    return {FIRST: found.pop(FIRST), **found}


def peak(run: Any) -> float:
    """The most that is allocated at a time in a call beside what was there before, in MB."""
    import torch

    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))) / 2**20


class Task:
    """The base, and the rows."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from trimtab.files.sources import resolve_base
        from trimtab.train.config import TrainConfig
        from trimtab.train.preparation import prepare_data

        torch.manual_seed(0)
        folder = resolve_base("smollm2-135m-instruct")
        self.base = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, settings["dtype"]))
        config = TrainConfig(data=str(DATA / "train.jsonl"), eval_data=str(DATA / "valid.jsonl"), system="")
        data = prepare_data(config, AutoTokenizer.from_pretrained(folder))
        self.examples, self.held_out = data.examples, data.held_out[: settings["held_out"]]
        self.settings = settings

    def adapted(self, kind: str, fields: dict[str, Any], seed: int) -> Any:
        import torch

        from trimtab import get_peft_model
        from trimtab.methods import config_class

        torch.manual_seed(seed)
        if "total_step" in fields:
            fields = {**fields, "total_step": self.settings["steps"] + 1, "tinit": 1, "tfinal": 1}
        model = get_peft_model(self.base, config_class(kind)(task_type="CAUSAL_LM", **fields))
        if "task_ids" in model.graft.adapters["default"].method.extras:  # all rows are of one task
            run = model.forward
            model.forward = lambda **inputs: run(**inputs, task_ids=torch.zeros(len(inputs["input_ids"]), dtype=int))
        return model

    def score(self, model: Any) -> float:
        from trimtab.train.evaluate import evaluate_loss

        return evaluate_loss(model, self.held_out).loss

    def train(self, model: Any, rate: float, seed: int) -> list[float]:
        """Train with AdamW, warmed up over a tenth of the steps; processor seconds of each step."""
        import torch

        from trimtab.train.batches import Batches
        from trimtab.train.data import collate
        from trimtab.train.loss import batch_loss

        steps = self.settings["steps"]
        batches = Batches(self.examples, batch_size=self.settings["rows"], max_steps=steps, seed=seed)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
        model.train()
        seconds = []
        for t in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (t + 1) / max(1, steps // 10)) * (1 - t / steps)
            start = time.process_time()
            for batch in batches[t]:
                batch_loss(model, collate([self.examples[i] for i in batch.rows])).backward()
            torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seconds.append(time.process_time() - start)
        model.eval()
        return seconds


def measure(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """All figures of one method."""
    kind, fields = names()[name]
    task = Task(settings)
    found: dict[str, Any] = {"method": name, "settings": settings, "losses": {}}
    for rate in settings["rates"]:
        model = task.adapted(kind, fields, settings["seeds"][0])
        found["trained"] = model.get_nb_trainable_parameters()[0]
        if name == FIRST and "start" not in found:
            found["start"] = task.score(model.eval())
        try:
            seconds = task.train(model, rate, settings["seeds"][0])
            found["losses"][str(rate)] = task.score(model)
            found["seconds"] = statistics.median(seconds[1:])
        except Exception as error:  # a rate at which it diverges is a result, too
            if not found["losses"] and rate == settings["rates"][-1]:
                raise
            found["losses"][str(rate)] = None
            print(f"{name} at {rate}: {error}", file=sys.stderr)
        model.unload(pristine=True)
    finite = {r: x for r, x in found["losses"].items() if x is not None and x == x}
    found["rate"] = float(min(finite, key=finite.get))  # type: ignore[arg-type]
    found["seeds"] = [finite[str(found["rate"])]]
    for seed in settings["seeds"][1:]:
        model = task.adapted(kind, fields, seed)
        task.train(model, found["rate"], seed)
        found["seeds"].append(task.score(model))
        if seed != settings["seeds"][-1]:
            model.unload(pristine=True)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        found["file"] = sum(p.stat().st_size for p in Path(folder).rglob("adapter_model.*"))
    task.settings = {**settings, "steps": 1}
    found["memory"] = peak(lambda: task.train(model, found["rate"], 0))
    return found


def read(path: Path, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The results in a file, of these settings."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = [json.loads(line) for line in lines]
    return {x["method"]: x for x in found if x["settings"] == settings}


def table(results: dict[str, dict[str, Any]]) -> str:
    """The page's table, best first."""
    import report

    done = {n: x for n, x in results.items() if "seeds" in x}
    lora, rows = done.get(FIRST), []
    for name, x in sorted(done.items(), key=lambda item: statistics.mean(item[1]["seeds"])):
        spread = f" ± {statistics.stdev(x['seeds']):.3f}" if len(x["seeds"]) > 1 else ""
        relative = [f"{x[k] / lora[k]:.2f}" if lora and lora[k] > 0 else "" for k in ("seconds", "memory")]
        file = f"{x['file'] / 1000:,.0f} KB"
        rows.append(
            [name, f"{statistics.mean(x['seeds']):.3f}{spread}", x["rate"], f"{x['trained']:,}", *relative, file]
        )
    text = report.table(
        ["method", "held-out loss", "rate", "trained", "step / LoRA's", "memory / LoRA's", "file"], rows
    )
    out = [f"{name}: {x['left_out']}" for name, x in results.items() if "left_out" in x]
    start = f"The base's loss is {lora['start']:.3f}. " if lora else ""
    if lora and lora["settings"] == QUICK:
        start = "So few steps tell how fast a method learns, not where it ends. " + start
    return f"{start}Mean and standard deviation over the seeds.\n\n{text}\n\nLeft out. {'; '.join(out)}."


def plot(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Held-out loss against trained parameters."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    above = [n for n, x in results.items() if "seeds" in x and statistics.mean(x["seeds"]) > results[FIRST]["start"]]
    for name, x in results.items():
        if "seeds" in x and name not in above:
            y = statistics.mean(x["seeds"])
            error = statistics.stdev(x["seeds"]) if len(x["seeds"]) > 1 else 0
            axes.errorbar(x["trained"], y, error, fmt="o", color="tab:orange" if name == FIRST else "tab:blue", ms=4)
            axes.annotate(name.lower(), (x["trained"], y), xytext=(4, 3), textcoords="offset points", fontsize=6)
    axes.set(xscale="log", xlabel="trained parameters", ylabel="held-out loss (nats a token)")
    axes.set(ylim=(0, results[FIRST]["start"] * 1.05), title=f"worse than the base, not shown: {', '.join(above)}")
    axes.title.set_fontsize(7)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps, a small grid")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these methods")
    parser.add_argument("--results", type=Path, default=ROOT / "runs" / "methods.jsonl")
    parser.add_argument("--again", action="store_true", help="measure anew what is there")
    parser.add_argument("--write", action="store_true", help="write table and plot into docs/")
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
    for i, name in enumerate(wanted):
        start = time.monotonic()
        found: dict[str, Any] = {"method": name, "settings": settings}
        if name in LEFT_OUT:
            found["left_out"] = LEFT_OUT[name]
        else:
            command = [sys.executable, __file__, "--one", name, *(["--quick"] if options.quick else [])]
            done = subprocess.run(command, capture_output=True, text=True)
            lines = [x for x in done.stdout.splitlines() if x.startswith("RESULT ")]
            if lines:
                found = json.loads(lines[-1].removeprefix("RESULT "))
            else:
                found["left_out"] = (done.stderr.strip().splitlines() or ["no result"])[-1][:200]
        with options.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
        said = found.get("left_out") or f"{statistics.mean(found['seeds']):.3f} at {found['rate']}"
        print(f"{i + 1}/{len(wanted)} {name}: {said} ({time.monotonic() - start:.0f} s)", file=sys.stderr, flush=True)
    import report

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
