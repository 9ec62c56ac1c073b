"""Rows from files, folders, saved data sets and the Hub; columns by name or by order."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from trimtab.errors import DataError, MissingPackageError
from trimtab.train.rows import Rows, load_rows, splits


def write(path: Path, *texts: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return path


def texts(rows: Rows) -> list[str]:
    return [row["text"] for row in rows]


# --- folders ---


@pytest.mark.parametrize("other", ["valid", "validation", "val", "eval", "dev"])
def test_a_folder_has_its_splits_by_name(other, tmp_path) -> None:
    write(tmp_path / "train.jsonl", "a", "b")
    write(tmp_path / f"{other}.jsonl", "v")
    write(tmp_path / "test.jsonl", "t")
    (tmp_path / "README.txt").write_text("no rows")
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / ".hidden.jsonl").write_text("x")
    assert splits(tmp_path) == ["train", "valid", "test"]
    assert texts(load_rows(tmp_path)) == texts(load_rows(tmp_path, split="train")) == ["a", "b"]
    assert texts(load_rows(tmp_path, split="valid")) == texts(load_rows(tmp_path, split=other)) == ["v"]
    assert load_rows(tmp_path, split="test").where(0) == "test.jsonl, line 1"


def test_parts_of_a_split_come_in_their_order(tmp_path) -> None:
    for i in (1, 0):
        table = pa.Table.from_pylist([{"text": f"{i}"}])
        (tmp_path / "data").mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / "data" / f"train-0000{i}-of-00002.parquet")
    write(tmp_path / "my_test.jsonl", "t")
    write(tmp_path / "valid" / "part.jsonl", "v")
    rows = load_rows(tmp_path)
    assert texts(rows) == ["0", "1"]
    assert rows.where(1) == str(Path("data", "train-00001-of-00002.parquet, row 1"))
    assert splits(tmp_path) == ["train", "valid", "test"]


def test_a_folder_without_split_names_is_all_training_data(tmp_path) -> None:
    write(tmp_path / "a.jsonl", "a")
    write(tmp_path / "b.jsonl", "b")
    assert texts(load_rows(tmp_path)) == ["a", "b"]
    with pytest.raises(DataError, match="has no split 'valid'; it has no named ones"):
        load_rows(tmp_path, split="valid")


def test_a_folder_that_does_not_have_what_is_asked_says_what_it_has(tmp_path) -> None:
    with pytest.raises(DataError, match="holds no files of rows"):
        load_rows(tmp_path)
    write(tmp_path / "test.jsonl", "t")
    with pytest.raises(DataError, match="has no split 'train'; it has test"):
        load_rows(tmp_path)
    write(tmp_path / "train.jsonl", "a")
    with pytest.raises(DataError, match="has no split 'tset'; it has test, train"):
        load_rows(tmp_path, split="tset")
    (tmp_path / "train.csv").write_text("text\na\n")
    with pytest.raises(DataError, match=r"files of several kinds \(\.csv, \.jsonl\)"):
        load_rows(tmp_path)


def test_a_file_has_no_splits(tmp_path) -> None:
    path = write(tmp_path / "rows.jsonl", "a")
    assert texts(load_rows(path, split="train")) == ["a"]
    assert splits(path) == []
    with pytest.raises(DataError, match="one file, so it has no split 'test'"):
        load_rows(path, split="test")


def test_a_missing_file_is_named_with_its_neighbour(tmp_path) -> None:
    write(tmp_path / "train.jsonl", "a")
    with pytest.raises(DataError, match=r"There is no file or folder .*trian\.jsonl\. Did you mean .*train\.jsonl\?"):
        load_rows(tmp_path / "trian.jsonl")
    with pytest.raises(DataError, match="There is no file or folder"):
        load_rows("nowhere/at/all")


# --- datasets ---


def test_a_folder_that_datasets_saved(tmp_path) -> None:
    part = Dataset.from_list([{"text": "a"}, {"text": "b"}])
    part.save_to_disk(tmp_path / "one")
    assert texts(load_rows(tmp_path / "one")) == ["a", "b"]
    assert splits(tmp_path / "one") == ["train"]
    with pytest.raises(DataError, match="has no splits, so no 'test'"):
        load_rows(tmp_path / "one", split="test")
    DatasetDict(train=part, validation=part.select([1])).save_to_disk(tmp_path / "two")
    assert splits(tmp_path / "two") == ["train", "valid"]
    rows = load_rows(tmp_path / "two", split="valid")
    assert texts(rows) == ["b"]
    assert rows.where(0).endswith("two, row 1")
    with pytest.raises(DataError, match="has no split 'test'; it has train, validation"):
        load_rows(tmp_path / "two", split="test")


def test_what_is_not_here_is_asked_of_the_hub(monkeypatch) -> None:
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match="no file or folder 'nobody/nothing' here, and the Hub data set of that id"):
        load_rows("nobody/nothing")


def test_a_hub_data_set_by_its_configuration_and_split(monkeypatch) -> None:
    import datasets

    part = Dataset.from_list([{"frage": "a", "antwort": "b"}, {"frage": "c", "antwort": "d"}])
    asked = []

    def load(*names, **options):  # what the Hub would send
        asked.append((names, options))
        return part if "split" in options else DatasetDict(train=part, validation=part.select([1]))

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = load_rows("org/name:main", split="valid")
    assert rows == [{"question": "c", "answer": "d"}]
    assert rows.where(0) == "org/name:main, row 1"
    assert len(load_rows("org/name")) == 2
    assert len(load_rows("org/name", split="train[:50%]")) == 2
    assert asked == [
        (("org/name", "main"), {}),
        (("org/name", None), {}),
        (("org/name", None), {"split": "train[:50%]"}),
    ]


def test_without_datasets_an_error_names_what_to_install(monkeypatch, tmp_path) -> None:
    Dataset.from_list([{"text": "a"}]).save_to_disk(tmp_path / "saved")
    monkeypatch.setitem(sys.modules, "datasets", None)
    for source in ("nobody/nothing", tmp_path / "saved"):
        with pytest.raises(
            MissingPackageError, match=r"needs datasets, not installed here: pip install .trimtab\[data\]"
        ):
            load_rows(source)


def test_without_pyarrow_an_error_names_what_to_install(monkeypatch, tmp_path) -> None:
    pq.write_table(pa.Table.from_pylist([{"text": "a"}]), tmp_path / "r.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingPackageError, match=r"needs pyarrow, not installed here: pip install .trimtab\[data\]"):
        load_rows(tmp_path / "r.parquet")


# --- columns ---


def csv(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_table_of_two_columns_needs_no_names(tmp_path) -> None:
    rows = load_rows(csv(tmp_path / "r.csv", "Frage,Antwort\n2+2?,4\n"))
    assert rows == [{"question": "2+2?", "answer": "4"}]
    assert rows.mapped == {"question": "Frage", "answer": "Antwort"}
    rows = load_rows(csv(tmp_path / "r.csv", ",Frage,Antwort\n0,2+2?,4\n"))  # as pandas numbers them
    assert rows == [{"question": "2+2?", "answer": "4"}]
    assert load_rows(csv(tmp_path / "r.csv", "Satz\nEin Satz.\n")) == [{"text": "Ein Satz."}]


def test_known_names_are_left_alone(tmp_path) -> None:
    rows = load_rows(csv(tmp_path / "r.csv", "Answer,Question\n4,2+2?\n"))
    assert rows == [{"Answer": "4", "Question": "2+2?"}]
    assert rows.mapped == {}
    assert list(load_rows(csv(tmp_path / "r.csv", "a,b,c\n1,2,3\n"))[0]) == ["a", "b", "c"]
    (tmp_path / "r.jsonl").write_text('{"Frage": "a", "Antwort": "b"}')  # the keys of an object have no order
    assert load_rows(tmp_path / "r.jsonl") == [{"Frage": "a", "Antwort": "b"}]


@pytest.mark.parametrize("header", ["What is 2+2?,4", "1,2", f"{'x' * 61},y", "A sentence.,Ein Satz."])
def test_a_table_without_a_header_is_not_robbed_of_its_first_row(header, tmp_path) -> None:
    with pytest.raises(DataError, match="is no names of columns: put some above it"):
        load_rows(csv(tmp_path / "r.csv", f"{header}\na,b\n"))


def test_columns_can_be_mapped(tmp_path) -> None:
    row = {"q": "a", "r": "b", "text": "junk", "messages": [], "system": "Be brief.", "tools": "[]"}
    (tmp_path / "r.jsonl").write_text(json.dumps(row))
    rows = load_rows(tmp_path / "r.jsonl", columns={"prompt": "q", "completion": "r"})
    assert rows == [{"system": "Be brief.", "tools": "[]", "prompt": "a", "completion": "b"}]
    assert load_rows(csv(tmp_path / "r.csv", "text,label\na,1\n"), columns={"text": "text"}) == [{"text": "a"}]


def test_a_column_that_is_not_there_is_named_with_its_neighbour(tmp_path) -> None:
    path = csv(tmp_path / "r.csv", "question,answer\na,b\n")
    with pytest.raises(
        DataError, match=r"has no column 'questoin'; it has answer, question\. Did you mean 'question'\?"
    ):
        load_rows(path, columns={"prompt": "questoin"})
    with pytest.raises(DataError, match="'promt' is no part of a row: did you mean 'prompt'"):
        load_rows(path, columns={"promt": "question"})
    (tmp_path / "r.jsonl").write_text('{"q": "a"}\n{"k": "b"}')
    with pytest.raises(DataError, match=r"r\.jsonl, line 2: it has no 'q'; it has k"):
        load_rows(tmp_path / "r.jsonl", columns={"text": "q"})
    rows = load_rows(tmp_path / "r.jsonl", columns={"text": "q"}, skip_bad=True)
    assert rows == [{"text": "a"}]
    assert len(rows.skipped) == 1
