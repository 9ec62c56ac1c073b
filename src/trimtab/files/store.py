"""An adapter's folder: adapter_config.json and adapter_model.safetensors (or .bin), read strictly and written whole."""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.core.config import CONFIG_NAME, PeftConfig
from trimtab.core.io import advice, locate, reading, split_hub_arguments, write_whole
from trimtab.errors import AdapterFileError, AdapterNameError

WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
STATE = "training_state.safetensors"  # of a method that keeps more in training than its file has
MAPPED = {  # number formats of safetensors that are read where they lie; the others are left to its own loader
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def check_name(adapter: str) -> None:
    """Raise unless the name can be a module's and a folder's."""
    if not isinstance(adapter, str) or not adapter:
        raise AdapterNameError(f"An adapter's name should be a non-empty string, not {adapter!r}.")
    if "." in adapter or "/" in adapter or "\\" in adapter or "\0" in adapter:
        raise AdapterNameError(
            f"Adapter name '{adapter}' cannot be used: it names a module and a folder, so "
            "it may hold no '.' and no path separator."
        )


def folder_of(root: str | os.PathLike[str], adapter: str) -> Path:
    """Where an adapter is saved below `root`: "default" at the root, every other in a folder of its name."""
    return Path(root) if adapter == "default" else Path(root) / adapter


def writers(
    folder: Path,
    config: PeftConfig,
    tensors: Mapping[str, Tensor],
    safe_serialization: bool = True,
    auto_mapping: dict[str, Any] | None = None,
) -> dict[Path, Callable[[Path], None]]:
    """Path -> function that writes it, for an adapter's two files. Pass them to `write_whole`."""
    plain = {k: v.detach().contiguous().to("cpu") for k, v in tensors.items()}
    seen: dict[int, str] = {}
    for key, value in plain.items():  # tensors that share storage are written once each, by a copy
        if value.untyped_storage().data_ptr() in seen:
            plain[key] = value.clone()
        seen[value.untyped_storage().data_ptr()] = key

    def write_safetensors(path: Path) -> None:
        from safetensors.torch import save_file

        save_file(plain, path, metadata={"format": "pt"})

    def write_pickle(path: Path) -> None:
        torch.save(plain, path)

    weights: tuple[str, Callable[[Path], None]] = (
        (WEIGHTS, write_safetensors) if safe_serialization else (PICKLED, write_pickle)
    )
    return {folder / weights[0]: weights[1], folder / CONFIG_NAME: config.writer(auto_mapping_dict=auto_mapping)}


def save(files: Mapping[Path, Callable[[Path], None]]) -> None:
    """Write adapters' files, all of them or none; the other weights format of an earlier save goes away."""
    others = {WEIGHTS: PICKLED, PICKLED: WEIGHTS}
    old = [path.with_name(name) for path in files if path.name in others for name in (others[path.name], STATE)]
    write_whole(files, CONFIG_NAME, [path for path in old if path not in files])


def state_writer(tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> Callable[[Path], None]:
    """What writes the state of training beside an adapter's file: tensors, and facts as text."""
    plain = {k: v.detach().to("cpu").clone().contiguous() for k, v in tensors.items()}

    def write(path: Path) -> None:
        from safetensors.torch import save_file

        save_file(plain, path, metadata={**facts, "format": "pt"})

    return write


def load_state(model_id: str | os.PathLike[str], **hub: Any) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """(tensors, facts) of the state of training beside an adapter's file in a folder, or None where there is none."""
    if not Path(model_id).is_dir() or (path := locate(model_id, STATE, **hub)) is None:
        return None
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterFileError(_unreadable(path, error)) from error


def load_peft_weights(
    model_id: str | os.PathLike[str], device: str | torch.device | None = None, **kwargs: Any
) -> dict[str, Tensor]:
    """The tensors of an adapter in a folder or on the Hub, by their keys on disk.

    Raises:
        AdapterFileError: no weights there, or a file that is damaged or holds more than tensors.
    """
    hub, rest = split_hub_arguments(kwargs)
    key_mapping = rest.pop("key_mapping", None)
    place = str(device) if device is not None else "cpu"
    with reading(model_id, hub.get("subfolder")):
        if (path := locate(model_id, WEIGHTS, **hub)) is not None:
            tensors = _read_safetensors(path, place)
        elif (path := locate(model_id, PICKLED, **hub)) is not None:
            tensors = _read_pickle(path, place)
        else:
            raise AdapterFileError(
                f"Can't find weights for {model_id}: it holds neither {WEIGHTS} nor {PICKLED}.{advice(model_id)}"
            )
    return rename(tensors, key_mapping)


def load_shapes(model_id: str | os.PathLike[str], **hub: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of an adapter's tensors by their keys on disk; of safetensors only the head is read."""
    with reading(model_id, hub.get("subfolder")):
        path = locate(model_id, WEIGHTS, **hub)
        if path is None:
            return {key: tuple(tensor.shape) for key, tensor in load_peft_weights(model_id, **hub).items()}
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise AdapterFileError(_unreadable(path, error)) from error


def rename(tensors: dict[str, Tensor], key_mapping: Mapping[str, str] | None) -> dict[str, Tensor]:
    """Apply {regular expression: replacement} to the keys, the first that fits each."""
    if not key_mapping:
        return tensors
    import re

    renamed = {}
    for key, value in tensors.items():
        for pattern, replacement in key_mapping.items():
            new, count = re.subn(pattern.lstrip("^"), replacement, key, count=1)
            if count:
                key = new
                break
        renamed[key] = value
    return renamed


def _read_safetensors(path: Path, device: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    try:
        if device == "cpu":
            with safe_open(path, "pt"):  # which checks the head, and that the numbers are all there
                pass
            if (tensors := _mapped(path)) is not None:
                return tensors
        return load_file(path, device=device)
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterFileError(_unreadable(path, error)) from error


def _mapped(path: Path) -> dict[str, Tensor] | None:
    """The tensors of a sound safetensors file, as views of the file mapped into memory.

    Adapters have hundreds of small tensors: safetensors' own loader takes three times as long for them. None where it
    must do: formats that are rare, or numbers that lie across the boundaries of their format.
    """
    with path.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # what is written stays in this process
    start = 8 + int.from_bytes(content[:8], "little")
    head = json.loads(content[8:start])
    head.pop("__metadata__", None)
    numbers: dict[torch.dtype, Tensor] = {}  # the whole file in a format
    tensors = {}
    for key, entry in head.items():
        dtype, shape = MAPPED.get(entry["dtype"]), entry["shape"]
        begin = start + entry["data_offsets"][0]
        if dtype is None or begin % dtype.itemsize:
            return None
        if dtype not in numbers:
            numbers[dtype] = torch.frombuffer(content, dtype=dtype, count=len(content) // dtype.itemsize)
        tensors[key] = numbers[dtype].narrow(0, begin // dtype.itemsize, math.prod(shape)).view(shape)
    return tensors


def _unreadable(path: Path, error: Exception) -> str:
    return f"'{path}' cannot be read; it is truncated or no safetensors file: {error}"


def _read_pickle(path: Path, device: str) -> dict[str, Tensor]:
    try:
        tensors = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # of bytes that are no pickle anything can come
        raise AdapterFileError(f"'{path}' cannot be read as a file of tensors and nothing else: {error}") from error
    if not isinstance(tensors, dict) or not all(isinstance(v, Tensor) for v in tensors.values()):
        raise AdapterFileError(f"'{path}' holds something else than a dict of tensors.")
    return tensors


def saved_adapters(root: str | os.PathLike[str]) -> list[str]:
    """The names of the adapters saved below a folder."""
    with reading(root):
        below = sorted(p.name for p in Path(root).iterdir() if p.is_dir() and not p.name.startswith("."))
        places = {"default": Path(root)} | {name: Path(root) / name for name in below}
        return [name for name, place in places.items() if locate(place, CONFIG_NAME) is not None]
