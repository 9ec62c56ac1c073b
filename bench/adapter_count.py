"""Nothing grows with the number of adapters: 196 LoRA sites, 2 adapters against 100 (law 4).

    python bench/adapter_count.py [--few 2] [--many 100] [--blocks 15] [--peft]
    python bench/adapter_count.py --real [--present 2,32,1000] [--blocks 15] [--threads 1] [--peft]

`--peft` adds the same figures of Hugging Face PEFT, where it can be imported (slow: it adds adapters in linear time).
`--real` times the same operations, merging and unmerging on SmolLM2-135M with so many adapters present: r=8 on q and v,
r=16 on all linear layers as far as memory allows, r=1 there for as many sites with few numbers. "among all" switches
through all adapters, most of which are not in the module tree.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import common
import torch
from common import interleaved, median_ms, once
from report import table, write
from step import TARGETS, load
from transformers import LlamaConfig, LlamaForCausalLM

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LIMIT = 1.5  # what the ratio must stay under, for the rows below
BYTES, OBJECTS = 300, 1  # at most, a site of an adapter that is not used
HELD = ("add_adapter", "load_adapter", "disable_adapter")


def base() -> LlamaForCausalLM:
    """28 layers of 7 linear maps: 196 sites, as narrow as they can be."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=28,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


class Arm:
    """A model with `count` adapters, and what is timed on it."""

    def __init__(self, library: Any, count: int, folder: str) -> None:
        self.library, self.folder = library, folder
        self.config = library.LoraConfig(r=4, target_modules=LINEAR)
        self.model = library.get_peft_model(base(), self.config, "a0")
        for i in range(1, count):
            self.model.add_adapter(f"a{i}", self.config)
        self.model.save_pretrained(folder, selected_adapters=["a0"])
        self.ids = torch.randint(64, (1, 8))
        self.names = ["a0", "a1"]
        self.model.set_adapter("a0")
        self.model.eval()

    def add_adapter(self) -> float:
        seconds = once(lambda: self.model.add_adapter("new", self.config))
        self.model.delete_adapter("new")
        return seconds

    def load_adapter(self) -> float:
        seconds = once(lambda: self.model.load_adapter(f"{self.folder}/a0", "new"))
        self.model.delete_adapter("new")
        return seconds

    def set_adapter(self) -> float:
        self.names.reverse()
        return once(lambda: self.model.set_adapter(self.names[0]))

    def disable_adapter(self) -> float:
        def run() -> None:
            with self.model.disable_adapter():
                pass

        return once(run)

    @torch.no_grad()
    def forward(self) -> float:
        return once(lambda: self.model(self.ids))

    def train_mode(self) -> float:
        return once(self.model.train) + once(self.model.eval)

    def delete_adapter(self) -> float:
        self.model.add_adapter("new", self.config)
        return once(lambda: self.model.delete_adapter("new"))


ACTS = ["add_adapter", "load_adapter", "set_adapter", "disable_adapter", "delete_adapter", "forward", "train_mode"]


def measure(library: Any, few: int, many: int, blocks: int) -> list[tuple[str, float, float, float]]:
    """(act, ms with few, ms with many, ratio) of each act."""
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        arms = {few: Arm(library, few, one), many: Arm(library, many, other)}
        rows = []
        for act in ACTS:
            runs: dict[str, Callable[[], float]] = {str(n): getattr(arm, act) for n, arm in arms.items()}
            interleaved(runs, 2)  # warm
            found = interleaved(runs, blocks)
            a, b = median_ms(found[str(few)]), median_ms(found[str(many)])
            rows.append((act, a, b, b / a))
        return rows


def memory(library: Any, count: int) -> tuple[float, float, float]:
    """Of an adapter that is not used, a site: bytes beyond its numbers, tracked objects, bytes of its numbers."""
    import gc

    import psutil

    model = library.get_peft_model(base(), library.LoraConfig(r=4, target_modules=LINEAR), "a0").eval()
    config = library.LoraConfig(r=4, target_modules=LINEAR, inference_mode=True)
    sites = 28 * len(LINEAR)
    numbers = 4 * sum(p.numel() for n, p in model.named_parameters() if ".lora_" in n) / sites
    for i in range(80 if count > 20 else 2):  # what is made once, and those that keep their modules, are not counted
        model.add_adapter(f"warm{i}", config)
    process = psutil.Process()
    gc.collect()
    objects, resident = len(gc.get_objects()), process.memory_info().rss
    for i in range(count):
        model.add_adapter(f"a{i + 1}", config)
    gc.collect()
    grown = (process.memory_info().rss - resident) / count / sites
    return grown - numbers, (len(gc.get_objects()) - objects) / count / sites, numbers


class Real(Arm):
    """SmolLM2-135M with `count` adapters."""

    def __init__(self, library: Any, count: int, folder: str, rank: int, targets: str) -> None:
        self.library, self.folder = library, folder
        self.config = library.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS[targets])
        self.model = library.get_peft_model(load(SimpleNamespace(dtype="float32", tokens=8))[0], self.config, "a0")
        for i in range(1, count):
            self.model.add_adapter(f"a{i}", self.config)
        self.model.save_pretrained(folder, selected_adapters=["a0"])
        self.names, self.every, self.turn = ["a0", "a1"], [f"a{i}" for i in range(count)], 0
        self.model.set_adapter("a0")
        self.model.eval()

    def set_adapter_among_all(self) -> float:
        self.turn += 1
        return once(lambda: self.model.set_adapter(self.every[self.turn % len(self.every)]))

    def merge_adapter(self) -> float:
        seconds = once(self.model.merge_adapter)
        self.model.unmerge_adapter()
        return seconds

    def unmerge_adapter(self) -> float:
        self.model.merge_adapter()
        return once(self.model.unmerge_adapter)


SETTINGS = [(8, "qv"), (16, "all"), (1, "all")]  # (rank, targets)
ROOM = 4e9  # bytes that adapters of one arm may take
PATIENCE = 32  # adapters that PEFT is given at most: it adds them in linear time


def real(libraries: list[str], present: list[int], blocks: int) -> str:
    """The table of the operations on SmolLM2-135M, libraries and numbers of adapters interleaved in this process."""
    acts = [*ACTS[:5], "set_adapter_among_all", "train_mode", "merge_adapter", "unmerge_adapter"]
    said = []
    for rank, targets in SETTINGS:
        arms, folders = {}, []
        for count, name in [(count, name) for count in present for name in libraries]:
            one = next(iter(arms.values()), None)
            size = 0 if one is None else 4 * sum(p.numel() for p in one.model.parameters() if p.requires_grad)
            if count * size > ROOM or (name == "peft" and count > PATIENCE):
                continue
            folders.append(tempfile.TemporaryDirectory())
            arms[f"{name}, {count}"] = Real(importlib.import_module(name), count, folders[-1].name, rank, targets)
        rows = []
        for act in acts:
            runs: dict[str, Callable[[], float]] = {name: getattr(arm, act) for name, arm in arms.items()}
            interleaved(runs, 2)  # warm
            found = interleaved(runs, blocks)
            rows.append([act, *(f"{median_ms(found[name]):.2f}" for name in arms)])
        which = "processor time" if common.clock is time.process_time else "the clock"
        title = f"r={rank}, {targets} linear layers, adapters present: {which}, ms, medians of {blocks}"
        said.append(f"{title}\n\n{table(['', *arms], rows)}")
        for folder in folders:
            folder.cleanup()
    return "\n\n".join(said)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--few", type=int, default=2)
    parser.add_argument("--many", type=int, default=100)
    parser.add_argument("--blocks", type=int, default=15)
    parser.add_argument("--loaded", type=int, default=300, help="adapters whose memory is measured")
    parser.add_argument("--peft", action="store_true", help="measure PEFT as well (at most 10 adapters)")
    parser.add_argument("--real", action="store_true", help="time the operations on SmolLM2-135M")
    parser.add_argument("--present", default="2,32,1000", help="adapters present there")
    parser.add_argument("--threads", type=int, default=1, help="with several, the clock is read in --real")
    parser.add_argument("--write", action="store_true", help="write the tables into docs/benchmarks.md")
    parser.add_argument("--memory-of", metavar="LIBRARY", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.real:
        common.clock = time.perf_counter if options.threads > 1 else time.process_time
        present = [int(count) for count in options.present.split(",")]
        text_of = real(["trimtab", *(["peft"] if options.peft else [])], present, options.blocks)
        how = f"{options.threads} threads" if options.threads > 1 else "one thread"
        title_of = f"Operations on SmolLM2-135M with many adapters present, fp32, {how}"
        if options.write:
            write("adapter_count-real" + f"-{options.threads}" * (options.threads > 1), title_of, text_of)
        else:
            print(f"{title_of}\n\n{text_of}")
        return 0
    if options.memory_of:
        print(*memory(importlib.import_module(options.memory_of), options.loaded))
        return 0
    failed = []
    text: list[str] = []
    arms = [("trimtab", options.many, options.blocks)] + ([("peft", min(options.many, 10), 3)] if options.peft else [])
    for name, many, blocks in arms:
        rows = measure(importlib.import_module(name), options.few, many, blocks)
        head = ["", f"{options.few} adapters, ms", f"{many} adapters, ms", "ratio"]
        title = f"{name}: processor time, medians of {blocks} interleaved runs, one thread"
        text.append(f"{title}\n\n" + table(head, [[act, f"{a:.2f}", f"{b:.2f}", f"{q:.2f}"] for act, a, b, q in rows]))
        count = options.loaded if name == "trimtab" else min(options.loaded, 10)
        command = [sys.executable, __file__, "--memory-of", name, "--loaded", str(count)]  # in a process of its own
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-3:]
        over, objects, numbers = map(float, said)
        text.append(
            f"{name}: an adapter that is loaded and not used takes, a site, {over:.0f} bytes and {objects:.2f} tracked "
            f"Python objects beside the {numbers:.0f} bytes of its numbers (mean of {count})"
        )
        if name == "trimtab":
            failed = [act for act, _, _, ratio in rows if act in HELD and ratio >= LIMIT]
            failed += ["memory"] * (over > BYTES) + ["objects"] * (objects > OBJECTS)
    title = "Adding, loading, switching and disabling with few and with many adapters, 196 LoRA sites"
    if options.write:
        write("adapter_count", title, "\n\n".join(text))
    else:
        print("\n\n".join([title, *text]))
    if failed:
        print(f"\nFAILED: {', '.join(failed)} grow too much with the number of adapters")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
