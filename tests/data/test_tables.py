"""Rows of Parquet files and datasets: read like lines, refused where a column is not what it must be."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from harness.reading import skipped, texts_of, write_dataset, write_parquet
from harness.spoiling import changed_json, put

from adept_ds.base.errors import InputError
from adept_ds.data import tables

TEXT = pa.string()


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["a", "b"]),
        pa.array(["a", "b"], pa.large_string()),
        pa.array(["a", "b"], pa.string_view()),
        pa.array(["a", "b"]).dictionary_encode(),
    ],
    ids=["string", "large", "view", "dictionary"],
)
def test_a_column_of_any_kind_of_string_is_text(tmp_path: Path, column: pa.Array) -> None:
    assert texts_of(write_parquet(tmp_path / "c", {"id": [1, 2], "body": column}), text_key="body") == ["a", "b"]


@pytest.mark.parametrize("write", [write_parquet, write_dataset], ids=["parquet", "dataset"])
def test_questions_stand_in_three_columns(tmp_path: Path, write: Callable[[Path, dict[str, Any]], Path]) -> None:
    path = write(tmp_path / "q", {"question": ["2 + 2?"], "choices": [["3", "4"]], "answer": [1], "x": [0]})
    assert texts_of(path, question_template="{{ question }} {{ answer }}") == ["2 + 2? 4"]


@pytest.mark.parametrize("write", [write_parquet, write_dataset], ids=["parquet", "dataset"])
def test_bad_rows_are_skipped_and_counted(tmp_path: Path, write: Callable[[Path, dict[str, Any]], Path]) -> None:
    path = write(tmp_path / "c", {"text": ["a", None, "b", " ", "c\0", "d"]})
    with pytest.raises(InputError, match=r"^data\.domain: '.*c' row 2: 'text' is null"):
        texts_of(path)
    texts, bad = skipped(path, allowed=3)
    assert (texts, bad.count) == (["a", "b", "d"], 3)
    assert [place.split(":")[0] for place in bad.places] == [f"'{path}' row {row}" for row in (2, 4, 5)]


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    table = pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "c")
    with pytest.raises(InputError, match=r"^data\.domain: '.*c'.* has more than one column 'text'; rename"):
        texts_of(tmp_path / "c")


def test_a_row_that_is_not_utf8_is_a_bad_row(tmp_path: Path) -> None:
    offsets, characters = pa.py_buffer(b"\0\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"\xff\xfea")
    path = write_parquet(tmp_path / "c", {"text": pa.Array.from_buffers(TEXT, 2, [None, offsets, characters])})
    texts, bad = skipped(path, allowed=1)
    assert (texts, bad.places) == (["a"], [f"'{path}' row 1: 'text' is not UTF-8; convert it"])


@pytest.mark.parametrize("write", [write_parquet, write_dataset], ids=["parquet", "dataset"])
@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"txt": ["a"], "id": [1]}, "no 'text', only 'txt', 'id'; set data.text_key"),
        ({"question": ["a"], "answer": [1]}, "no 'text', only 'question', 'answer'"),
        ({"text": [1, 2]}, "column 'text' holds int64, not texts"),
        ({"text": [["a"]]}, "column 'text' holds list<.*>, not texts"),
        ({"text": [b"a"]}, "column 'text' holds binary, not texts"),
    ],
    ids=["missing", "half a question", "numbers", "lists", "bytes"],
)
def test_columns_are_looked_at_before_rows(
    tmp_path: Path, write: Callable[[Path, dict[str, Any]], Path], columns: dict[str, Any], words: str
) -> None:
    path = write(tmp_path / "c", columns)
    with pytest.raises(InputError, match=rf"^data\.domain: '.*c': {words}"):
        texts_of(path, max_bad_records=99)


def test_a_table_without_rows_has_no_texts(tmp_path: Path) -> None:
    assert texts_of(write_parquet(tmp_path / "c", {"text": pa.array([], TEXT)})) == []


def test_batches_are_small_where_rows_are_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the size of batches, all rows come once."""
    texts = [f"{number} " * 50 for number in range(100)]
    path = write_parquet(tmp_path / "c", {"text": texts}, row_group_size=33)
    for limit in (1, 1000, 10_000, 10**9):
        monkeypatch.setattr(tables, "_BATCH_BYTES", limit)
        assert texts_of(path) == texts


def test_a_damaged_table_is_refused_or_read_but_never_a_traceback(tmp_path: Path) -> None:
    whole = write_parquet(tmp_path / "whole", {"text": [f"row {number}" for number in range(99)]}).read_bytes()
    generator, refused = random.Random(0), 0
    for number in range(300):
        content = bytearray(whole)
        for _ in range(1 + number % 3):
            content[generator.randrange(4, len(content))] ^= 1 << generator.randrange(8)
        path = tmp_path / "c"
        path.write_bytes(content)
        try:
            skipped(path, allowed=99)
        except InputError as refusal:
            refused += 1
            assert str(path) in str(refusal)
    assert refused > 50


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "no data": lambda path: (path / "data-00000-of-00001.arrow").unlink(),
    "cut data": lambda path: os.truncate(path / "data-00000-of-00001.arrow", 300),
    "other data": lambda path: (path / "data-00000-of-00001.arrow").write_text("{}"),
    "empty state": lambda path: (path / "state.json").write_text(""),
    "state of a list": lambda path: (path / "state.json").write_text("[]"),
    "files of numbers": put("state.json", "_data_files", value=[7]),
    "no files": put("state.json", "_data_files", value=[]),
    "file outside": put("state.json", "_data_files", value=[{"filename": "../other/data-00000-of-00001.arrow"}]),
    "file elsewhere": put("state.json", "_data_files", value=[{"filename": "/etc/passwd"}]),
    "list as description": lambda path: (path / "dataset_info.json").write_text("[]"),
    "description of numbers": lambda path: changed_json(path / "dataset_info.json", lambda _: {"features": 7}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_dataset_is_refused_in_one_line(tmp_path: Path, damage: str) -> None:
    for name in ("c", "other"):
        write_dataset(tmp_path / name, {"text": ["a", "b"]})
    DAMAGES[damage](tmp_path / "c")
    with pytest.raises(InputError, match=r"^data\.domain: '.*c'") as refusal:
        texts_of(tmp_path / "c", max_bad_records=99)
    assert "\n" not in str(refusal.value)
