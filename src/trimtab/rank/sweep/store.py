"""A sweep's folder: each run that is over in a folder of its own, written whole, so that none has to be repeated.

sweep.json  table.md  sweep.png  adapter/  runs/<name>/run.json  runs/<name>/adapter/
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from trimtab.core.io import write_whole
from trimtab.errors import TrainError
from trimtab.rank.sweep.result import FAILED, FINISHED, Outcome, plain, read_outcome
from trimtab.train.checkpoint import write_folder

RESULT, TABLE, PLOT, ADAPTER, RUNS, IDENTITY = "sweep.json", "table.md", "sweep.png", "adapter", "runs", "identity.json"


class Store:
    """What is kept of a sweep.

    Args:
        identity: what must be the same for a run that is there to be one of this sweep.

    Raises:
        TrainError: the folder holds another sweep.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder, self.identity = folder, json.loads(json.dumps(plain(identity)))
        then = _read(folder / IDENTITY)
        now = self.identity
        if then is not None and then != now:
            changed = [f"{k} ({then.get(k)!r} then, {now.get(k)!r} now)"
                       for k in {**then, **now} if then.get(k) != now.get(k)]  # fmt: skip
            raise TrainError(
                f"{folder} holds another sweep. What has changed since: {', '.join(changed)}. Give another --output, "
                "or remove it."
            )
        self.outcomes = self._load() if then is not None else {}

    def _load(self) -> dict[str, Outcome]:
        """{name of a run: its outcome}; what failed is tried again."""
        contents = [_read(path) for path in sorted((self.folder / RUNS).glob("*/run.json"))]
        found = [read_outcome(content) for content in contents if content is not None]
        return {o.trial.name: o for o in found if o.ended != FAILED}

    def begin(self) -> None:
        """Claim the folder.

        Raises:
            TrainError: it cannot be written to.
        """
        try:
            self._write(self.folder / IDENTITY, _json(self.identity))
        except OSError as e:
            raise TrainError(f"{self.folder} cannot be written to: {e.strerror}. Give another --output.") from e

    def save(self, outcome: Outcome, write_adapter: Callable[[Path], Any] | None = None) -> Outcome:
        """Keep a run that is over, with its adapter; returns it with the adapter's size and place."""
        target = self.folder / RUNS / outcome.trial.name
        found = outcome

        def write(folder: Path) -> None:
            nonlocal found
            if write_adapter is not None:
                write_adapter(folder / ADAPTER)
                size = sum(f.stat().st_size for f in (folder / ADAPTER).glob("*.safetensors"))
                found = replace(outcome, bytes=size, folder=str(Path(RUNS) / outcome.trial.name / ADAPTER))
            (folder / "run.json").write_text(_json(plain(found)), encoding="utf-8")

        write_folder(target, write)
        self.outcomes[outcome.trial.name] = found
        return found

    def finish(self, result: Any, table: str, best: Outcome) -> Path:
        """Write what the sweep came to, and the adapter of its best run; returns the adapter's place."""
        target = self.folder / ADAPTER

        def copy(to: Path) -> None:
            shutil.copytree(self.folder / best.folder, to, dirs_exist_ok=True)

        write_folder(target, copy)
        self._write(self.folder / TABLE, table)
        self._write(self.folder / RESULT, _json(plain(result)))
        return target

    def _write(self, path: Path, text: str) -> None:
        def write(to: Path) -> None:
            to.write_text(text, encoding="utf-8")

        write_whole({path: write})

    def finished(self, name: str) -> bool:
        """Whether a run is trained to its end."""
        return name in self.outcomes and self.outcomes[name].ended == FINISHED


def precision_of(folder: Path, wanted: str) -> str:
    """What the runs in a folder were computed in, where it is to be measured: it might come out otherwise this time."""
    then = _read(folder / IDENTITY) or {}
    return str(then.get("precision", wanted)) if wanted == "auto" else wanted


def _json(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _read(path: Path) -> dict[str, Any] | None:
    """The content of a JSON file; nothing where there is none, or it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
