"""Ways to damage an adapter's folder: bytes, lengths, JSON, the types of fields, tensors."""

from __future__ import annotations

import contextlib
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from trimtab.files.store import PICKLED, WEIGHTS

CONFIG = "adapter_config.json"
ODD: list[Any] = [
    None, 0, 1, -1, 2, 7, 10**6, 10**9, 10**15, 10**30, -(10**30), 1.5, -0.5, 1e30, 1e308,
    math.nan, math.inf, -math.inf, True, False,
    "", "x", "8", "up", "embed", "all-linear", ".*", "(", "*", "none", "\0", "é" * 300,
    [], [1], [0, 1], [-1], ["up"], ["embed"], ["up", "head"], [None], [[]], [["up"]],
    {}, {"up": 1}, {"up": "x"}, {"(": 2}, {"up": {}}, {"": 0}, {"embed": [1]}, {"wte": [1]},
    "LORA", "IA3", "LOHA", "OFT", "VERA", "ADALORA", "LN_TUNING", "TRAINABLE_TOKENS", "PROMPT_TUNING", "PREFIX_TUNING",
    "CAUSAL_LM", "SEQ_CLS",
]  # fmt: skip


def weights(folder: Path) -> Path:
    return next((p for p in (folder / WEIGHTS, folder / PICKLED) if p.exists()), folder / WEIGHTS)


def flip_bytes(draw: random.Random, path: Path) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(draw.choice((1, 1, 1, 3, 20))):
        if data:
            data[draw.randrange(len(data))] = draw.randrange(256)
    path.write_bytes(data)


def cut(draw: random.Random, path: Path) -> None:
    data = path.read_bytes()
    start = draw.choice((0, 0, draw.randrange(len(data))))
    path.write_bytes(data[start : draw.randrange(start, len(data) + 1)])


def insert(draw: random.Random, path: Path) -> None:
    data = path.read_bytes()
    at = draw.randrange(len(data) + 1)
    path.write_bytes(data[:at] + draw.randbytes(draw.choice((1, 4, 100))) + data[at:])


def random_bytes(draw: random.Random, path: Path) -> None:
    path.write_bytes(draw.randbytes(draw.choice((0, 1, 8, 9, 100, 5000))))


def header(draw: random.Random, path: Path) -> None:
    """Other numbers, names and types in the head of the safetensors file."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    head = json.loads(data[8 : 8 + size])
    entry = head[draw.choice(sorted(head))]
    key = draw.choice(sorted(entry))
    entry[key] = draw.choice([[0], [2, 2], [1, -1], "F64", "I8", "BF16", "BOOL", "X", [0, 0], [0, 10**12], None, 3, {}])
    text = json.dumps(head).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def tensors(draw: random.Random, path: Path) -> None:
    """Other tensors in a file that can be read."""
    values = load_file(path) if path.name == WEIGHTS else torch.load(path)
    key = draw.choice(sorted(values))
    value = values[key]
    change: Callable[[], Any] = draw.choice(
        [
            lambda: values.pop(key),
            lambda: values.update({key + "x": values.pop(key)}),
            lambda: values.update({draw.choice(sorted(values)): value.clone()}),
            lambda: values.update({key: value[:0]}),
            lambda: values.update({key: value[None].clone()}),
            lambda: values.update({key: value.flatten().clone()}),
            lambda: values.update({key: value.mT.contiguous() if value.ndim > 1 else value}),
            lambda: values.update({key: torch.full_like(value, math.nan)}),
            lambda: values.update({key: torch.full_like(value, draw.choice((math.inf, 1e38, -1e30, 1e20)))}),
            lambda: values.update(
                {key: value.to(draw.choice((torch.int32, torch.bool, torch.float64, torch.float16)))}
            ),
            lambda: values.update({key: torch.complex(value.float(), value.float())}),
            lambda: values.update({f"base_model.model.extra{i}": torch.zeros(1) for i in range(3)}),
        ]
    )
    change()
    if path.name == WEIGHTS:
        save_file({k: v.contiguous() for k, v in values.items()}, path, metadata={"format": "pt"})
    else:
        torch.save(values, path)


def field(draw: random.Random, path: Path) -> None:
    """Other values, or types of values, in the config."""
    config = json.loads(path.read_text())
    for _ in range(draw.choice((1, 1, 2, 4))):
        key = draw.choice([*sorted(config), "unknown", "_unknown", "__class__", "heads", "held", "class_of", "copy"])
        if draw.random() < 0.15:
            config.pop(key, None)
        else:
            config[key] = draw.choice(ODD)
    path.write_text(json.dumps(config))


def other_json(draw: random.Random, path: Path) -> None:
    deep, long = "[" * 10**5, '{"r": 1' + "0" * 5000 + "}"
    plain = ["[]", "null", "3", '"x"', "{}", "NaN", "\ufeff{}", "{" * 10**5, deep, long]
    twice = '{"peft_type": "LORA", "peft_type": "IA3"}'
    text = draw.choice([*plain, '{"peft_type": "LORA"}', twice, '{"peft_type": null}', '{"peft_type": "lora"}'])
    path.write_text(text, encoding="utf-8")


def folder_of(draw: random.Random, path: Path) -> None:
    """Something else than a file where one should be."""
    path.unlink()
    if draw.random() < 0.5:
        path.mkdir()


def damage(folder: Path, seed: int) -> None:
    """Damage a folder in one way or two."""
    draw = random.Random(seed)
    for _ in range(draw.choice((1, 1, 2))):
        on_weights = [flip_bytes, flip_bytes, cut, insert, random_bytes, header, tensors, tensors, folder_of]
        on_config = [
            flip_bytes,
            flip_bytes,
            cut,
            insert,
            random_bytes,
            field,
            field,
            field,
            field,
            other_json,
            folder_of,
        ]
        if draw.random() < 0.45:
            path, ways = weights(folder), on_weights
        else:
            path, ways = folder / CONFIG, on_config
        way = draw.choice(ways)
        with contextlib.suppress(Exception):  # of what is damaged already
            way(draw, path)
