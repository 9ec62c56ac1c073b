"""Rows from whatever the user names: a file, a folder of files, a folder that `datasets` saved, a Hub data set.

Every row knows where it comes from, and every bad row is reported with its reason: all of them at once.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, overload

from trimtab.core.extras import need
from trimtab.errors import DataError
from trimtab.train.kinds import BESIDE, KEYS, NUMBERING, kind_of
from trimtab.train.readers import READERS, TABLES, Found, read_file, suffix_of

__all__ = ["Fault", "Rows", "load_rows", "raise_faults", "splits"]

SPLITS = {
    "train": "train", "training": "train",
    "valid": "valid", "validation": "valid", "val": "valid", "eval": "valid", "evaluation": "valid", "dev": "valid",
    "test": "test", "testing": "test",
}  # fmt: skip
NOT_ROWS = {
    "readme.txt", "license.txt", "notice.txt", "requirements.txt", "dataset_info.json", "dataset_infos.json",
    "dataset_dict.json", "state.json",
}  # fmt: skip
SHOWN = 10  # faults that an error spells out


@dataclass(frozen=True)
class Fault:
    """A row that cannot be used, and why."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


def raise_faults(faults: Sequence[Fault], what: str) -> NoReturn:
    """Raise one error for all of them, of which it shows the first."""
    shown = "".join(f"\n  {fault}" for fault in faults[:SHOWN])
    more = f"\n  and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
    raise DataError(f"{len(faults)} {what}:{shown}{more}")


class Rows(Sequence[dict[str, Any]]):
    """Rows that know where they are from.

    Attributes:
        source: what the user named.
        skipped: rows that could not be read, where they were to be skipped.
        mapped: our name -> the column it was read from, by the user's word or by the columns' order.
    """

    def __init__(
        self,
        rows: Sequence[Any],
        places: Sequence[str] | None = None,
        source: str = "the rows",
        skipped: Iterable[Fault] = (),
        mapped: Mapping[str, str] | None = None,
    ) -> None:
        self._rows = rows
        self._places = [f"row {i}" for i in range(1, len(rows) + 1)] if places is None else places
        self.source, self.skipped, self.mapped = source, list(skipped), dict(mapped or {})

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, i: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, i: slice) -> Rows: ...
    def __getitem__(self, i: int | slice) -> dict[str, Any] | Rows:
        if isinstance(i, slice):
            return Rows(self._rows[i], self._places[i], self.source, self.skipped, self.mapped)
        return self._rows[i]

    def pick(self, indices: Iterable[int]) -> Rows:
        """Some of them, in this order."""
        indices = list(indices)
        rows, places = [self._rows[i] for i in indices], [self._places[i] for i in indices]
        return Rows(rows, places, self.source, self.skipped, self.mapped)

    def where(self, i: int) -> str:
        """ "data.csv, line 7" """
        return self._places[i]

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, Sequence) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Rows({len(self)} of {self.source!r})"


def load_rows(
    source: str | os.PathLike[str],
    *,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    skip_bad: bool = False,
) -> Rows:
    """The rows of a file (.jsonl, .json, .csv, .tsv, .parquet, .txt, each also .gz), a folder or a Hub data set.

    Args:
        source: a path, or a Hub id, with its configuration after a colon ("openai/gsm8k:main").
        split: which part of a folder or data set; by default "train". "valid" is also found as validation, eval, dev.
        columns: our name -> the column to read it from, e.g. `{"prompt": "question", "completion": "answer"}`. Columns
            that are not named then count for nothing, but for a conversation's tools and system message.
        skip_bad: leave rows out that cannot be read, and note them in `skipped`.

    Raises:
        DataError: the source cannot be read, a column is not there, or rows are bad: each of them named.
    """
    name = os.fspath(source)
    found, ordered = _find(name, split)
    found = list(found)
    first = next((row for _, row in found if isinstance(row, dict)), {})
    mapped = dict(columns or (_by_order(name, first) if ordered else {}))
    if mapped and first:
        _check_columns(name, mapped, {key for _, row in found if isinstance(row, dict) for key in row})
        found = [(place, _renamed(row, mapped)) for place, row in found]
    faults = [Fault(place, str(row)) for place, row in found if isinstance(row, DataError)]
    if faults and not skip_bad:
        raise_faults(faults, f"row(s) of {name} cannot be read")
    good = [(place, row) for place, row in found if isinstance(row, dict)]
    if not good:
        raise DataError(f"{name} has no rows" + (f" that can be read: {faults[0]}" if faults else "."))
    return Rows([row for _, row in good], [place for place, _ in good], name, faults, mapped)


def splits(source: str | os.PathLike[str]) -> list[str]:
    """Which of train, valid and test a folder has; nothing for a file, or for what is not here."""
    folder = Path(source)
    if not folder.is_dir():
        return []
    names = _load_saved(folder) if _is_saved(folder) else _by_split(folder)
    found = {SPLITS.get(str(name).lower()) for name in names} if isinstance(names, dict) else {"train"}
    return [name for name in ("train", "valid", "test") if name in found]


# --- where the rows are -----------------------------------------------------------------------------------------------


def _find(name: str, split: str | None) -> tuple[Iterable[Found], bool]:
    """Rows with their places, and whether their columns have an order that means something."""
    path = Path(name)
    if path.is_dir() and not _is_saved(path):
        files = _files(path, split)
        return _placed({str(file.relative_to(path)): file for file in files}), suffix_of(files[0]) in TABLES
    if path.is_dir():
        return _numbered(name, _choose(name, _load_saved(path), split)), True
    if not path.exists():
        return _numbered(name, _from_hub(name, split)), True
    if split is not None and SPLITS.get(split) != "train":
        raise DataError(f"{name} is one file, so it has no split {split!r}.")
    return _placed({path.name: path}), suffix_of(path) in TABLES


def _placed(files: Mapping[str, Path]) -> Iterator[Found]:
    for name, file in files.items():
        yield from ((f"{name}, {place}", row) for place, row in read_file(file))


def _numbered(name: str, rows: Iterable[Any]) -> Iterator[Found]:
    yield from ((f"{name}, row {number}", row) for number, row in enumerate(rows, start=1))


def _files(folder: Path, split: str | None) -> list[Path]:
    named = _by_split(folder)
    if not named:
        raise DataError(f"{folder} holds no files of rows ({', '.join(READERS)}).")
    wanted = SPLITS.get((split or "train").lower(), split)
    if wanted not in named and (split is not None or list(named) != [""]):
        there = ", ".join(sorted(filter(None, named))) or "no named ones"
        raise DataError(f"{folder} has no split {split or 'train'!r}; it has {there}.")
    files = named.get(wanted) or named[""]
    if len(kinds := sorted({suffix_of(file) for file in files})) > 1:
        raise DataError(f"{folder} holds files of several kinds ({', '.join(kinds)}): name one of them.")
    return files


def _by_split(folder: Path) -> dict[str | None, list[Path]]:
    """The files of rows in a folder by the split that their names say; "" for those that say none."""
    found: dict[str | None, list[Path]] = {}
    for file in sorted(folder.rglob("*")):
        parts = file.relative_to(folder).parts
        known = suffix_of(file) in READERS and file.is_file() and not any(part.startswith(".") for part in parts)
        if not known or file.name.lower() in NOT_ROWS:
            continue
        words = re.split(r"[-_.]", file.name.removesuffix(".gz").lower())[:-1]
        said = [word for word in (words[0], words[-1], *map(str.lower, parts[-2::-1])) if word in SPLITS]
        found.setdefault(SPLITS[said[0]] if said else "", []).append(file)
    return found


# --- through `datasets` -----------------------------------------------------------------------------------------------


def _is_saved(folder: Path) -> bool:
    return any((folder / file).is_file() for file in ("dataset_dict.json", "state.json"))


def _load_saved(folder: Path) -> Any:
    load = _datasets(f"{folder} was saved by `datasets`").load_from_disk
    try:
        return load(str(folder))
    except (OSError, ValueError, KeyError) as e:
        raise DataError(f"{folder} cannot be loaded: {e}") from e


def _from_hub(name: str, split: str | None) -> Any:
    path = Path(name)
    if path.is_absolute() or name.startswith(".") or name.count("/") > 1 or suffix_of(path) in READERS:
        folder = path.parent
        near = (
            difflib.get_close_matches(path.name, [file.name for file in folder.iterdir()], 1) if folder.is_dir() else []
        )
        raise DataError(f"There is no file or folder {name}." + (f" Did you mean {folder / near[0]}?" if near else ""))
    nothing = f"There is no file or folder {name!r} here"
    load = _datasets(f"{nothing}; as the id of a Hub data set it").load_dataset
    id, _, config = name.partition(":")
    try:
        if split and "[" in split:  # a slice, in the words of `datasets`
            return load(id, config or None, split=split)
        return _choose(name, load(id, config or None), split)
    except DataError:
        raise
    except Exception as e:  # the network, the Hub, the files there
        raise DataError(f"{nothing}, and the Hub data set of that id cannot be loaded: {e}") from e


def _datasets(why: str) -> Any:
    need(why, "datasets")
    import datasets

    return datasets


def _choose(name: str, data: Any, split: str | None) -> Any:
    """The split of a data set that has several."""
    if not isinstance(data, dict):
        if split is not None and SPLITS.get(split) != "train":
            raise DataError(f"{name} has no splits, so no {split!r}.")
        return data
    wanted = split or "train"
    same = [key for key in data if key == wanted] or [k for k in data if SPLITS.get(k) == SPLITS.get(wanted, wanted)]
    if not same:
        raise DataError(f"{name} has no split {wanted!r}; it has {', '.join(data)}.")
    return data[same[0]]


# --- columns ----------------------------------------------------------------------------------------------------------


def _by_order(name: str, row: Mapping[str, Any]) -> dict[str, str]:
    """A table of two columns of any names is what is asked and the answer; one column is text."""
    columns = [key for key in row if key.strip().lower() not in NUMBERING]
    if kind_of(dict.fromkeys(row, "")) or not 1 <= len(columns) <= 2:
        return {}
    if any(map(_looks_like_data, columns)):
        shown = ", ".join(map(repr, columns))
        raise DataError(
            f"{name}: its first line ({shown}) is no names of columns: put some above it, such as prompt,completion."
        )
    return dict(zip(["text"] if len(columns) == 1 else ["question", "answer"], columns))


def _looks_like_data(cell: str) -> bool:
    number = cell.replace(".", "", 1).replace("-", "", 1).isdigit()
    return number or len(cell) > 60 or cell.endswith(("?", "!", ".")) or "\n" in cell


def _check_columns(name: str, mapped: Mapping[str, str], there: set[str]) -> None:
    for ours, theirs in mapped.items():
        if ours not in KEYS:
            near = difflib.get_close_matches(ours, KEYS, 1)
            hint = f": did you mean {near[0]!r}?" if near else f"; there is {', '.join(sorted(KEYS))}."
            raise DataError(f"columns: {ours!r} is no part of a row{hint}")
        if theirs not in there:
            near = difflib.get_close_matches(theirs, there, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise DataError(f"{name} has no column {theirs!r}; it has {', '.join(sorted(there))}.{hint}")


def _renamed(row: dict[str, Any] | DataError, mapped: Mapping[str, str]) -> dict[str, Any] | DataError:
    if isinstance(row, DataError):
        return row
    if missing := [theirs for theirs in mapped.values() if theirs not in row]:
        return DataError(f"it has no {missing[0]!r}; it has {', '.join(row) or 'nothing'}")
    beside = {key: row[key] for key in BESIDE if key in row}
    return {**beside, **{ours: row[theirs] for ours, theirs in mapped.items()}}
