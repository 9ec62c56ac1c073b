"""Every kind of file is read as it is meant, or says where it is wrong and why."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.errors import DataError
from trimtab.train.rows import load_rows

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "ç,\n \u2028\x0b|;", "completion": ' "d" '}]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def as_csv(rows: list[dict[str, str]], mark: str = ",", end: str = "\n") -> str:
    def cell(text: str) -> str:
        return '"' + text.replace('"', '""') + '"'

    names = list(rows[0])
    return "".join(mark.join(map(cell, line)) + end for line in (names, *([row[n] for n in names] for row in rows)))


def good_files() -> dict[str, bytes]:
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    whole = json.dumps(ROWS, ensure_ascii=False, indent=1)
    return {
        "r.jsonl": lines.encode(),
        "crlf.jsonl": lines.replace("\n", "\r\n").encode(),
        "bom.jsonl": lines.encode("utf-8-sig"),
        "wide.jsonl": lines.encode("utf-16"),
        "r.ndjson": lines.encode(),
        "r.jsonl.gz": gzip.compress(lines.encode()),
        "lines.json": lines.encode(),
        "r.json": whole.encode(),
        "bom.json": whole.encode("utf-8-sig"),
        "data.json": json.dumps({"version": 1, "data": ROWS}).encode(),
        "r.JSON.GZ": gzip.compress(whole.encode()),
        "r.csv": as_csv(ROWS).encode(),
        "crlf.csv": as_csv(ROWS, end="\r\n").encode(),
        "bom.csv": as_csv(ROWS).encode("utf-8-sig"),
        "blank.csv": ("\n" + as_csv(ROWS) + "\n\n").encode(),
        "semicolons.csv": as_csv(ROWS, ";").encode(),
        "wide.csv": as_csv(ROWS, "\t").encode("utf-16"),  # what Excel calls Unicode text
        "r.tsv": as_csv(ROWS, "\t").encode(),
        "r.csv.gz": gzip.compress(as_csv(ROWS).encode()),
    }


@pytest.mark.parametrize("name", good_files())
def test_the_same_rows_from_every_kind_of_file(name, tmp_path) -> None:
    assert load_rows(write(tmp_path / name, good_files()[name])) == ROWS


def test_parquet_and_text(tmp_path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "r.parquet", row_group_size=1)
    rows = load_rows(tmp_path / "r.parquet")
    assert rows == ROWS
    assert rows.where(1) == "r.parquet, row 2"
    rows = load_rows(write(tmp_path / "r.txt", "One line. \r\n\r\n  Another.\n"))
    assert rows == [{"text": "One line. "}, {"text": "  Another."}]
    assert rows.where(1) == "r.txt, line 3"


def test_one_object_in_a_json_file_is_one_row(tmp_path) -> None:
    assert load_rows(write(tmp_path / "r.json", json.dumps(ROWS[0], indent=2))) == ROWS[:1]


def test_places_are_lines_of_the_file(tmp_path) -> None:
    rows = load_rows(write(tmp_path / "r.csv", 'prompt,completion\n\n"a\nb",c\nd,e\n'))
    assert [rows.where(i) for i in range(2)] == ["r.csv, line 3", "r.csv, line 5"]
    rows = load_rows(write(tmp_path / "r.jsonl", '\n{"text": "a"}\n\n{"text": "b"}\n'))
    assert [rows.where(i) for i in range(2)] == ["r.jsonl, line 2", "r.jsonl, line 4"]
    assert rows[1:].where(0) == rows.pick([1]).where(0) == "r.jsonl, line 4"


def test_a_long_cell_is_read(tmp_path) -> None:
    long = "x" * 300_000
    assert load_rows(write(tmp_path / "r.csv", f"prompt,completion\n{long},b\n"))[0]["prompt"] == long


# name, content, the place of the fault, and a part of the reason
BAD_ROWS = [
    ("r.jsonl", '{"text": "a"}\n{"text": \n', "line 2", r"not JSON: Expecting value \(column 9\)"),
    ("r.jsonl", '{"text": "a"}\n[1]\n', "line 2", "it is a list"),
    ("r.jsonl", "{'text': 'a'}\n{\"text\": \"a\"}", "line 1", "double quotes"),
    ("r.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', "line 2", "0xE9 at character 14 is not UTF-8"),
    ("r.jsonl", '{"text": "a"}\n{"text": "\\ud83d"}', "line 2", "half a character"),
    ("r.jsonl", '{"text": "a"}\n{"text": "a", "text": "b"}', "line 2", "'text' occurs twice"),
    ("r.json", '[{"text": "a"}, "b"]', "item 2", "it is a str"),
    ("r.csv", "prompt,completion\na,b\nc,d,e\n", "line 3", r"3 cells, and the header 2"),
    ("r.csv", "prompt,completion\na,b\nc\n", "line 3", r"1 cells, and the header 2"),
    ("r.csv", "prompt,completion\na,b\n,\n", "line 3", "all of its cells are empty"),
    ("r.csv", 'prompt,completion\na,b\n"c,d\ne,f\n', "line 3", "opened here and never closed"),
    ("r.csv", 'prompt,completion\na,b\n"c"d,e\n', "line 3", "no CSV"),
    ("r.csv", b"prompt,completion\na,b\n\xff,c\n", "line 3", "0xFF"),
    ("r.txt", b"a\n\xff\n", "line 2", "0xFF"),
]


@pytest.mark.parametrize(("name", "content", "place", "reason"), BAD_ROWS)
def test_a_bad_row_is_named_and_can_be_skipped(name, content, place, reason, tmp_path) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=f"1 row.*cannot be read:\n  {name}, {place}: .*{reason}"):
        load_rows(path)
    rows = load_rows(path, skip_bad=True)
    assert [fault.where for fault in rows.skipped] == [f"{name}, {place}"]
    assert len(rows) == 1


# files that cannot be read at all
BAD_FILES = [
    ("empty.jsonl", "", "has no rows"),
    ("blank.jsonl", "\n \n", "has no rows"),
    ("empty.json", " ", "has no rows"),
    ("list.json", "[]", "has no rows"),
    ("empty.csv", "", "has no rows"),
    ("header.csv", "prompt,completion\n", "has no rows"),
    ("empty.txt", "\n", "has no rows"),
    ("r.json", '[{"text": "a"},', r"r\.json, line 1, column \d+: not JSON"),
    ("r.json", '{"version": 3, "rows": 1}', "keys 'version', 'rows': expected a list of rows"),
    ("r.json", '[{"text": "a", "text": "b"}]', "'text' occurs twice"),
    ("r.json", b'[{"text": "\xff"}]', "0xFF"),
    ("list.jsonl", '[\n{"text": "a"}\n]', "one JSON list over several lines.*name it .json"),
    ("twice.csv", "text,text\na,b\n", "line 1: the header names 'text' more than once"),
    ("quote.csv", '"text\na\n', "line 1: the header is no CSV"),
    ("r.parquet", "", "no Parquet file"),
    ("r.parquet", "PAR1nonsense", "no Parquet file"),
    ("r.jsonl.gz", "no gzip", "cannot be read"),
    ("r.xlsx", "x", "cannot read .xlsx files; save the sheet as CSV, or use .jsonl"),
    ("rows", "x", "the name has no suffix; use .jsonl"),
]


@pytest.mark.parametrize(("name", "content", "reason"), BAD_FILES)
def test_a_file_that_cannot_be_read_says_why(name, content, reason, tmp_path) -> None:
    with pytest.raises(DataError, match=f"(?s){name}.*{reason}|{reason}"):
        load_rows(write(tmp_path / name, content))


def test_a_truncated_gzip_file_is_named(tmp_path) -> None:
    packed = gzip.compress(json.dumps(ROWS[0]).encode() * 50)
    with pytest.raises(DataError, match=r"r\.jsonl\.gz cannot be read"):
        load_rows(write(tmp_path / "r.jsonl.gz", packed[:-12]))


def test_parquet_with_two_columns_of_one_name(tmp_path) -> None:
    pq.write_table(
        pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), tmp_path / "r.parquet"
    )
    with pytest.raises(DataError, match="several columns named 'text'"):
        load_rows(tmp_path / "r.parquet")


def test_all_bad_rows_are_counted_and_ten_are_shown(tmp_path) -> None:
    path = write(tmp_path / "r.jsonl", '{"text": "a"}\n' + "x\n" * 14)
    with pytest.raises(DataError) as e:
        load_rows(path)
    lines = str(e.value).splitlines()
    assert lines[0].startswith("14 row(s) of")
    assert len(lines) == 12
    assert lines[-1] == "  and 4 more"
    with pytest.raises(DataError, match="has no rows that can be read"):
        load_rows(write(tmp_path / "bad.jsonl", "x\n"), skip_bad=True)


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.fixed_dictionaries({"prompt": TEXTS, "completion": TEXTS.filter(str.strip)}), min_size=1, max_size=4)
)
def test_what_is_written_is_read_whatever_the_text(tmp_path_factory, rows) -> None:
    folder = tmp_path_factory.mktemp("any")
    for ascii in (True, False):
        lines = "\n".join(json.dumps(row, ensure_ascii=ascii) for row in rows)
        assert load_rows(write(folder / "r.jsonl", lines)) == rows
        assert load_rows(write(folder / "r.json", json.dumps(rows, ensure_ascii=ascii))) == rows
    assert load_rows(write(folder / "r.csv", as_csv(rows))) == rows
