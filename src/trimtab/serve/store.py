"""Thousands of adapters in folders, a few of them on a model at a time."""

from __future__ import annotations

import contextlib
import difflib
import os
import threading
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trimtab.core.config import CONFIG_NAME
from trimtab.errors import AdapterFileError, AdapterNameError, ConfigError, PeftError
from trimtab.layer.plan import BASE, Row, wanted
from trimtab.serve.entry import Entry, content_of, read_entry, stamp_of
from trimtab.shell.peft_model import PeftModel

__all__ = ["AdapterStore", "Changes"]

TRIES = 3  # to read a folder that is being written


@dataclass(frozen=True)
class Changes:
    """What `refresh` found: names of adapters."""

    new: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    gone: tuple[str, ...] = ()


@dataclass
class _Held:
    """What of a store is on one model."""

    order: dict[str, int] = field(default_factory=dict)  # adapter on the model -> its bytes; used longest ago first
    busy: Counter[str] = field(default_factory=Counter)  # adapter -> blocks that use it now


class AdapterStore:
    """The adapters in the folders below one folder or several, by the names of their folders.

    Only heads are read to register them. An adapter is loaded when a block first uses it, and leaves the model when
    `limit` others have been used since. It is known by the hash of its content: one that was changed under the same
    name is another adapter, and equal ones under two names are held once.

    Args:
        folders: each holds adapters, a folder each, or is one itself; the first that has a name counts.
        limit: how many are kept on a model.
        max_bytes: of their weights, in all; None: without limit.

    Attributes:
        broken: {name: why it is not served}, of folders that are damaged or half-written.
    """

    def __init__(
        self, folders: str | os.PathLike[str] | Sequence[Any], limit: int = 32, max_bytes: int | None = None
    ) -> None:
        many = [folders] if isinstance(folders, str | os.PathLike) else list(folders)
        self.roots = [Path(folder).expanduser() for folder in many]
        if missing := [str(root) for root in self.roots if not root.is_dir()]:
            raise AdapterFileError(f"No such folder: {', '.join(missing)}.")
        if limit < 1:
            raise ConfigError(f"`limit` should be at least 1, not {limit}.")
        self.limit, self.max_bytes = limit, max_bytes
        self.entries: dict[str, Entry] = {}
        self.broken: dict[str, str] = {}
        self.pinned: set[str] = set()
        self._contents: dict[tuple[Path, Any], str] = {}  # (folder, stamp) -> hash
        self._held: weakref.WeakKeyDictionary[Any, _Held] = weakref.WeakKeyDictionary()
        self._lock = threading.RLock()
        self.refresh()

    # ------------------------------------------------------------------ what there is
    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(list(self.entries))

    def entry(self, name: str) -> Entry:
        """What is known of an adapter.

        Raises:
            AdapterNameError: there is none of that name, or it is broken; the message says why, or what was meant.
        """
        with self._lock:
            if name in self.entries:
                return self.entries[name]
            if name in self.broken:
                raise AdapterNameError(f"The adapter '{name}' is not served: {self.broken[name]}")
            near = difflib.get_close_matches(name, self.entries, 3)
            hint = f" Did you mean {', '.join(near)}?" if near else ""
            raise AdapterNameError(f"The store has no adapter '{name}'.{hint}")

    def refresh(self) -> Changes:
        """Look at the folders anew: those that have come, changed or gone."""
        with self._lock:
            places: dict[str, Path] = {}
            for root in self.roots:
                for name, folder in _folders(root):
                    places.setdefault(name, folder)
            before = dict(self.entries)
            self.broken = {}
            for name, folder in places.items():
                self._look(name, folder)
            for name in before.keys() - places.keys():
                self.entries.pop(name, None)
            now = self.entries
            current = {(entry.folder, entry.stamp) for entry in now.values()}
            self._contents = {key: content for key, content in self._contents.items() if key in current}
            return Changes(
                new=tuple(n for n in now if n not in before),
                changed=tuple(n for n in now if n in before and now[n].stamp != before[n].stamp),
                gone=tuple(n for n in before if n not in now),
            )

    def _look(self, name: str, folder: Path) -> None:
        """Register a folder as it is now."""
        known = self.entries.get(name)
        if known is not None and known.folder == folder and known.stamp == stamp_of(folder):
            return
        try:
            self.entries[name] = read_entry(name, folder)
        except AdapterFileError as error:
            self.entries.pop(name, None)
            self.broken[name] = str(error)

    # ------------------------------------------------------------------ on a model
    def open(self, base: Any, name: str | None = None) -> PeftModel:
        """A PeftModel of a base model, with one adapter of the store (the first by default)."""
        first = name if name is not None else next(iter(self.entries), None)
        if first is None:
            raise AdapterNameError(f"The store is empty: no adapters below {', '.join(map(str, self.roots))}.")
        with self._lock:
            entry, content = self._content(first)
            model: PeftModel = PeftModel.from_pretrained(base, entry.folder, adapter_name=content)
            self._held[model] = _Held({content: entry.bytes})
        return model

    @contextlib.contextmanager
    def using(self, model: PeftModel, names: Sequence[Row]) -> Iterator[list[Any]]:
        """Inside the block the adapters of a mixed batch's rows are on the model; yields its `adapter_names`.

        Args:
            names: one a row, as `adapter_names` are: a name of the store, "__base__", or several with their scales.

        Raises:
            AdapterNameError: an adapter that the store does not have, or more of them than `limit`.
            AdapterFileError: one that does not fit the model.
        """
        rows = [wanted(row) for row in names]
        distinct = list(dict.fromkeys(name for row in rows for name, _ in row))
        with self._lock:
            held = self._held.setdefault(model, _Held())
            mine = self._bring(model, held, distinct)
            held.busy.update(mine.values())
        try:
            yield [[(mine[name], scale) for name, scale in row] if row else BASE for row in rows]
        finally:
            with self._lock:
                held.busy.subtract(mine.values())
                held.busy += Counter()

    def prefetch(self, model: PeftModel, names: Sequence[str]) -> None:
        """Load adapters before they are wanted."""
        with self.using(model, names):
            pass

    def pin(self, *names: str) -> None:
        """Keep adapters on models once they are there."""
        for name in names:
            self.entry(name)
        self.pinned |= set(names)

    def unpin(self, *names: str) -> None:
        """Let them leave again."""
        self.pinned -= set(names)

    def on(self, model: PeftModel) -> int:
        """How many of the store's adapters are on a model."""
        held = self._held.get(model)
        return len(held.order) if held else 0

    def _bring(self, model: PeftModel, held: _Held, names: Sequence[str]) -> dict[str, str]:
        """{name: the adapter on the model that holds its content}."""
        found = {name: self._content(name) for name in names}
        if len({content for _, content in found.values()}) > self.limit:
            raise AdapterNameError(f"The batch wants {len(found)} adapters at once, and `limit` is {self.limit}.")
        for name, (entry, content) in found.items():
            if content not in model.peft_config:
                self._load(model, name, entry, content)
            held.order.pop(content, None)
            held.order[content] = entry.bytes
        mine = {name: content for name, (_, content) in found.items()}
        self._evict(model, held, set(mine.values()))
        return mine

    def _load(self, model: PeftModel, name: str, entry: Entry, content: str) -> None:
        try:
            model.load_adapter(entry.folder, content)
        except PeftError as error:
            raise AdapterFileError(f"The adapter '{name}' cannot be loaded: {error}") from error
        if stamp_of(entry.folder) != entry.stamp:  # what was read may be of two contents
            model.delete_adapter(content)
            raise AdapterFileError(f"The adapter '{name}' was changed while it was loaded: try again.")

    def _evict(self, model: PeftModel, held: _Held, wanted_: set[str]) -> None:
        """Take off the adapters used longest ago, beyond the limits."""
        pinned = {self._contents.get((e.folder, e.stamp)) for n, e in self.entries.items() if n in self.pinned}
        free = [c for c in held.order if c not in wanted_ and c not in pinned and not held.busy[c]]
        while free and (
            len(held.order) > self.limit or (self.max_bytes is not None and sum(held.order.values()) > self.max_bytes)
        ):
            content = free.pop(0)
            if content in model.peft_config:
                model.delete_adapter(content)
            del held.order[content]

    def _content(self, name: str) -> tuple[Entry, str]:
        """An adapter as it is now, and the hash of its content."""
        for _ in range(TRIES):
            entry = self.entry(name)
            if stamp_of(entry.folder) != entry.stamp:
                self._look(name, entry.folder)
                entry = self.entry(name)
            key = (entry.folder, entry.stamp)
            if key in self._contents:
                return entry, self._contents[key]
            try:
                self._contents[key] = "a" + content_of(entry)[:24]
            except AdapterFileError:
                continue
            return entry, self._contents[key]
        raise AdapterFileError(f"The adapter '{name}' is being written: {self.entries[name].folder}.")


def _folders(root: Path) -> Iterator[tuple[str, Path]]:
    """(name, folder) of every folder that may be an adapter."""
    if (root / CONFIG_NAME).is_file():
        yield root.name, root
    with os.scandir(root) as found:
        below = sorted(item.name for item in found if item.is_dir() and not item.name.startswith("."))
    for name in below:
        if (root / name / CONFIG_NAME).is_file():
            yield name, root / name
