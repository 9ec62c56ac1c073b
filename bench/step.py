"""A LoRA training step on SmolLM2-135M over the frozen model's: time and memory, ours and PEFT's.

    python bench/step.py [--dtype float32] [--dropout 0] [--tokens 1024] [--rank 16] [--targets all] [--write]
    python bench/step.py --grid [--dtype float32] [--blocks 5] [--write]   # many of them, see bench/grid.py

The floor is the model with every weight frozen and a gradient for the embeddings' output, at the same loss. All arms
run in one process on one copy of the base's weights, interleaved (ABBA); the second floor says what the machine's noise
makes of equal arms. Loss and gradients are compared with PEFT's before anything is timed. Memory is measured in a fresh
process for each arm.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib
import importlib.util
import subprocess
import sys
import warnings
from types import SimpleNamespace
from typing import Any

import torch
from common import clocks, memory_of, ratio
from torch import Tensor, nn

warnings.filterwarnings("ignore")

TARGETS = {
    "all": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "qv": ["q_proj", "v_proj"],
}


def floor(base: nn.Module) -> nn.Module:
    model = copy.deepcopy(base, {id(p): p for p in base.parameters()})
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_())
    return model.train()


def adapted(base: nn.Module, options: Any, library: str) -> nn.Module:
    module = importlib.import_module(library)
    shared = copy.deepcopy(base, {id(p): p for p in base.parameters()})
    config = module.LoraConfig(
        r=options.rank,
        lora_alpha=2 * options.rank,
        lora_dropout=options.dropout,
        target_modules=TARGETS[options.targets],
        task_type="CAUSAL_LM",
    )
    return module.get_peft_model(shared, config).train()


def step(model: nn.Module, ids: Tensor, fused_loss: bool = False) -> Tensor:
    if fused_loss:
        from trimtab.core.kernels import linear_cross_entropy

        causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        hidden = causal.model(input_ids=ids, use_cache=False).last_hidden_state
        loss = linear_cross_entropy(hidden[:, :-1], causal.lm_head.weight, ids[:, 1:])
    else:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach()


def arms(options: Any) -> dict[str, Any]:
    """How each arm is built and stepped: name -> (build, whether the loss is fused, too)."""
    return {
        "floor": (floor, False),
        "PEFT": (lambda base: adapted(base, options, "peft"), False),
        "trimtab": (lambda base: adapted(base, options, "trimtab"), False),
        "trimtab, fused loss": (lambda base: adapted(base, options, "trimtab"), True),
        "floor, fused loss": (floor, True),
        "floor again": (floor, False),
    }


def load(options: Any) -> tuple[nn.Module, Tensor]:
    from transformers import AutoModelForCausalLM

    from trimtab.files.sources import resolve_base

    folder = resolve_base("smollm2-135m-instruct")
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, options.dtype))
    length = min(256, options.tokens)
    ids = torch.randint(0, 49000, (options.tokens // length, length), generator=torch.Generator().manual_seed(0))
    return base.requires_grad_(False), ids


def check_parity(base: nn.Module, ids: Tensor, options: Any) -> str:
    """How far loss and gradients are from PEFT's, with its factors and without dropout."""
    dry = SimpleNamespace(**{**vars(options), "dropout": 0.0})
    theirs, mine = adapted(base, dry, "peft"), adapted(base, dry, "trimtab")
    parts = [{n: p for n, p in model.named_parameters() if p.requires_grad} for model in (mine, theirs)]
    pairs = [(parts[0][name], parts[1][name]) for name in parts[1]]
    for own, other in pairs:
        other.data.normal_(std=0.02, generator=torch.Generator().manual_seed(len(own)))
        own.data.copy_(other.data)
    losses = step(mine, ids[:1]), step(theirs, ids[:1])
    gradient, wanted = (torch.cat([p[i].grad.flatten() for p in pairs]) for i in (0, 1))
    error = float((gradient - wanted).norm() / wanted.norm())
    limit = 1e-4 if options.dtype == "float32" else 0.15  # in bfloat16 both are that far from the truth
    if error > limit or abs(float(losses[0] - losses[1])) > limit:
        raise SystemExit(f"No parity with PEFT: losses {losses}, gradients {error:.1e} apart.")
    return f"loss {float(losses[0]):.4f} and {float(losses[1]):.4f}, gradients {error:.1e} apart"


def memory(arm: str, options: Any) -> tuple[float, float]:
    """See `common.memory_of`."""
    base, ids = load(options)
    build, fused = arms(options)[arm]
    model = build(base)

    def run() -> None:
        step(model, ids, fused)
        model.zero_grad(set_to_none=True)

    return memory_of(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", default="all", choices=TARGETS)
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--arms", nargs="*", help="only these (the floors always)")
    parser.add_argument("--grid", action="store_true", help="many lengths, ranks, targets and dropouts")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--write", action="store_true", help="write the table into docs/benchmarks.md")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print(*memory(options.memory_of, options))
        return
    if options.grid:
        import grid

        grid.run(options)
        return
    base, ids = load(options)
    known = arms(options)
    names = [n for n in known if not options.arms or n in options.arms or n in ("floor", "floor again")]
    names = [n for n in names if n != "PEFT" or importlib.util.find_spec("peft")]
    if "PEFT" in names:
        print(check_parity(base, ids, options), file=sys.stderr)
    models = {name: known[name][0](base) for name in names}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for block in range(options.blocks + 1):
        for name in names if block % 2 else names[::-1]:
            times[name].append(clocks(functools.partial(step, models[name], ids, known[name][1])))
            models[name].zero_grad(set_to_none=True)
        print(f"block {block} of {options.blocks}", file=sys.stderr)
    times = {name: found[1:] for name, found in times.items()}  # the first block warms up
    del models
    command = [sys.executable, *sys.argv, "--memory-of"]
    peaks = {}
    for name in names if not options.no_memory else ():
        out = subprocess.run([*command, name], check=True, capture_output=True, text=True).stdout
        peaks[name] = [float(mb) for mb in out.splitlines()[-1].split()]
    report(options, times, peaks)


def report(options: Any, times: dict[str, list[tuple[float, float]]], peaks: dict[str, list[float]]) -> None:
    from report import table, write

    rows: list[list[object]] = []
    for name in times:
        cells: list[object] = [name]
        for clock in (0, 1):
            own, base = ([t[clock] for t in times[n]] for n in (name, "floor"))
            middle, low, high = ratio(own, base)
            cells += [f"{sorted(own)[len(own) // 2]:.2f} s", f"{middle:.3f} [{low:.3f}, {high:.3f}]"]
        cells += (
            [f"{own - base:+.0f} MB" for own, base in zip(peaks[name], peaks["floor"], strict=True)] if peaks else []
        )
        rows.append(cells)
    head = ["", "step", "over the floor", "processor time", "over the floor"]
    head += ["resident over the floor", "allocated over the floor"] if peaks else []
    what = f"r={options.rank}, {options.targets} linear layers, {options.tokens} tokens, dropout {options.dropout:g}"
    title = f"A LoRA step on SmolLM2-135M, {options.dtype}, {what}"
    if options.write:
        write(f"step-{options.dtype}-{options.dropout:g}", title, table(head, rows))
    else:
        print(f"{title}\n\n{table(head, rows)}")


if __name__ == "__main__":
    main()
