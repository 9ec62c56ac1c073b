"""An adapter in a store: its folder as it was found, told by what its files' heads say."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.core.config import CONFIG_NAME
from trimtab.errors import AdapterFileError
from trimtab.files.store import PICKLED, WEIGHTS, load_shapes

Stamp = tuple[tuple[int, int, int], ...]  # (time of change in ns, size, inode) of the config and of the weights


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
    try:
        found = [path.stat() for path in _files(folder)]
    except OSError:
        return None
    return tuple((status.st_mtime_ns, status.st_size, status.st_ino) for status in found)


def _files(folder: Path) -> tuple[Path, Path]:
    """An adapter's config and weights."""
    whole = folder / WEIGHTS
    return folder / CONFIG_NAME, whole if whole.is_file() else folder / PICKLED


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
        load_shapes(folder)  # the head, which is held against the file's length
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


def content_of(entry: Entry) -> str:
    """A hash of the adapter's content: config and weights.

    Raises:
        AdapterFileError: the files are gone or were changed meanwhile.
    """
    found = hashlib.sha256()
    try:
        for path in _files(entry.folder):
            with path.open("rb") as file:
                found.update(hashlib.file_digest(file, "sha256").digest())
    except OSError as error:
        raise AdapterFileError(f"{entry.folder} cannot be read: {error}") from error
    if stamp_of(entry.folder) != entry.stamp:
        raise AdapterFileError(f"{entry.folder} is being written.")
    return found.hexdigest()
