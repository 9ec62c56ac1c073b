"""Where a file of an adapter is: in a folder or on the Hub."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimtab.core.saving import present, reading, write_whole
from trimtab.errors import AdapterFileError

__all__ = ["CONFIG_NAME", "advice", "locate", "push_to_hub", "reading", "split_hub_arguments", "write_whole"]

CONFIG_NAME = "adapter_config.json"

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
        return present(folder / subfolder, name)
    if folder.is_file():
        raise AdapterFileError(f"Can't find '{name}' at '{folder_or_id}': that is a file. Name the folder it lies in.")
    if folder.is_absolute() or str(folder_or_id).count("/") > 1 or str(folder_or_id).startswith("."):
        raise AdapterFileError(f"Can't find '{name}' at '{folder_or_id}': there is no such folder.")
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    arguments = {k: v for k, v in hub.items() if k in HUB_ARGUMENTS and k != "proxies" and v is not None}
    try:
        return Path(hf_hub_download(str(folder_or_id), name, subfolder=subfolder or None, **arguments))
    except LocalEntryNotFoundError as error:
        offline = constants.HF_HUB_OFFLINE or arguments.get("local_files_only")
        if offline and name != CONFIG_NAME and locate(folder_or_id, CONFIG_NAME, subfolder=subfolder, **hub):
            return None  # the adapter is in the cache, and was without this file when it came there
        raise AdapterFileError(
            f"Can't find '{name}' at '{folder_or_id}': it is no folder here, and the Hub cannot be reached."
        ) from error
    except EntryNotFoundError:
        return None
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise AdapterFileError(f"Can't find '{name}' at '{folder_or_id}': {error}") from error


def advice(folder_or_id: str | os.PathLike[str]) -> str:
    """A sentence on what a folder holds that holds no adapter, or ''."""
    folder = Path(folder_or_id)
    if not folder.is_dir():
        return ""
    found = sorted({p.parent for depth in ("*", "*/*") for p in folder.glob(f"{depth}/{CONFIG_NAME}")}, key=_natural)
    if names := [str(p.relative_to(folder)) for p in found if not p.name.startswith(".")]:
        shown = ", ".join(map(repr, names[-5:]))
        return f" There are adapters below it, in {shown}: name one of these folders."
    if (folder / "config.json").is_file():
        return (
            " It holds a whole model, not an adapter: load it with from_pretrained of its class in transformers "
            "(AutoModelForCausalLM ...)."
        )
    return f" It holds {sorted(p.name for p in folder.iterdir())[:8] or 'nothing'}."


def _natural(path: Path) -> list[Any]:
    """A key that sorts checkpoint-9 before checkpoint-10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", str(path))]


def push_to_hub(
    self: Any,
    repo_id: str,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    **kwargs: Any,
) -> Any:
    """Upload what `save_pretrained` writes to a repository on the Hub, made at need; arguments as that has them."""
    import tempfile

    from huggingface_hub import create_repo, upload_folder

    with tempfile.TemporaryDirectory() as folder:
        self.save_pretrained(folder, **kwargs)
        url = create_repo(repo_id, private=private, token=token, exist_ok=True)
        return upload_folder(
            repo_id=url.repo_id,
            folder_path=folder,
            token=token,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message or "Upload adapter",
        )
