"""Generation of a batch whose rows have different adapters: tokens a second over the base's, ours and PEFT's.

    python bench/mixed_generation.py [--dtype float32] [--rows 32] [--new 16] [--blocks 5] [--write]

SmolLM2-135M, r=16 on all linear layers, prompts of 32 tokens, greedy; as many adapters as rows, all loaded. The arms:
the base; one adapter that is not merged, for all rows; every row its own adapter. All run in one process on one copy of
the base's weights, interleaved (ABBA); the second base says what the machine's noise makes of equal arms. Before
anything is timed each mixed row is compared with the same row run alone, with its adapter made the active one.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import warnings
from types import SimpleNamespace
from typing import Any

import torch
from common import clocks, ratio
from decode import generate
from step import TARGETS, adapted, load
from torch import Tensor, nn

warnings.filterwarnings("ignore")


def fill(model: nn.Module, names: list[str], library: str) -> None:
    """Add the adapters, with the same numbers in both libraries."""
    module: Any = importlib.import_module(library)
    for name in names:
        config = module.LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS["all"], task_type="CAUSAL_LM")
        model.add_adapter(name, config)  # type: ignore[operator]
        model.set_adapter(name)  # type: ignore[operator]
        seed = torch.Generator().manual_seed(names.index(name))
        for key, parameter in model.named_parameters():
            if f".{name}." in key:
                parameter.data.normal_(std=0.02, generator=seed)


@torch.no_grad()
def mixed(model: nn.Module, ids: Tensor, names: list[str], new: int) -> Tensor:
    found: Tensor = model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        adapter_names=names,
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
    )
    return found[:, ids.shape[1] :]


@torch.no_grad()
def check(model: Any, ids: Tensor, names: list[str], new: int, exact: bool) -> str:
    """Every mixed row's tokens, and its logits at the prompt's end, beside those of the row alone.

    Raises:
        SystemExit: they differ by more than roundings (tokens: in bfloat16 near ties fall either way).
    """
    tokens, logits = mixed(model, ids, names, new), model(input_ids=ids, adapter_names=names).logits[:, -1]
    same, worst = 0, 0.0
    for i, name in enumerate(names):
        model.set_adapter(name)
        own = model(input_ids=ids[[i]]).logits[0, -1]
        worst = max(worst, float((own - logits[i]).abs().max() / own.abs().max()))
        same += int(torch.equal(generate(model, ids[[i]], new)[0], tokens[i]))
    said = f"{same} of {len(names)} rows have the tokens of the row alone; logits {worst:.1e} apart (relative)"
    if worst > (1e-4 if exact else 0.05) or (exact and same < len(names)):
        raise SystemExit(said)
    return said


def build(base: nn.Module, names: list[str]) -> dict[str, Any]:
    """The adapted models of the libraries that are there."""
    shape = SimpleNamespace(rank=16, dropout=0.0, targets="all")
    models = {}
    for library in ("peft", "trimtab"):
        if importlib.util.find_spec(library):
            models[library] = adapted(base, shape, library).eval()
            fill(models[library], names, library)
            models[library].eval()
    return models


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="write the table into docs/benchmarks.md")
    options = parser.parse_args()
    base, _ = load(SimpleNamespace(dtype=options.dtype, tokens=256))
    base.eval()
    names = [f"task{i}" for i in range(options.rows)]
    models = build(base, names)
    ids = torch.randint(0, 49000, (options.rows, 32), generator=torch.Generator().manual_seed(0))
    said = {k: check(m, ids, names, options.new, options.dtype == "float32") for k, m in models.items()}
    for library, line in said.items():
        print(f"{library}: {line}", flush=True)
    plain = functools.partial(generate, base, ids, options.new)
    arms: dict[str, Any] = {"base": plain}
    for library, model in models.items():
        model.set_adapter(names[0])
        arms[f"{library}, one adapter"] = functools.partial(generate, model, ids, options.new)
        arms[f"{library}, {options.rows} adapters"] = functools.partial(mixed, model, ids, names, options.new)
    arms["base again"] = plain
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    for block in range(options.blocks + 1):
        for name in arms if block % 2 else list(arms)[::-1]:
            times[name].append(clocks(arms[name]))
    rows: list[list[object]] = []
    for name, found in times.items():
        cells: list[object] = [name]
        for clock in (0, 1):
            own, bare = ([t[clock] for t in arm[1:]] for arm in (found, times["base"]))
            middle, low, high = ratio(bare, own)
            speed = options.rows * options.new / sorted(own)[len(own) // 2]
            cells += [f"{speed:.1f}", f"{middle:.2f} [{low:.2f}, {high:.2f}]"]
        rows.append(cells)
    from report import table, write

    head = ["", "tokens/s", "of the base's", "tokens per processor second", "of the base's"]
    title = f"Generation of {options.rows} rows, each with its own adapter, SmolLM2-135M, {options.dtype}, r=16"
    text = f"{table(head, rows)}\n\nRows beside the same rows alone: {'; '.join(f'{k}: {v}' for k, v in said.items())}."
    if options.write:
        write(f"mixed_generation-{options.dtype}", title, text)
    else:
        print(f"{title}\n\n{text}")


if __name__ == "__main__":
    main()
