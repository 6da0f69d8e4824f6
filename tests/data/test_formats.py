"""What a file is, is seen by what is in it; what is no text is refused as a whole, in one line with a remedy."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import random
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from harness.reading import COMPRESSIONS, json_lines, source_of, texts_of, write_dataset, write_parquet, zstd
from safetensors.numpy import save

from adept_ds.base.errors import InputError
from adept_ds.data.documents import read_pieces
from adept_ds.data.open_files import open_bytes

LINES = json_lines("one", "two")
LATIN = "caf\xe9 au lait\n".encode("latin-1")


def zipped() -> bytes:
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
        archive.writestr("a.jsonl", LINES)
    return buffer.getvalue()


def tarred() -> bytes:
    with tarfile.open(fileobj=(buffer := io.BytesIO()), mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.jsonl"))
    return buffer.getvalue()


def arrow_file() -> bytes:
    table = pa.table({"text": ["a"]})
    with pa.ipc.new_file(buffer := io.BytesIO(), table.schema) as writer:
        writer.write_table(table)
    return buffer.getvalue()


def written(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("name", ["c.jsonl", "c.JSONL", "c.jsonlines", "c.json", "part-00000", "c.txt", "c.parquet"])
@pytest.mark.parametrize("pack", [bytes, *COMPRESSIONS.values()], ids=["plain", *COMPRESSIONS])
def test_json_lines_are_that_under_any_name(tmp_path: Path, name: str, pack: type[bytes]) -> None:
    assert texts_of(written(tmp_path / name, pack(LINES))) == ["one", "two"]


@pytest.mark.parametrize("name", ["c.txt", "c", "c.md", "c.v2"])
@pytest.mark.parametrize("pack", [bytes, *COMPRESSIONS.values()], ids=["plain", *COMPRESSIONS])
def test_plain_text_is_that_under_any_name_but_those_of_records(tmp_path: Path, name: str, pack: type[bytes]) -> None:
    assert texts_of(written(tmp_path / name, pack(b"Some words."))) == ["Some words."]


@pytest.mark.parametrize("name", ["c.parquet", "c", "c.jsonl"])
def test_parquet_is_that_under_any_name(tmp_path: Path, name: str) -> None:
    assert texts_of(write_parquet(tmp_path / name, {"text": ["one", "two"]})) == ["one", "two"]


@pytest.mark.parametrize(
    "text",
    [
        "[1] A footnote\n",
        "[a link](there)\n",
        "[[Category]]\n",
        '"Hello," he said.\n',
        '"Hello."\n\nHe left.\n',
        "42\n",
        "1\n2\n3\n",
        "ORCHESTRA: enter\n",
        "null and void\n",
        "\x1b[1mbold\x1b[0m and a form feed \x0c\n",
        "x {\n",
        "é" * 40_000,
    ],
)
def test_text_that_begins_like_something_else_is_text(tmp_path: Path, text: str) -> None:
    assert texts_of(written(tmp_path / "c.txt", text)) == [text]


@pytest.mark.parametrize(
    "first",
    [
        pytest.param('{"text": "a', id="cut short"),
        pytest.param('{"text": ' + "[" * 100_000, id="brackets"),
        pytest.param('{"text": ' + "1" * 5_000 + "}", id="digits"),
        pytest.param('{"text": NaN}', id="NaN"),
        pytest.param('{"text": "caf\udce9"}', id="Latin-1"),
        pytest.param('{"text": "' + "a" * 200_000 + '"', id="long"),
    ],
)
def test_json_lines_with_a_bad_first_record_are_json_lines(tmp_path: Path, first: str) -> None:
    path = written(tmp_path / "c", first.encode(errors="surrogateescape") + b"\n" + LINES)
    with pytest.raises(InputError, match=r"^data\.domain: '.*c' line 1: "):
        texts_of(path)
    assert texts_of(path, max_bad_records=1) == ["one", "two"]


NOT_READ = {
    **{
        f"{encoding} text": ("words of a text\n".encode(encoding), [f"is {encoding.upper()}; convert it", "iconv -f"])
        for encoding in ("utf-16", "utf-32")
    },
    **{
        f"{encoding} lines without a mark": (LINES.decode().encode(encoding), ["iconv -f UTF-"])
        for encoding in ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be")
    },
    "Latin-1": (b"fine\n" * 99_999 + LATIN, ["not UTF-8", "byte 0xe9 in line 100000", "iconv -f LATIN1"]),
    "Latin-1 packed": (gzip.compress(LATIN), ["not UTF-8", "byte 0xe9 in line 1"]),
    "half a character": ("ab\u00e9".encode()[:-1], ["not UTF-8", "byte 0xc3 in line 1"]),
    "NUL in text": (b"abc\0def", ["not text", "byte 0x00 at position 4"]),
    "NUL far behind": (b"abc\n" * 99_999 + b"\0", ["not text", "NUL character in line 100000"]),
    "white space": (b" \n\t\n", ["white space", "leave it out"]),
    "much white space": (b" " * 300_000, ["white space", "leave it out"]),
    "mark alone": (b"\xef\xbb\xbf", ["white space"]),
    "nothing, packed": (gzip.compress(b""), ["white space"]),
    "array": (json.dumps([{"text": "a"}] * 3).encode(), ["a JSON array", "jq -c '.[]'"]),
    "array on lines": (json.dumps([{"text": "a"}] * 3, indent=1).encode(), ["a JSON array", "jq -c '.[]'"]),
    "large array": (json.dumps([{"text": "a" * 99_999}] * 3).encode(), ["a JSON array", "jq -c '.[]'"]),
    "array of strings": (json.dumps(["a", "b"], indent=1).encode(), ["a JSON array", "jq -c '.[]'"]),
    "array of numbers": (json.dumps([1, 2], indent=1).encode(), ["a JSON array"]),
    "lists on lines": (b'["a"]\n["b"]\n', ["no objects", "data.format"]),
    "strings on lines": (b'"a"\n"b"\n', ["no objects", "data.format"]),
    "object on lines": (json.dumps({"text": "a"}, indent=1).encode(), ["first line is not one JSON object"]),
    "objects on a line": (b'{"text": "a"}{"text": "b"}\n', ["first line is not one JSON object", "data.format"]),
    "TeX": (b"{\\bf bold} words\n", ["first line is not one JSON object", "data.format"]),
    "cut gzip": (gzip.compress(LINES * 999)[:-20], ["to its end", "get it again"]),
    "cut zstd": (zstd(random.Random(0).randbytes(99_999).hex().encode())[:-20], ["to its end", "get it again"]),
    "gzip and more": (gzip.compress(LINES) + b"rest", ["to its end", "get it again"]),
    "gzip head": (b"\x1f\x8b\x08\0", ["to its end", "get it again"]),
    "zstd head": (b"\x28\xb5\x2f\xfd", ["to its end", "get it again"]),
    "twice packed": (gzip.compress(gzip.compress(LINES)), ["a gzip file in another"]),
    "cut Parquet": (b"PAR1" + b"abc" * 99, ["to its end", "get it again"]),
    "image": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", ["a PNG image"]),
    "zip": (zipped(), ["a zip archive"]),
    "tar": (tarred(), ["a tar archive"]),
    "pickle": (pickle.dumps(["a text"]), ["a pickle"]),
    "safetensors": (save({"a": np.zeros(3)}), ["a safetensors file"]),
    "PDF": (b"%PDF-1.7\n1 0 obj\n", ["a PDF document"]),
    "Arrow": (arrow_file(), ["an Arrow file"]),
    "unknown": (bytes(range(256)) * 9, ["not text"]),
    "unknown without NUL": (bytes(range(128, 256)) + b"\1\2\3", ["not text", "byte 0x01"]),
}


@pytest.mark.parametrize("kind", NOT_READ)
def test_what_is_no_text_is_refused_whatever_may_be_skipped(tmp_path: Path, kind: str) -> None:
    content, words = NOT_READ[kind]
    path = written(tmp_path / "c", content)
    with pytest.raises(InputError) as refusal:
        texts_of(path, max_bad_records=100)
    message = str(refusal.value)
    assert message.startswith(f"data.domain: '{path}' ")
    assert "\n" not in message
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize("name", ["c.csv", "c.tsv.gz", "c.jsonl", "c.json.zst", "c.parquet", "c.arrow"])
def test_text_is_not_taken_for_one_under_the_name_of_records(tmp_path: Path, name: str) -> None:
    pack = gzip.compress if name.endswith("gz") else zstd if name.endswith("zst") else bytes
    path = written(tmp_path / name, pack(b"name,age\nA,7\n"))
    with pytest.raises(InputError, match=r"no records such as its name promises.*data\.format"):
        texts_of(path)
    assert texts_of(path, format="text") == ["name,age\nA,7\n"]


def test_what_is_said_of_a_file_counts_if_it_can_be_true(tmp_path: Path) -> None:
    lines, text = written(tmp_path / "lines", LINES), written(tmp_path / "text", "words")
    table = write_parquet(tmp_path / "table", {"text": ["one"]})
    assert texts_of(lines, format="text") == [LINES.decode()]
    assert texts_of(written(tmp_path / "tex", "{\\bf x}"), format="text") == ["{\\bf x}"]
    assert texts_of(table, format="parquet") == ["one"]
    for path, format in ((lines, "parquet"), (text, "dataset"), (table, "text"), (table, "jsonl"), (tmp_path, "text")):
        with pytest.raises(InputError, match=r"is .*, not .* as data\.format says; correct one of both$"):
            texts_of(path, format=format)
    with pytest.raises(InputError, match="line 1: not JSON"):
        texts_of(text, format="jsonl")


def test_a_dataset_of_several_splits_is_asked_for_one(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_dataset(tmp_path / "both" / split, {"text": [split]})
    (tmp_path / "both" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(InputError, match=r"several splits; give one of '.*both/test', '.*both/train'$"):
        texts_of(tmp_path / "both")
    assert texts_of(tmp_path / "both" / "train", format="dataset") == ["train"]


@pytest.mark.parametrize("pack", COMPRESSIONS.values(), ids=COMPRESSIONS)
def test_packed_files_that_were_joined_are_read_to_their_end(tmp_path: Path, pack: type[bytes]) -> None:
    path = written(tmp_path / "c", pack(LINES) + pack(LINES))
    steps: list[int] = []
    assert len(list(read_pieces(source_of(path), steps.append))) == 4
    assert sum(steps) == path.stat().st_size


def test_a_file_that_goes_away_is_a_clear_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'.*gone' cannot be read to its end"), open_bytes("k", tmp_path / "gone"):
        pass
