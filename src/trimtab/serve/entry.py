"""An adapter in a store: its folder as it was found, told by what its files' heads say."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.core.config import CONFIG_NAME
from trimtab.errors import AdapterFileError
from trimtab.files.store import PICKLED, WEIGHTS

Stamp = tuple[tuple[int, int, int], ...]  # (time of change in ns, size, inode) of the config and of the weights
HEAD = 100_000_000  # bytes of a safetensors head, which is as much as the format allows


@dataclass(frozen=True)
class Entry:
    """One adapter.

    Attributes:
        name: its folder below the store's.
        peft_type: its method, as its config names it.
        base: the base model that its config names.
        bytes: of its weights.
        stamp: what tells whether its files have changed.
    """

    name: str
    folder: Path
    peft_type: str
    base: str | None
    bytes: int
    stamp: Stamp


def stamp_of(folder: Path) -> Stamp | None:
    """The stamp of an adapter's folder now; None where there is none (any more)."""
    found = []
    for names in ((CONFIG_NAME,), (WEIGHTS, PICKLED)):
        for name in names:
            try:
                status = (folder / name).stat()
            except OSError:
                continue
            found.append((status.st_mtime_ns, status.st_size, status.st_ino))
            break
    return tuple(found) if len(found) == 2 else None


def read_entry(name: str, folder: Path) -> Entry:
    """What a folder's heads say: the config and the first bytes of the weights; no tensor is read.

    Raises:
        AdapterFileError: it is no adapter, damaged, or just being written.
    """
    before = stamp_of(folder)
    if before is None:
        raise AdapterFileError(f"{folder} holds no {CONFIG_NAME}, or no weights beside it.")
    config = _config(folder)
    if (folder / WEIGHTS).is_file():
        _check_head(folder / WEIGHTS)
    if stamp_of(folder) != before:
        raise AdapterFileError(f"{folder} is being written.")
    base = config.get("base_model_name_or_path")
    kind = str(config.get("peft_type"))
    return Entry(name, folder, kind, base if isinstance(base, str) else None, before[1][1], before)


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG_NAME).read_bytes())
    except (OSError, ValueError) as error:
        raise AdapterFileError(f"{folder / CONFIG_NAME} cannot be read: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise AdapterFileError(f"{folder / CONFIG_NAME} names no `peft_type`.")
    return config


def _check_head(path: Path) -> None:
    """Raise unless the file is as long as its head says."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(HEAD, size - 8):
                raise ValueError(f"its head would have {length} bytes")
            head = json.loads(file.read(length))
        ends = [part["data_offsets"][1] for key, part in head.items() if key != "__metadata__"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise AdapterFileError(f"{path} is no safetensors file, or truncated: {error}") from error
    if 8 + length + max(ends, default=0) != size:
        raise AdapterFileError(f"{path} has {size} bytes instead of {8 + length + max(ends, default=0)}.")


def content_of(entry: Entry) -> str:
    """A hash of the adapter's content: config and weights.

    Raises:
        AdapterFileError: the files are gone or were changed meanwhile.
    """
    found = hashlib.sha256()
    try:
        for name in (CONFIG_NAME, WEIGHTS, PICKLED):
            path = entry.folder / name
            if name == PICKLED and (entry.folder / WEIGHTS).is_file():
                continue
            if not path.is_file():
                continue
            with path.open("rb") as file:
                found.update(hashlib.file_digest(file, "sha256").digest())
    except OSError as error:
        raise AdapterFileError(f"{entry.folder} cannot be read: {error}") from error
    if stamp_of(entry.folder) != entry.stamp:
        raise AdapterFileError(f"{entry.folder} is being written.")
    return found.hexdigest()
