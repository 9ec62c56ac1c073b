"""QLoRA on a 4-bit SmolLM2-135M, beside LoRA on the same model in fp32: loss, memory and time a step, on the CPU.

    python bench/qlora.py [--steps 24] [--batch 2] [--double] [--write]

Data: the shorter rows of examples/data/addresses. Base: NF4 through transformers' own loading. Meant for two to three
minutes on two idle cores; the first run also makes the base model (half a minute).
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from trimtab import LoraConfig, get_peft_model, merge_error, prepare_model_for_kbit_training
from trimtab.files.sources import resolve_base
from trimtab.formats import weights
from trimtab.train.data import encode_rows, read_rows
from trimtab.train.loop import loss_of

ROOT = Path(__file__).resolve().parent.parent
warnings.filterwarnings("ignore")

BASE, RATE = "smollm2-135m-instruct", 1e-3


def load(four_bit: bool, double: bool) -> Any:
    """The base model, in fp32 or with its linear layers in NF4 (its scales in 8 bits with `double`)."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, logging

    logging.disable_progress_bar()
    more: dict[str, Any] = {}
    if four_bit:
        more["device_map"] = "cpu"
        more["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=double,
            bnb_4bit_compute_dtype=torch.float32,
        )
    return AutoModelForCausalLM.from_pretrained(resolve_base(BASE), dtype=torch.float32, **more)


def linear_megabytes(model: Any) -> float:
    """What the adapted layers' weights take, their scales with them."""
    size = 0
    for layer in {id(m.base_layer): m.base_layer for m in model.modules() if "base_layer" in m._modules}.values():
        size += layer.weight.numel() * layer.weight.element_size()
        if (state := getattr(layer.weight, "quant_state", None)) is not None:
            parts = [state.absmax, *([state.state2.absmax] if state.nested else [])]
            size += sum(p.numel() * p.element_size() for p in parts)
    return size / 1e6


def mean_loss(model: Any, examples: list[Any], size: int) -> float:
    """Mean held-out loss. In training mode (there is no dropout): bitsandbytes repacks in evaluation on some CPUs."""
    with torch.no_grad():
        losses = [float(loss_of(model, examples[i : i + size])) for i in range(0, len(examples), size)]
    return statistics.fmean(losses)


def run(four_bit: bool, double: bool, steps: int, size: int) -> dict[str, float]:
    """Train one of the two and measure it."""
    from transformers import AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(resolve_base(BASE))
    data = ROOT / "examples" / "data" / "addresses"
    rows = sorted(encode_rows(read_rows(data / "train.jsonl")[: 4 * steps * size], tokenizer), key=lambda e: len(e.ids))
    rows = rows[: steps * size]
    order = torch.randperm(steps, generator=torch.Generator().manual_seed(0)).tolist()
    held = encode_rows(read_rows(data / "valid.jsonl")[:8], tokenizer)

    base = load(four_bit, double)
    if four_bit:
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 for p in trained)
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    found = {"before": mean_loss(model, held, 8)}
    losses, seconds = [], []
    for step, batch in enumerate(order):
        began = time.process_time()  # of all threads: what other processes take does not count
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 4)
        loss = loss_of(model, rows[batch * size : (batch + 1) * size])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
        seconds.append(time.process_time() - began)
        arm = "NF4" if four_bit else "fp32"
        print(f"  {arm} step {step + 1}: loss {losses[-1]:.3f}, {seconds[-1]:.1f} s of processor", flush=True)
    found |= {
        "first": statistics.fmean(losses[:4]),
        "last": statistics.fmean(losses[-4:]),
        "after": mean_loss(model, held, 8),
        "step": statistics.median(seconds),
        "linear": linear_megabytes(model),
        "model": sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad) / 1e6,
    }
    if four_bit:
        kept = {n: m.base_layer.weight for n, m in model.named_modules() if "base_layer" in m._modules}
        model.merge_adapter()
        found["merged"] = mean_loss(model, held, 8)
        found["lost"] = statistics.median(merge_error(model).values())
        model.unmerge_adapter()
        assert all(model.get_submodule(n).base_layer.weight is w for n, w in kept.items())
        assert any(weights.quantised(model.get_submodule(n).base_layer) for n in kept)
    return found


def main() -> None:
    """Measure both and print, or write, the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--double", action="store_true", help="double quantisation: smaller by a tenth, slower")
    parser.add_argument("--write", action="store_true", help="write the table into docs/benchmarks.md")
    args = parser.parse_args()
    four, full = (run(four_bit, args.double, args.steps, args.batch) for four_bit in (True, False))
    assert four["after"] < four["before"], "the loss did not fall"

    from report import table, write

    def row(title: str, key: str, form: str = "{:.3f}") -> list[object]:
        return [title, *(form.format(f[key]) if key in f else "" for f in (four, full))]

    text = table(
        ["", "QLoRA, NF4 base", "LoRA, fp32 base"],
        [
            row("held-out loss before", "before"),
            row("held-out loss after", "after"),
            row("training loss, first 4 steps", "first"),
            row("training loss, last 4 steps", "last"),
            row("held-out loss merged into 4 bits", "merged"),
            row("share of the update lost to rounding (median layer)", "lost", "{:.2f}"),
            row("adapted layers' weights, MB", "linear", "{:.0f}"),
            row("base model's weights, MB (embeddings stay fp32)", "model", "{:.0f}"),
            row("median step, seconds of processor", "step", "{:.2f}"),
            ["step relative to fp32", f"{four['step'] / full['step']:.2f}", "1.00"],
        ],
    )
    text = f"{args.steps} steps of {args.batch} rows, r = 16 on all linear layers, learning rate {RATE:g}.\n\n{text}"
    if args.write:
        write("qlora", "QLoRA on SmolLM2-135M", text)
    else:
        print(text)


if __name__ == "__main__":
    main()
