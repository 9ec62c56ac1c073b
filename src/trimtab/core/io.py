"""Where a file is (a folder or the Hub) and how one is written: whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trimtab.errors import AdapterFileError

HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "repo_type", "token")


def split_hub_arguments(kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split keyword arguments into (those that say where on the Hub to look, the rest)."""
    hub = {k: v for k, v in kwargs.items() if k in (*HUB_ARGUMENTS, "use_auth_token", "subfolder")}
    if "use_auth_token" in hub:
        hub.setdefault("token", hub.pop("use_auth_token"))
    return hub, {k: v for k, v in kwargs.items() if k not in hub and k != "use_auth_token"}


def locate(folder_or_id: str | os.PathLike[str], name: str, **hub: Any) -> Path | None:
    """The local path of file `name` of an adapter, or None where the adapter has no such file.

    `folder_or_id` is a folder, or else a Hub id, whose file is then downloaded (or found in the cache when offline).
    """
    subfolder = hub.pop("subfolder", None) or ""
    folder = Path(folder_or_id)
    if folder.is_dir():
        path = folder / subfolder / name
        return path if path.is_file() else None
    if folder.is_absolute() or str(folder_or_id).count("/") > 1 or str(folder_or_id).startswith("."):
        raise AdapterFileError(f"Can't find '{name}' at '{folder_or_id}': there is no such folder.")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    arguments = {k: v for k, v in hub.items() if k in HUB_ARGUMENTS and k != "proxies" and v is not None}
    try:
        return Path(hf_hub_download(str(folder_or_id), name, subfolder=subfolder or None, **arguments))
    except LocalEntryNotFoundError as error:  # offline, and not in the cache
        raise AdapterFileError(
            f"Can't find '{name}' at '{folder_or_id}': it is no folder here, and the Hub cannot be reached."
        ) from error
    except EntryNotFoundError:
        return None
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise AdapterFileError(f"Can't find '{name}' at '{folder_or_id}': {error}") from error


def write_whole(files: Mapping[Path, Callable[[Path], None]]) -> None:
    """Write several files: each writer gets a temporary path; only when all have succeeded do they take their names.

    A failure or a kill at any point leaves the old files whole.
    """
    staged: list[tuple[str, Path]] = []
    try:
        for path, writer in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
            os.close(handle)
            staged.append((temporary, path))
            writer(Path(temporary))
            with Path(temporary).open("rb+") as file:
                os.fsync(file.fileno())
            Path(temporary).chmod(0o666 & ~_umask())
        while staged:
            temporary, path = staged[0]
            Path(temporary).replace(path)
            staged.pop(0)
    finally:
        for temporary, _ in staged:
            Path(temporary).unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
