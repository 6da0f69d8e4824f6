"""Corpus files as documents: all of them in order, wherever reading begins, in bounded memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from harness.launching import ROOT
from harness.reading import (
    COMPRESSIONS,
    joined,
    json_lines,
    skipped,
    source_of,
    texts_of,
    write_dataset,
    write_parquet,
)

from adept_ds.base.errors import InputError
from adept_ds.config.corpus_entries import CorpusSource, Format
from adept_ds.config.data_section import DataSection
from adept_ds.data import documents
from adept_ds.data.documents import check_corpus, read_pieces
from adept_ds.data.formats import Found

TEXTS = [f"text {number} ä\n" for number in range(1000)]


def write_lines(path: Path) -> Path:
    path.write_bytes(json_lines(*TEXTS[:500]) + b"\n  \n" + json_lines(*TEXTS[500:]).rstrip())
    return path


WRITERS: dict[str, Callable[[Path], Path]] = {
    "lines": write_lines,
    "gzip": lambda path: compressed("gzip", path),
    "zstd": lambda path: compressed("zstd", path),
    "parquet": lambda path: write_parquet(path, {"id": list(range(1000)), "text": TEXTS}, row_group_size=300),
    "dataset": lambda path: write_dataset(path, {"id": list(range(1000)), "text": TEXTS}),
}


def compressed(how: str, path: Path) -> Path:
    path.write_bytes(COMPRESSIONS[how](write_lines(path).read_bytes()))
    return path


@pytest.mark.parametrize("format", WRITERS)
def test_documents_come_in_their_order_and_a_bar_reaches_its_end(tmp_path: Path, format: str) -> None:
    source = source_of(WRITERS[format](tmp_path / "one"), WRITERS["lines"](tmp_path / "two"))
    steps: list[int] = []
    assert joined(read_pieces(source, steps.append)) == TEXTS * 2
    assert sum(steps) == source.num_bytes
    if format != "dataset":
        assert source.num_bytes == sum(path.stat().st_size for path in source.files)


@pytest.mark.parametrize("format", WRITERS)
def test_reading_goes_on_behind_any_document(tmp_path: Path, format: str) -> None:
    source = source_of(WRITERS[format](tmp_path / "one"), WRITERS["lines"](tmp_path / "two"))
    places = {0: (0, 0)} | {number: piece.following for number, piece in enumerate(read_pieces(source), start=1)}
    for first in (0, 1, 299, 300, 301, 500, 777, 999, 1000, 1001, 1999, 2000):
        assert joined(read_pieces(source, skip=places[first])) == (TEXTS * 2)[first:]


def test_what_is_skipped_is_not_looked_at(tmp_path: Path) -> None:
    broken, lines = tmp_path / "broken", tmp_path / "lines"
    broken.write_bytes(b"\0\1\2")
    lines.write_bytes(b"no JSON\n" + json_lines("one", "two"))
    assert joined(read_pieces(source_of(broken, lines, format="jsonl"), skip=(1, 1))) == ["one", "two"]


def test_a_text_file_is_one_document_with_plain_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "book"
    path.write_bytes("\ufeffone\r\n\r{two}\n ä".encode())
    assert texts_of(path) == ["one\n\n{two}\n ä"]
    assert list(read_pieces(source_of(path), skip=(1, 0))) == []


def test_text_and_records_may_stand_side_by_side(tmp_path: Path) -> None:
    book, lines = tmp_path / "book.txt", tmp_path / "lines.txt"
    book.write_text("a book")
    lines.write_bytes(json_lines("a", "b"))
    assert texts_of(book, lines, book) == ["a book", "a", "b", "a book"]


def test_a_long_document_is_whole(tmp_path: Path) -> None:
    """As a text, cut at any byte while it is read, and as a record."""
    text = "\n".join(f"{number} ä数👩‍🔬" for number in range(60_000))
    book, lines = tmp_path / "book.txt", tmp_path / "c.jsonl"
    book.write_text(text, encoding="utf-8")
    lines.write_bytes(json_lines("short", text, "short"))
    assert texts_of(book) == [text]
    assert texts_of(lines) == ["short", text, "short"]
    assert sum(1 for _ in read_pieces(source_of(book))) > 2


def test_bad_records_are_skipped_and_counted_up_to_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(json_lines("one") + b"[1]\n\n{}\n" + json_lines("two", " ", "three"))
    texts, bad = skipped(path, allowed=3)
    assert (texts, bad.count) == (["one", "two", "three"], 3)
    assert [place.split(":")[0] for place in bad.places] == [f"'{path}' line {line}" for line in (2, 4, 6)]
    with pytest.raises(InputError, match=r"^data\.domain: 3 bad records are more than data\.max_bad_records \(2\)"):
        skipped(path, allowed=2)
    with pytest.raises(InputError, match=r"^data\.domain: '.*c\.jsonl' line 2: .*raise data\.max_bad_records"):
        texts_of(path)


def test_bad_records_are_those_of_all_files_of_a_source(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(json_lines("one", ""))
    assert skipped(tmp_path / "a", tmp_path / "b", allowed=2)[1].count == 2
    with pytest.raises(InputError, match=r"'.*a' line 2: .*'.*b' line 2: "):
        skipped(tmp_path / "a", tmp_path / "b", allowed=1)


def test_the_first_record_of_every_file_is_looked_at_beforehand(tmp_path: Path) -> None:
    good, late, early = (tmp_path / name for name in ("good", "late", "early"))
    good.write_bytes(json_lines("one"))
    late.write_bytes(json_lines("one") + b"{}\n")
    early.write_bytes(json_lines("one", key="body"))
    check_corpus("data.domain", [good, late], DataSection())
    with pytest.raises(InputError, match=r"^data\.domain: '.*early' line 1: no 'text', only 'body'; set data.text_key"):
        check_corpus("data.domain", [good, late, early], DataSection())
    check_corpus("data.domain", [good, CorpusSource(files=[early], text_key="body", name="b")], DataSection())
    check_corpus("data.domain", [early], DataSection(text_key="body"))
    check_corpus("data.domain", [early], DataSection(max_bad_records=1))
    check_corpus("data.domain", [early], DataSection(format="text"))


def test_of_many_files_some_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []
    real = documents.format_of

    def noted(key: str, path: Path, declared: Format) -> Found:
        opened.append(path)
        return real(key, path, declared)

    monkeypatch.setattr(documents, "format_of", noted)
    for number in range(999):
        (tmp_path / f"{number:03}").write_bytes(json_lines("one"))
    check_corpus("data.domain", [tmp_path], DataSection())
    assert 100 < len(opened) <= 200
    assert opened[0].name == "000" and opened[-1].name > "990"


@pytest.mark.parametrize("entry", [".", "*"])
def test_a_directory_of_records_may_not_have_a_text_among_them(tmp_path: Path, entry: str) -> None:
    """A README beside them would be trained on."""
    (tmp_path / "README.md").write_text("# The data")
    (tmp_path / "a.jsonl").write_bytes(json_lines("one"))
    with pytest.raises(
        InputError, match=r"plain text \('.*README\.md'\) and for JSON lines \('.*a\.jsonl'\); give a pattern"
    ):
        check_corpus("data.domain", [tmp_path / entry], DataSection())
    check_corpus("data.domain", [tmp_path / "*.jsonl", tmp_path / "README.md"], DataSection())


# --- memory ---------------------------------------------------------------------------------------------------------


_READ = """
import re, sys
from pathlib import Path
from adept_ds.data.documents import TextSource, read_pieces

def peak():
    # Not getrusage: its peak is that of the parent too, until the program begins.
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) >> 10

def read(name):
    source = TextSource("k", (Path(name),), "auto", "text", "", int(sys.argv[2]))
    return sum(piece.stop - piece.start for piece in read_pieces(source))

if "pyarrow" in sys.argv[3:]:
    import pyarrow.parquet
before = peak()
print(read(sys.argv[1]), peak() - before)
"""


def peak_of(path: Path, *libraries: str, allowed: int = 0) -> tuple[int, int]:
    """Characters, and MiB that reading them took at most, in a process of its own that has `libraries`."""
    command = [sys.executable, "-c", _READ, str(path), str(allowed), *libraries]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    characters, peak = map(int, result.stdout.split())
    return characters, peak


LINE = "the norm of x is zero, and so is the sum of the proofs\n"
TEXT_30_MB = LINE * (30_000_000 // len(LINE))


@pytest.mark.parametrize("compression", [None, "gzip", "zstd"])
def test_a_long_text_takes_a_few_mib(tmp_path: Path, compression: str | None) -> None:
    path, content = tmp_path / "book", TEXT_30_MB.encode()
    path.write_bytes(COMPRESSIONS[compression](content) if compression else content)
    characters, peak = peak_of(path, "pyarrow")
    assert characters == len(TEXT_30_MB)
    assert peak < 16


@pytest.mark.parametrize("format", ["lines", "parquet"])
def test_records_of_150_kb_take_no_more_than_a_few_of_them(tmp_path: Path, format: str) -> None:
    texts = [f"{number} {LINE * (150_000 // len(LINE))}" for number in range(1000)]
    path = tmp_path / f"c.{format}"
    if format == "parquet":
        write_parquet(path, {"text": texts}, row_group_size=50)
    else:
        path.write_bytes(json_lines(*texts))
    characters, peak = peak_of(path, "pyarrow")
    assert characters == sum(map(len, texts)), "150 MB"
    assert peak < (16 if format == "lines" else 90)


def test_a_record_of_40_mb_takes_its_line_as_bytes_as_characters_and_as_a_value(tmp_path: Path) -> None:
    path, text = tmp_path / "c.jsonl", LINE * (40_000_000 // len(LINE))
    path.write_bytes(json_lines(text))
    characters, peak = peak_of(path)
    assert characters == len(text)
    assert peak < 3 * 42 + 30


def test_a_line_without_end_is_a_bad_record_that_is_not_read_as_a_whole(tmp_path: Path) -> None:
    """A sparse file: zeros of 400 MB between two records."""
    path = tmp_path / "c.jsonl"
    with path.open("wb") as file:
        file.write(json_lines("one"))
        file.seek(400_000_000)
        file.write(b"\n" + json_lines("two"))
    characters, peak = peak_of(path, allowed=1)
    assert characters == len("onetwo")
    assert peak < 160
    with pytest.raises(InputError, match="line 2: longer than 64 MiB"):
        texts_of(path)


def test_reading_needs_no_torch(tmp_path: Path) -> None:
    """So that mistakes show at once, those in Parquet files too."""
    path = write_parquet(tmp_path / "c", {"text": ["a"]})
    heavy = ["torch", "deepspeed", "transformers", "datasets"]
    program = f"{_READ}\nprint(sorted({set(heavy)!r} & sys.modules.keys()))"
    result = subprocess.run(
        [sys.executable, "-c", program, str(path), "0"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines()[-1] == "[]"


def test_lines_of_an_exported_json_are_read_whatever_else_is_in_them(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    record = {"id": 7, "meta": {"a": [1, 2.5, None, True]}, "text": "body", "more": "\ud83d"}
    path.write_text(json.dumps(record) + "\r\n" + json.dumps(record))
    assert texts_of(path) == ["body", "body"]
