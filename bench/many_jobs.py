"""Many adapters trained at once (`train_many`) beside taking turns: tokens a second of all of them.

    python bench/many_jobs.py [--jobs 8] [--tokens 128] [--steps 2] [--blocks 7] [--chats] [--write]

SmolLM2-135M in fp32, r=16 on all linear layers, each job with rows of its own, one row of so many tokens a step. PEFT
and our own trainer have a model for each job over the same weights, so that nothing is switched between turns; a step
is forward, backward, clipping and AdamW. All arms run in one process, interleaved (ABBA). What `train_many` sets up
before the first step and takes down after the last is in its time. The floor is the frozen model's step on the rows of
all jobs in one pass: what no adapter can be trained below. That jobs come out as they do alone is tested in
tests/train/test_many.py. Where the processor multiplies bfloat16 faster, so that `--precision auto` takes it for the
base, both are also run with such a base.

Equal rows of which every token is learned leave nothing to gain but the shared pass. `--chats` has what users train
on: chats of mixed lengths (bench/end_to_end.py) of which the last answer is learned, as many in a step as make so many
tokens. PEFT has them as a Trainer's collator gives them: in random order, padded. We pack them into sequences of so
many tokens. Tokens are counted without padding.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.util
import random
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


def chats(jobs: int, tokens: int, steps: int) -> list[Any]:
    """{job: chats of at most so many tokens, enough for so many steps}."""
    import end_to_end
    from transformers import AutoTokenizer

    from trimtab.files.sources import resolve_base
    from trimtab.train.config import TrainConfig
    from trimtab.train.preparation import encode_data
    from trimtab.train.rows import Rows

    config = TrainConfig(model="smollm2-135m-instruct", train_on="last", system="", max_length=tokens, too_long="drop")
    tokenizer = AutoTokenizer.from_pretrained(resolve_base("smollm2-135m-instruct"))
    found = []
    for job in range(jobs):
        every = encode_data(config, tokenizer, Rows(end_to_end.chats("train.jsonl", 40 * steps, job)), None).examples
        mine: list[Any] = []
        while sum(len(example.ids) for example in mine) < tokens * steps:
            mine.append(every[len(mine)])
        found.append(mine)
    return found


def padded(examples: list[Any], tokens: int) -> list[dict[str, Any]]:
    """Batches in random order of as many rows as have `tokens` in the mean, padded."""
    from trimtab.train.data import collate

    count = max(1, round(tokens * len(examples) / sum(len(example.ids) for example in examples)))
    order = random.Random(0).sample(examples, len(examples))
    return [collate(order[i : i + count]) for i in range(0, len(order), count)]


def turns_of_peft(base: Any, data: list[Any], options: Any) -> Callable[[], None]:
    models = [adapted(base, SHAPE, "peft") for _ in data]
    own = [[p for p in model.parameters() if p.requires_grad] for model in models]
    optimizers = [torch.optim.AdamW(parameters, lr=1e-4) for parameters in own]
    batches = [padded(mine, options.tokens) for mine in data]

    def run() -> None:
        for n in range(max(map(len, batches))):
            for model, parameters, optimizer, mine in zip(models, own, optimizers, batches, strict=True):
                if n >= len(mine):
                    continue
                model(**mine[n], use_cache=False).loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

    return run


def batched(examples: list[Any], options: Any) -> Any:
    """As our trainer has them."""
    from trimtab.train.batches import Batches

    return Batches(examples, batch_size=1, epochs=1, packed=options.tokens if options.chats else 0)


def turns_of_ours(base: Any, data: list[Any], options: Any) -> Callable[[], None]:
    from trimtab.train.loop import train

    models = [adapted(base, SHAPE, "trimtab") for _ in data]
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-4) for m in models]

    def run() -> None:
        for model, optimizer, mine in zip(models, optimizers, data, strict=True):
            train(model, batched(mine, options), optimizer)

    return run


def together(base: Any, data: list[Any], options: Any) -> Callable[[], None]:
    from trimtab import Job, LoraConfig, get_peft_model, train_many

    names = [f"job{i}" for i in range(len(data))]
    fields = {"r": 16, "lora_alpha": 32, "target_modules": list(TARGETS["all"]), "task_type": "CAUSAL_LM"}
    config = LoraConfig(**fields)
    model = get_peft_model(copy.deepcopy(base, {id(p): p for p in base.parameters()}), config, adapter_name=names[0])

    def run() -> None:
        jobs = [
            Job(name, config, batched(mine, options), 1e-4, schedule="constant")
            for name, mine in zip(names, data, strict=True)
        ]
        train_many(model, jobs, tokens=options.pass_tokens)

    return run


def frozen(base: Any, data: list[Any], options: Any) -> Callable[[], None]:
    model, batches = floor(base), [batched(mine, options) for mine in data]

    def run() -> None:
        for n in range(max(map(len, batches))):
            rows = [own.tensors(batch)["input_ids"] for own in batches if n < len(own) for batch in own[n]]
            longest = max(ids.shape[1] for ids in rows)
            step(model, torch.cat([torch.nn.functional.pad(ids, (0, longest - ids.shape[1])) for ids in rows]))

    return run


TARGETS: dict[str, list[str]] = importlib.import_module("step").TARGETS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128, help="of each job's row")
    parser.add_argument("--pass-tokens", type=int, default=2048, help="of a shared pass")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--chats", action="store_true", help="chats of mixed lengths instead of equal rows")
    parser.add_argument("--write", action="store_true", help="write the table into docs/benchmarks.md")
    options = parser.parse_args()
    from trimtab.train.precision import choose

    base, _ = load(SimpleNamespace(dtype="float32", tokens=256))
    data = (chats if options.chats else rows)(options.jobs, options.tokens, options.steps)
    arms: dict[str, Callable[[], None]] = {}
    if importlib.util.find_spec("peft"):
        arms["PEFT, in turns"] = turns_of_peft(base, data, options)
    arms["trimtab, in turns"] = turns_of_ours(base, data, options)
    arms["trimtab, at once"] = together(base, data, options)
    arms["floor: the frozen model, at once"] = frozen(base, data, options)
    if choose("auto", torch.device("cpu")).name == "bf16":
        half, _ = load(SimpleNamespace(dtype="bfloat16", tokens=256))
        if importlib.util.find_spec("peft"):
            arms["PEFT, in turns, bf16 base"] = turns_of_peft(half, data, options)
        arms["trimtab, at once, bf16 base"] = together(half, data, options)
        arms["floor: the frozen model, at once, bf16"] = frozen(half, data, options)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    for block in range(options.blocks + 1):
        for name in arms if block % 2 else list(arms)[::-1]:
            times[name].append(clocks(arms[name]))
        print(f"block {block} of {options.blocks}", flush=True)
    first, count = next(iter(arms)), sum(len(example.ids) for mine in data for example in mine)
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
    what = f"{'chats, ' * options.chats}{options.tokens} tokens a step each"
    title = f"{options.jobs} adapters trained, {what}, SmolLM2-135M, fp32 if not said, r=16"
    if options.write:
        name = f"many_jobs{'-chats' * options.chats}-{options.jobs}x{options.tokens}"
        write(name, title, table(head, table_rows))
    else:
        print(f"{title}\n\n{table(head, table_rows)}")


if __name__ == "__main__":
    main()
