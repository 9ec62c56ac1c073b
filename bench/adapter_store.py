"""Registering thousands of adapters in an `AdapterStore`: seconds and memory.

    python bench/adapter_store.py [--adapters 10000] [--write]

The folders have the config and the head of a LoRA of SmolLM2-135M (r=8 on q_proj and v_proj, 120 tensors); the numbers
are holes in the files, which are not read. The first look reads every head; `refresh` asks the file system alone.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path


def head() -> tuple[bytes, int]:
    """(head, bytes of numbers) of such a file."""
    entries, at = {"__metadata__": {"format": "pt"}}, 0
    for layer in range(30):
        for module, out in (("q_proj", 576), ("v_proj", 192)):
            for leaf, shape in (("lora_A", [8, 576]), ("lora_B", [out, 8])):
                size = 4 * shape[0] * shape[1]
                key = f"base_model.model.model.layers.{layer}.self_attn.{module}.{leaf}.weight"
                entries[key] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
                at += size
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text, at


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=10_000)
    parser.add_argument("--write", action="store_true", help="write the table into docs/benchmarks.md")
    options = parser.parse_args()
    from report import table, write

    from trimtab import AdapterStore, LoraConfig

    config = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], base_model_name_or_path="smollm2-135m-instruct")
    first, size = head()
    with tempfile.TemporaryDirectory() as root:
        config.save_pretrained(root)
        settings = (Path(root) / "adapter_config.json").read_text()
        (Path(root) / "adapter_config.json").unlink()
        for i in range(options.adapters):
            folder = Path(root) / f"task-{i:05}"
            folder.mkdir()
            (folder / "adapter_config.json").write_text(settings)
            with (folder / "adapter_model.safetensors").open("wb") as file:
                file.write(first)
                file.truncate(len(first) + size)
        rows: list[list[object]] = []
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, (time.perf_counter(), time.process_time())
        store = AdapterStore(root)
        took = time.perf_counter() - began[0], time.process_time() - began[1]
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        rows.append([f"register {len(store):,}", f"{took[0]:.2f} s", f"{took[1]:.2f} s", f"+{grown:.0f} MB"])
        began = time.perf_counter(), time.process_time()
        store.refresh()
        took = time.perf_counter() - began[0], time.process_time() - began[1]
        rows.append(["look again", f"{took[0]:.2f} s", f"{took[1]:.2f} s", ""])
    text = table(["", "time", "processor time", "memory"], rows)
    title = "A store of adapters"
    if options.write:
        write("adapter_store", title, text)
    else:
        print(f"{title}\n\n{text}")


if __name__ == "__main__":
    main()
