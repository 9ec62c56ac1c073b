"""Time and memory of one training step of each method on SmolLM2-135M, relative to LoRA's, ours and PEFT's.

    python bench/method_step.py [--all-linear] [--tokens 256] [--rounds N] [--only NAME ...] [--write]

--all-linear: the methods that form a delta or a rotation anew in each step, on every linear layer, which on the whole
model takes PEFT minutes a step: so on its first four blocks, with random weights and without the head, which has no
adapter and would be most of the step. Without it: all kinds, on q and v of the whole model.

Time: all arms in one process on one copy of the base's weights, interleaved forwards and backwards (ABBA), medians of
processor seconds; PEFT / ours is the median of the rounds' ratios, of steps one right after the other, with quartiles.
Memory: each arm in a fresh process: the growth of the peak resident size over two steps, which differs by tens of MB
between equal runs, and the most that a step allocates, which does not.
Without the `peft` package the columns of PEFT stay empty.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import statistics
import subprocess
import sys
import time
import warnings
from typing import Any

from common import memory_of

warnings.filterwarnings("ignore")

LINEAR = ["q_proj", "v_proj"]  # of each block
BLOCKS = 4  # with --all-linear
NORMS = ["input_layernorm", "post_attention_layernorm", "norm"]
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA r16": ("LoraConfig", {"r": 16, "target_modules": LINEAR}),
    "DoRA r16": ("LoraConfig", {"r": 16, "target_modules": LINEAR, "use_dora": True}),
    "IA3": ("IA3Config", {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "VeRA r256": ("VeraConfig", {"r": 256, "target_modules": LINEAR}),
    "OFT block 32": ("OFTConfig", {"oft_block_size": 32, "target_modules": LINEAR}),
    "LoHa r8": ("LoHaConfig", {"r": 8, "target_modules": LINEAR}),
    "AdaLoRA r12": (
        "AdaLoraConfig",
        {"init_r": 12, "total_step": 1000, "tinit": 200, "tfinal": 500, "target_modules": LINEAR},
    ),
    "LN tuning": ("LNTuningConfig", {"target_modules": NORMS}),
    "prompt tuning 16": ("PromptTuningConfig", {"num_virtual_tokens": 16}),
    "prefix tuning 16": ("PrefixTuningConfig", {"num_virtual_tokens": 16}),
}
EVERYWHERE: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA r16": ("LoraConfig", {"r": 16}),
    "LoHa r8": ("LoHaConfig", {"r": 8}),
    "LoKr r8": ("LoKrConfig", {"r": 8}),
    "HiRA r8": ("HiraConfig", {"r": 8}),
    "FourierFT 1000": ("FourierFTConfig", {"n_frequency": 1000}),
    "WaveFT 1000": ("WaveFTConfig", {"n_frequency": 1000}),
    "C3A block 64": ("C3AConfig", {"block_size": 64}),
    "SHiRA r8": ("ShiraConfig", {"r": 8}),
    "RandLoRA r32": ("RandLoraConfig", {"r": 32}),
    "VeRA r256": ("VeraConfig", {"r": 256}),
    "OFT block 32": ("OFTConfig", {"oft_block_size": 32}),
    "BOFT block 4": ("BOFTConfig", {"boft_block_size": 4}),
    "HRA r8": ("HRAConfig", {"r": 8}),
    "RoAd": ("RoadConfig", {}),
    "PSOFT r32": ("PsoftConfig", {"r": 32}),
    "DeLoRA r8": ("DeloraConfig", {"r": 8}),
    "GraLoRA r32": ("GraloraConfig", {"r": 32}),
    "MiSS r64": ("MissConfig", {"r": 64}),
}


def methods(everywhere: bool) -> dict[str, tuple[str, dict[str, Any]]]:
    """The methods of a run."""
    if not everywhere:
        return METHODS
    return {name: (cls, {**fields, "target_modules": "all-linear"}) for name, (cls, fields) in EVERYWHERE.items()}


def small_model() -> Any:
    """The model's first blocks, with random weights and without the head."""
    import torch
    from transformers import AutoConfig, AutoModel

    from trimtab.files.sources import resolve_base

    config = AutoConfig.from_pretrained(resolve_base("smollm2-135m-instruct"))
    config.num_hidden_layers = BLOCKS
    torch.manual_seed(0)
    return AutoModel.from_config(config, dtype=torch.float32)


def base_model() -> Any:
    from transformers import AutoModelForCausalLM

    from trimtab.files.sources import resolve_base

    return AutoModelForCausalLM.from_pretrained(resolve_base("smollm2-135m-instruct"))


def adapted(library: str, method: str, base: Any, everywhere: bool) -> Any:
    """A model with the method's adapter, on the base's own weight tensors."""
    name, fields = methods(everywhere)[method]
    module = __import__(library)
    shared = copy.deepcopy(base, {id(p): p for p in base.parameters()})
    task = None if everywhere else "CAUSAL_LM"
    return module.get_peft_model(shared, getattr(module, name)(task_type=task, **fields)).train()


def step(model: Any, ids: Any, everywhere: bool) -> None:
    if everywhere:
        model(input_ids=ids).last_hidden_state.square().mean().backward()
    else:
        model(input_ids=ids, labels=ids).loss.backward()
    model.zero_grad(set_to_none=True)


def batch(tokens: int) -> Any:
    import torch

    torch.manual_seed(0)
    return torch.randint(0, 49000, (2, tokens // 2))


def memory(library: str, method: str, tokens: int, everywhere: bool) -> tuple[float, float]:
    """See `common.memory_of`."""
    base = small_model() if everywhere else base_model()
    model, ids = adapted(library, method, base, everywhere), batch(tokens)
    return memory_of(lambda: step(model, ids, everywhere))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, help="of each arm a step (default 5, with --all-linear 20)")
    parser.add_argument(
        "--all-linear", action="store_true", help="recomputed deltas and rotations on every linear layer"
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these methods")
    parser.add_argument("--write", action="store_true", help="write the table into docs/benchmarks.md")
    parser.add_argument("--memory-of", nargs=2, metavar=("LIBRARY", "METHOD"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print(*memory(*options.memory_of, options.tokens, options.all_linear))
        return
    everywhere = options.all_linear
    first, *others = methods(everywhere)
    chosen = [first, *(m for m in others if not options.only or m in options.only)]
    libraries = ["trimtab"] + (["peft"] if importlib.util.find_spec("peft") else [])
    base, ids = small_model() if everywhere else base_model(), batch(options.tokens)
    arms = {(library, m): adapted(library, m, base, everywhere) for m in chosen for library in libraries}
    times: dict[tuple[str, str], list[float]] = {arm: [] for arm in arms}
    rounds = options.rounds or (20 if everywhere else 5)
    for round_ in range(rounds + 1):
        order = list(arms) if round_ % 2 else list(reversed(arms))
        for arm in order:
            start = time.process_time()  # processor seconds: what other processes take does not count
            step(arms[arm], ids, everywhere)
            if round_:  # the first round warms up
                times[arm].append(time.process_time() - start)
        print(f"round {round_} of {rounds}", file=sys.stderr)
    del arms
    held = {}
    for arm in times:
        command = [sys.executable, __file__, "--tokens", str(options.tokens), "--memory-of", *arm]
        command += ["--all-linear"] if everywhere else []
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        held[arm] = [f"{float(number):.0f} MB" for number in said[-2:]]
    lora = statistics.median(times["trimtab", "LoRA r16"])
    rows = []
    for method in chosen:
        mine = statistics.median(times["trimtab", method])
        row = [method, f"{mine * 1000:.0f} ms", f"{mine / lora:.2f}", *held["trimtab", method]]
        if "peft" in libraries:
            theirs = statistics.median(times["peft", method])
            pairs = [b / a for a, b in zip(times["trimtab", method], times["peft", method], strict=True)]
            low, _, high = statistics.quantiles(pairs, n=4) if len(pairs) > 1 else pairs * 3
            ratio = f"{statistics.median(pairs):.2f} ({low:.2f} to {high:.2f})"
            row += [f"{theirs / lora:.2f}", ratio, *held["peft", method]]
        rows.append(row)
    head = ["method", "step", "relative to our LoRA", "resident", "allocated"]
    other = ["PEFT relative to our LoRA", "PEFT / ours", "PEFT resident", "PEFT allocated"]
    head += other if "peft" in libraries else []
    import report

    text = report.table(head, rows)
    where = f"every linear layer of {BLOCKS} blocks without the head" if everywhere else "q and v"
    title = f"One training step of each method on {where} of SmolLM2-135M, fp32, 2 x {options.tokens // 2} tokens"
    if options.write:
        report.write("method_step-all" if everywhere else "method_step", title, text)
    else:
        print(text)


if __name__ == "__main__":
    main()
