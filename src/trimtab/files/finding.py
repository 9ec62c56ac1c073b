"""Whether a folder is an adapter, and, where it is not, what it is instead and which folder was probably meant."""

from __future__ import annotations

import os
import re
from pathlib import Path

from trimtab.core.config import CONFIG_NAME
from trimtab.core.io import locate
from trimtab.errors import AdapterFileError
from trimtab.files.sources import PACKAGED
from trimtab.files.store import PICKLED, WEIGHTS


def adapter_folder(name: str | os.PathLike[str]) -> str:
    """`name` as it is, a folder that holds an adapter or a Hub id.

    Raises:
        AdapterFileError: a folder that holds something else; the message says what, and what to give instead.
    """
    name = os.fspath(name)
    path = Path(name).expanduser()
    if path.is_file():
        raise AdapterFileError(f"{name} is a file. Give the adapter's folder: {path.parent}")
    if not path.is_dir():
        if locate(name, CONFIG_NAME) is None:
            raise AdapterFileError(f"'{name}' holds no {CONFIG_NAME}, so it is no adapter.")
        return name
    if not (path / CONFIG_NAME).is_file():
        raise AdapterFileError(_instead(name, path))
    if not (path / WEIGHTS).is_file() and not (path / PICKLED).is_file():
        if (path / "adapters.safetensors").is_file():
            raise AdapterFileError(f"{name} is an adapter in MLX's layout, which is not read here.")
        raise AdapterFileError(f"{name} has an {CONFIG_NAME} but no weights: neither {WEIGHTS} nor {PICKLED}.")
    return str(path)


def is_adapter(name: str | os.PathLike[str]) -> bool:
    """Whether a folder or Hub id is an adapter; what cannot be looked at is none."""
    path = Path(name).expanduser()
    if path.is_dir():
        return (path / CONFIG_NAME).is_file()
    if path.exists() or path.suffix == ".gguf" or os.fspath(name).lower() in PACKAGED:
        return False
    try:
        return locate(name, CONFIG_NAME) is not None
    except AdapterFileError:  # offline, or no such repository: loading it will say so
        return False


def adapters_below(folder: Path) -> list[Path]:
    """The adapters in the folders of a run or of several adapters saved together; the latest checkpoint last."""
    found = [p.parent for p in folder.glob(f"*/{CONFIG_NAME}")]
    return sorted(found, key=lambda p: (_step(p), p.name))


def _step(folder: Path) -> int:
    match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(match[1]) if match else -1


def _instead(name: str, path: Path) -> str:
    below = adapters_below(path)
    if below:
        listed = ", ".join(str(p) for p in below[-3:])
        more = f" ({len(below)} in all)" if len(below) > 3 else ""
        return f"{name} is a folder of adapters, not one of them. Give one of those below it: {listed}{more}"
    if (path / "config.json").is_file():
        return f"{name} is a whole model, not an adapter. Give it as the model (--model {name})."
    return f"{name} holds no {CONFIG_NAME}, so it is no adapter."
