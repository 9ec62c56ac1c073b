"""Files of rows: JSONL, JSON, CSV, TSV, Parquet and text, gzipped or not. A bad row is a reason, not an end."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from trimtab.core.extras import need
from trimtab.errors import DataError
from trimtab.train.kinds import kind_of

# What a reader yields: where ("line 7"), and the row there or what is wrong with it.
Found = tuple[str, "dict[str, Any] | DataError"]

BROKEN = re.compile("[\udc80-\udcff]")  # what `surrogateescape` makes of bytes that are not UTF-8
INSTEAD = {
    ".xlsx": "save the sheet as CSV", ".xls": "save the sheet as CSV", ".zip": "unpack it", ".zst": "unpack it",
    ".bz2": "unpack it", ".xz": "unpack it", ".pdf": "extract its text", ".docx": "save it as text",
    ".arrow": "name the folder that save_to_disk made",
}  # fmt: skip


def suffix_of(path: Path) -> str:
    """ ".jsonl" of rows.jsonl and of rows.jsonl.gz."""
    inner = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    return inner.suffix.lower()


def read_file(path: Path) -> Iterator[Found]:
    """Each row of a file, or what is wrong with it.

    Raises:
        DataError: the file as a whole cannot be read, with the reason.
    """
    reader = READERS.get(suffix_of(path))
    if reader is None:
        instead = INSTEAD.get(suffix_of(path), "")
        what = f"cannot read {suffix_of(path)} files" if suffix_of(path) else "the name has no suffix"
        raise DataError(f"{path}: {what}; " + (f"{instead}, or " if instead else "") + f"use {', '.join(READERS)}.")
    try:
        yield from reader(path)
    except (OSError, EOFError, zlib.error, UnicodeError) as e:
        raise DataError(f"{path} cannot be read: {e}") from e


def _open(path: Path, newline: str | None = None) -> io.TextIOWrapper:
    """Text of a file in UTF-8, or in UTF-16 where its first bytes say so. Wrong bytes come as `BROKEN`."""
    opened = gzip.open if path.suffix.lower() == ".gz" else Path.open
    raw = cast(io.BufferedReader, opened(path, "rb"))
    wide = raw.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    encoding = "utf-16" if wide else "utf-8-sig"
    return io.TextIOWrapper(raw, encoding, errors="surrogateescape", newline=newline)


def _broken(text: str) -> DataError | None:
    found = BROKEN.search(text)
    if found is None:
        return None
    byte = ord(found.group()) - 0xDC00
    return DataError(
        f"the byte 0x{byte:02X} at character {found.start() + 1} is not UTF-8: save the file as UTF-8 "
        "(it may be in Windows-1252 or Latin-1)"
    )


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, line) of the lines that are not blank. Lines end at line feeds only: JSON may hold other breaks."""
    with _open(path) as file:
        yield from ((number, line) for number, line in enumerate(file, start=1) if line.strip())


# --- JSON -------------------------------------------------------------------------------------------------------------


def _jsonl(path: Path) -> Iterator[Found]:
    for number, line in _lines(path):
        yield f"line {number}", _broken(line) or _object(line.rstrip())
        if number == 1 and line.strip() == "[":
            raise DataError(f"{path} is one JSON list over several lines, not an object a line: name it .json.")


def _object(line: str) -> dict[str, Any] | DataError:
    """The JSON object of one line, or what is wrong with it."""
    try:
        row = _loads(line)
    except json.JSONDecodeError as e:
        hint = ": JSON wants double quotes" if line.lstrip().startswith("{'") else ""
        return DataError(f"not JSON: {e.msg} (column {e.colno}){hint}")
    except (ValueError, RecursionError) as e:
        return DataError(f"not JSON that can be read: {e}")
    return _row(row)


def _loads(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} occurs twice in one object")
    return found


def _row(value: Any) -> dict[str, Any] | DataError:
    if not isinstance(value, dict):
        return DataError(f"it is a {type(value).__name__}, and every row must be a JSON object {{...}}")
    try:  # half a surrogate pair, written as an escape, is legal JSON, and no text
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as e:
        return DataError(f"it holds half a character ({e.object[e.start]!r}): emoji cut in the middle?")
    return value


def _json(path: Path) -> Iterator[Found]:
    """A list of objects, {"data": a list of them}, one object, or JSON lines under another name."""
    with _open(path) as file:
        text = file.read()
    if fault := _broken(text):
        raise DataError(f"{path}: {fault}")
    if not text.strip():
        return
    try:
        found = _loads(text)
    except json.JSONDecodeError as e:
        if e.msg == "Extra data":  # one object a line
            yield from _jsonl(path)
            return
        raise DataError(f"{path}, line {e.lineno}, column {e.colno}: not JSON: {e.msg}") from e
    except (ValueError, RecursionError) as e:
        raise DataError(f"{path}: not JSON that can be read: {e}") from e
    if isinstance(found, dict) and not kind_of(found):
        if not isinstance(found.get("data"), list):
            keys = ", ".join(map(repr, list(found)[:8])) or "none"
            raise DataError(f"{path} is one JSON object with the keys {keys}: expected a list of rows, or 'data'.")
        found = found["data"]
    rows = found if isinstance(found, list) else [found]
    yield from ((f"item {number}", _row(row)) for number, row in enumerate(rows, start=1))


# --- tables -----------------------------------------------------------------------------------------------------------


def _csv(path: Path) -> Iterator[Found]:
    with _open(path, newline="") as file:
        text = file.read()
    limit = csv.field_size_limit(2**31 - 1)  # the default, 128 KiB, is less than a long document
    try:
        yield from list(_records(path, text))
    finally:
        csv.field_size_limit(limit)


def _records(path: Path, text: str) -> Iterator[Found]:
    # strict: without it an unclosed quote swallows the rest of the file and says nothing
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(path, text), strict=True)
    header: list[str] = []
    while True:
        place = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as e:
            hint = " (a quote is opened here and never closed)" if "unexpected end" in str(e) else ""
            if not header:
                raise DataError(f"{path}, line {place}: the header is no CSV: {e}{hint}.") from e
            yield f"line {place}", DataError(f"no CSV: {e}{hint}")
            continue
        if not any(cell.strip() for cell in cells):
            if len(cells) > 1:  # commas alone: a row all of whose cells are empty
                yield f"line {place}", DataError("all of its cells are empty")
            continue
        if not header:
            header = _header(path, place, cells)
        elif len(cells) != len(header):
            yield f"line {place}", DataError(f"it has {len(cells)} cells, and the header {len(header)} (quotes?)")
        else:
            yield f"line {place}", _broken("".join(cells)) or dict(zip(header, cells))


def _delimiter(path: Path, text: str) -> str:
    if suffix_of(path) == ".tsv":
        return "\t"
    header = next((line for line in text.splitlines() if line.strip()), "")
    return next((mark for mark in ",;\t|" if mark in header), ",")  # spreadsheets of many countries write semicolons


def _header(path: Path, line: int, cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    if fault := _broken("".join(names)):
        raise DataError(f"{path}, line {line}: {fault}.")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"{path}, line {line}: the header names {', '.join(map(repr, twice))} more than once.")
    return names


def _parquet(path: Path) -> Iterator[Found]:
    need(f"Reading Parquet ({path})", "pyarrow")
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise DataError(f"{path} has several columns named {', '.join(map(repr, twice))}.")
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            yield from ((f"row {number}", row) for number, row in enumerate(rows, start=1))
    except pyarrow.ArrowException as e:
        raise DataError(f"{path} is no Parquet file that can be read: {e}") from e


def _txt(path: Path) -> Iterator[Found]:
    for number, line in _lines(path):
        yield f"line {number}", _broken(line) or {"text": line.rstrip("\r\n")}


READERS: dict[str, Callable[[Path], Iterator[Found]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".txt": _txt,
}
TABLES = {".csv", ".tsv", ".parquet"}  # whose columns have an order
