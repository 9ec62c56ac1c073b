"""How files that belong together are written: all of them or none, whenever the process dies.

They are staged in a hidden folder beside their places, which then takes the name `JOURNAL` by one rename: from there on
the save is complete, and only has to be moved into place. First the old `seal` goes (the file without which the others
are nothing): from that moment the new save counts. Then its files take their names, its own seal the last. So a reader
that knows nothing of this finds two files of one save, or no seal; ours looks into the journal as well. What a killed
save leaves is moved into place, or away, by the next save; a load changes nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: saves are as whole as elsewhere, but several at once are not kept apart
    fcntl = None  # type: ignore[assignment]

STAGE = ".trimtab-stage-"  # what a folder's name begins with in which files are being written
JOURNAL = ".trimtab-save"  # a save that is complete and not yet in place
MANIFEST = ".manifest.json"
PATIENCE = 10.0  # seconds to wait for another process; one that was stopped while it reads must not stop a training


def write_whole(
    files: Mapping[Path, Callable[[Path], None]], seal: str | None = None, remove: Iterable[Path] = ()
) -> None:
    """Write several files: each writer gets a path to write to; only when all have succeeded do they take their names.

    A failure or a kill at any point leaves, to `locate`, the old files or the new ones.

    Args:
        files: path -> what writes it.
        seal: the name of the file in each folder without which its other files are nothing; without one, each file is
            whole for itself.
        remove: files of an earlier save that the new one has no use for.
    """
    if not files:
        return
    root = Path(os.path.commonpath([path.parent for path in files]))
    for folder in (root, *(path.parent for path in files)):
        folder.mkdir(parents=True, exist_ok=True)
    names = {path: path.relative_to(root).as_posix() for path in files}
    with _staging(root) as stage:
        mode = stage.stat().st_mode & 0o666  # what the umask leaves
        for path, write in files.items():
            staged = stage / names[path]
            staged.parent.mkdir(parents=True, exist_ok=True)
            write(staged)
            staged.chmod(mode)
            _sync(staged)
        manifest = {
            "files": sorted(names.values(), key=lambda name: Path(name).name == seal),
            "seals": [name for path, name in names.items() if path.name == seal],
            "remove": [path.relative_to(root).as_posix() for path in remove],
        }
        (stage / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
        _sync(stage / MANIFEST)
        with _locked(root):
            _recover(root)
            if seal is None:
                _move(stage, root, manifest)
            else:
                stage.rename(root / JOURNAL)
                _finish(root)


@contextlib.contextmanager
def reading(folder_or_id: str | os.PathLike[str], subfolder: str | None = None) -> Iterator[None]:
    """Inside the block no save of ours changes the folder, so that all files read are of one save."""
    folder = (Path(folder_or_id) / (subfolder or "")).resolve()
    with contextlib.ExitStack() as stack:
        for place in (folder.parent, folder):  # adapters in subfolders are saved together with the one above them
            stack.enter_context(_locked(place, shared=True))
        yield


# ------------------------------------------------------------------ the journal
def present(folder: Path, name: str) -> Path | None:
    """Where a file of a folder is: in its place, or still in the journal of a save that was killed."""
    whole = folder.resolve()
    for place, key in ((whole, name), (whole.parent, f"{whole.name}/{name}")):
        manifest = _manifest(place)
        if manifest and _counts(place, manifest):
            if (place / JOURNAL / key).is_file():
                return place / JOURNAL / key
            if key in manifest["remove"]:
                return None
    return folder / name if (folder / name).is_file() else None


def _manifest(root: Path) -> dict[str, list[str]] | None:
    """What the journal of a folder holds, or None where there is none."""
    try:
        found = json.loads((root / JOURNAL / MANIFEST).read_text(encoding="utf-8"))
        return {key: [_below(name) for name in found[key]] for key in ("files", "seals", "remove")}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _below(name: str) -> str:
    """The name, if it is of a file in a folder or in one of its own folders: nobody's journal reaches beyond."""
    parts = name.split("/")
    if len(parts) > 2 or {"", ".", ".."} & {*parts} or os.sep in name.replace("/", ""):
        raise ValueError(name)
    return name


def _counts(root: Path, manifest: Mapping[str, list[str]]) -> bool:
    """Whether the save in the journal is the one that counts: an old seal is gone, a new one not yet in its place.

    Where every seal is there, its folder is whole without the journal: nothing was moved, or others have saved since.
    """
    waiting = [name for name in manifest["seals"] if (root / JOURNAL / name).is_file()]
    return any(not (root / name).is_file() for name in waiting)


def _recover(root: Path) -> None:
    """Finish the save that was killed here, or clear it away if it had not begun to move; needs the lock."""
    if (root / JOURNAL).is_dir():
        manifest = _manifest(root)
        if manifest and _counts(root, manifest):
            _finish(root)
        else:
            _discard(root / JOURNAL)


def _finish(root: Path) -> None:
    """Move what is in the journal into place."""
    journal, manifest = root / JOURNAL, _manifest(root)
    assert manifest is not None
    for name in manifest["seals"]:
        if (journal / name).is_file():
            (root / name).unlink(missing_ok=True)
    for name in manifest["remove"]:
        (root / name).unlink(missing_ok=True)
    _move(journal, root, manifest)
    _discard(journal)


def _move(stage: Path, root: Path, manifest: Mapping[str, list[str]]) -> None:
    for name in manifest["files"]:
        if (stage / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)  # gone since, of a save that was killed
            (stage / name).replace(root / name)


def _discard(journal: Path) -> None:
    """Remove a journal; a kill in the middle leaves nothing that could be taken for one."""
    away = journal.with_name(f"{STAGE}{os.urandom(4).hex()}")
    journal.rename(away)
    shutil.rmtree(away, ignore_errors=True)


@contextlib.contextmanager
def _staging(root: Path) -> Iterator[Path]:
    """A folder in `root` to write to, removed afterwards, locked so that others know that its process lives."""
    above = root.resolve().parent
    if (above / JOURNAL).is_dir():
        with _locked(above):
            _recover(above)
    with contextlib.ExitStack() as stack:
        with _locked(root):
            _recover(root)
            for left in root.glob(f"{STAGE}*"):
                with _locked(left, patience=0) as alone:
                    if alone:  # of a process that was killed
                        shutil.rmtree(left, ignore_errors=True)
            stage = root / f"{STAGE}{os.urandom(4).hex()}"
            stage.mkdir()
            stack.callback(shutil.rmtree, stage, ignore_errors=True)
            stack.enter_context(_locked(stage))
        yield stage


@contextlib.contextmanager
def _locked(folder: Path, shared: bool = False, patience: float | None = None) -> Iterator[bool]:
    """Keep others out of a folder, or with `shared` those who write; False where that cannot be had in time."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        yield False
        return
    try:
        yield _lock(handle, shared, time.monotonic() + (PATIENCE if patience is None else patience))
    finally:
        if fcntl is not None:
            with contextlib.suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_UN)  # closing would leave it to children that were forked meanwhile
        os.close(handle)


def _lock(handle: int, shared: bool, deadline: float) -> bool:
    if fcntl is None:
        return False
    while True:
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.002)
        except OSError:  # a file system that has no locks
            return False


def _sync(path: Path) -> None:
    """Have a file's content on the disk before it takes its name; of the steps that follow, file systems keep order."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
