"""A run's folder: what is in it, whether it may be used, and the config that goes on with the run that is there.

run.yaml  metrics.jsonl  loss.png  adapter/  checkpoint-<step>/
base/: the model that on_top_of has made; rank/: the sweep that has chosen the rank
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimtab.core.io import write_whole
from trimtab.errors import ConfigError, TrainError
from trimtab.train.checkpoint import checkpoints_in
from trimtab.train.config import TrainConfig, read_config, read_file

__all__ = ["CONFIG", "claim", "read_run", "save_config"]

CONFIG, METRICS, PLOT, ADAPTER, BASE = "run.yaml", "metrics.jsonl", "loss.png", "adapter", "base"
RANK = "rank"


def read_run(
    *sources: Mapping[str, Any], where: str = "", extra: Mapping[str, Any] | None = None
) -> tuple[TrainConfig, list[str]]:
    """The config of a run: with `resume`, what its folder says comes first, and the sources over it.

    Raises:
        ConfigError: as `read_config`, or no rows to learn.
    """
    config, notices = read_config(*sources, where=where, extra=extra)
    saved = config.folder / CONFIG
    if config.resume and saved.is_file():
        measured = [{k: v for k, v in s.items() if (k, v) != ("precision", "auto")} for s in sources]
        config, notices = read_config(read_file(saved), *measured, where=where, extra=extra)
    if not config.data:
        raise ConfigError("Name the rows to learn: --data FILE (or `data:` in the file).")
    return config, notices


def claim(config: TrainConfig) -> Path | None:
    """Whether the run may have its folder; returns the checkpoint to go on from, if it is resumed and there is one.

    Raises:
        TrainError: there is another run in it.
    """
    folder = config.folder
    found = checkpoints_in(folder)
    if config.resume:
        return found[-1] if found else None
    if not config.overwrite_output_dir and (found or any((folder / n).exists() for n in (CONFIG, ADAPTER))):
        how = "finished" if (folder / ADAPTER).exists() else f"up to {found[-1].name}" if found else "just begun"
        raise TrainError(
            f"{folder} holds another run ({how}). Go on with it: --resume. Throw it away: --overwrite-output-dir. Keep "
            f"both: another --output."
        )
    return None


def clear(config: TrainConfig, chosen: bool = False) -> None:
    """Make the folder of a new run ready: what an earlier one has left goes, everything else stays.

    Args:
        chosen: the rank was chosen by a sweep just now, which stays.

    Raises:
        TrainError: it cannot be written to.
    """
    folder = config.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        old = [folder / ADAPTER, *folder.glob("checkpoint-*"), *folder.glob(".checkpoint-*")]
        old += [] if config.on_top_of else [folder / BASE]
        for path in old if chosen else [*old, folder / RANK]:
            shutil.rmtree(path, ignore_errors=True)
        for name in (CONFIG, METRICS, PLOT):
            (folder / name).unlink(missing_ok=True)
    except OSError as e:
        raise TrainError(f"{folder} cannot be written to: {e.strerror}. Give another --output.") from e


def save_config(config: TrainConfig, head: str) -> None:
    """Write run.yaml."""
    text = f"# {head}\n\n{config.to_yaml()}"

    def write(path: Path) -> None:
        path.write_text(text, encoding="utf-8")

    write_whole({config.folder / CONFIG: write})


def advice(config: TrainConfig) -> str:
    """What the sweep in the run's folder said, if there was one."""
    try:
        content = json.loads((config.folder / RANK / "sweep.json").read_text(encoding="utf-8"))
        return str(content["advice"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
