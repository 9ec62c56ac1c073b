"""Many adapters trained at once (`train_many`) beside taking turns: tokens a second of all of them.

    python bench/many_jobs.py [--jobs 8] [--tokens 128] [--steps 2] [--blocks 7] [--write]

SmolLM2-135M in fp32, r=16 on all linear layers, each job with rows of its own, one row of so many tokens a step. PEFT
and our own trainer have a model for each job over the same weights, so that nothing is switched between turns; a step
is forward, backward, clipping and AdamW. All arms run in one process, interleaved (ABBA). What `train_many` sets up
before the first step and takes down after the last is in its time. The floor is the frozen model's step on the rows of
all jobs in one pass: what no adapter can be trained below. That jobs come out as they do alone is tested in
tests/train/test_many.py. Where the processor multiplies bfloat16 faster, so that `--precision auto` takes it for the
base, both are also run with such a base.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.util
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from common import clocks, ratio
from step import adapted, floor, load, step

warnings.filterwarnings("ignore")
SHAPE = SimpleNamespace(rank=16, dropout=0.0, targets="all")


def rows(jobs: int, tokens: int, steps: int) -> list[Any]:
    """{job: its examples, a row for each step}."""
    from trimtab.train.example import Example

    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 49000, (jobs, steps, tokens), generator=draw).tolist()
    return [[Example(row, row, 0) for row in mine] for mine in ids]


def turns_of_peft(base: Any, data: list[Any]) -> Callable[[], None]:
    models = [adapted(base, SHAPE, "peft") for _ in data]
    own = [[p for p in model.parameters() if p.requires_grad] for model in models]
    optimizers = [torch.optim.AdamW(parameters, lr=1e-4) for parameters in own]

    def run() -> None:
        for n in range(len(data[0])):
            for model, parameters, optimizer, mine in zip(models, own, optimizers, data, strict=True):
                ids = torch.tensor([mine[n].ids])
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

    return run


def turns_of_ours(base: Any, data: list[Any]) -> Callable[[], None]:
    from trimtab.train.batches import Batches
    from trimtab.train.loop import train

    models = [adapted(base, SHAPE, "trimtab") for _ in data]
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-4) for m in models]

    def run() -> None:
        for model, optimizer, mine in zip(models, optimizers, data, strict=True):
            train(model, Batches(mine, batch_size=1, epochs=1), optimizer)

    return run


def together(base: Any, data: list[Any], tokens: int) -> Callable[[], None]:
    from trimtab import Job, LoraConfig, get_peft_model, train_many
    from trimtab.train.batches import Batches

    names = [f"job{i}" for i in range(len(data))]
    fields = {"r": 16, "lora_alpha": 32, "target_modules": list(TARGETS["all"]), "task_type": "CAUSAL_LM"}
    config = LoraConfig(**fields)
    model = get_peft_model(copy.deepcopy(base, {id(p): p for p in base.parameters()}), config, adapter_name=names[0])

    def run() -> None:
        jobs = [
            Job(name, config, Batches(mine, batch_size=1, epochs=1), 1e-4, schedule="constant")
            for name, mine in zip(names, data, strict=True)
        ]
        train_many(model, jobs, tokens=tokens)

    return run


def frozen(base: Any, data: list[Any]) -> Callable[[], None]:
    model = floor(base)

    def run() -> None:
        for rows in zip(*data, strict=True):
            step(model, torch.tensor([row.ids for row in rows]))

    return run


TARGETS: dict[str, list[str]] = importlib.import_module("step").TARGETS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128, help="of each job's row")
    parser.add_argument("--pass-tokens", type=int, default=2048, help="of a shared pass")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--write", action="store_true", help="write the table into docs/benchmarks.md")
    options = parser.parse_args()
    from trimtab.train.precision import choose

    base, _ = load(SimpleNamespace(dtype="float32", tokens=256))
    data = rows(options.jobs, options.tokens, options.steps)
    arms: dict[str, Callable[[], None]] = {}
    if importlib.util.find_spec("peft"):
        arms["PEFT, in turns"] = turns_of_peft(base, data)
    arms["trimtab, in turns"] = turns_of_ours(base, data)
    arms["trimtab, at once"] = together(base, data, options.pass_tokens)
    arms["floor: the frozen model, at once"] = frozen(base, data)
    if choose("auto", torch.device("cpu")).name == "bf16":
        half, _ = load(SimpleNamespace(dtype="bfloat16", tokens=256))
        if importlib.util.find_spec("peft"):
            arms["PEFT, in turns, bf16 base"] = turns_of_peft(half, data)
        arms["trimtab, at once, bf16 base"] = together(half, data, options.pass_tokens)
        arms["floor: the frozen model, at once, bf16"] = frozen(half, data)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    for block in range(options.blocks + 1):
        for name in arms if block % 2 else list(arms)[::-1]:
            times[name].append(clocks(arms[name]))
        print(f"block {block} of {options.blocks}", flush=True)
    first, count = next(iter(arms)), options.jobs * options.steps * options.tokens
    table_rows: list[list[object]] = []
    for name in times:
        cells: list[object] = [name]
        for clock in (0, 1):
            own, other = ([t[clock] for t in times[arm][1:]] for arm in (name, first))
            middle, low, high = ratio(other, own)
            cells += [f"{count / sorted(own)[len(own) // 2]:.0f}", f"{middle:.2f} [{low:.2f}, {high:.2f}]"]
        table_rows.append(cells)
    from report import table, write

    head = ["", "tokens/s", f"over {first}", "tokens per processor second", f"over {first}"]
    title = (
        f"{options.jobs} adapters trained, {options.tokens} tokens a step each, SmolLM2-135M, fp32 if not said, r=16"
    )
    if options.write:
        write(f"many_jobs-{options.jobs}x{options.tokens}", title, table(head, table_rows))
    else:
        print(f"{title}\n\n{table(head, table_rows)}")


if __name__ == "__main__":
    main()
