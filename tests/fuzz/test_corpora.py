"""Texts of any origin: JSON lines, plain text, Parquet, on-disk datasets; compressed or not."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from harness.fuzzing import Fuzzing, Kind, Sandbox, file_kind
from harness.mutations import Draw, changed_json, changed_lines, spoiled
from harness.reading import json_lines, source_of, write_dataset, write_parquet, zstd
from hypothesis import strategies as st

from adept_ds.base.digests import FileDigests, sha256_of
from adept_ds.config.corpus_files import find_files
from adept_ds.config.data_section import DataSection
from adept_ds.data.documents import check_corpus, read_pieces
from adept_ds.data.tokenizer import TextTokenizer
from adept_ds.data.tokens import Tokenisation, tokens_of
from adept_ds.ranks.collectives import Ranks

TEXTS = ["hello world", "the norm of x is zero", "Über 東京 🙂", "proof " * 30]
QUESTIONS = [
    {"question": "2 + 2?", "choices": ["3", "4"], "answer": 1},
    {"question": "x", "choices": ["a"], "answer": "A"},
]


def prepare(sandbox: Sandbox) -> Sandbox:
    inputs = sandbox.inputs
    lines = json_lines(*TEXTS)
    (inputs / "records.jsonl").write_bytes(lines)
    (inputs / "records.jsonl.gz").write_bytes(gzip.compress(lines, mtime=0))
    (inputs / "records.jsonl.zst").write_bytes(zstd(lines))
    (inputs / "plain.txt").write_text("\n\n".join(TEXTS), encoding="utf-8")
    (inputs / "questions.jsonl").write_bytes(b"".join(json.dumps(record).encode() + b"\n" for record in QUESTIONS))
    write_parquet(inputs / "table.parquet", {"text": TEXTS, "number": [1, 2, 3, 4]}, row_group_size=2)
    write_dataset(inputs / "dataset", {"text": TEXTS})
    return sandbox


def read(sandbox: Sandbox, name: str) -> None:
    """As the start of a run looks at it, and as packing reads all of it; with and without patience."""
    path = sandbox.inputs / name
    files = find_files("data.domain", [path])
    check_corpus("data.domain", [path], DataSection(domain=[path]))
    tokenizer = TextTokenizer(sandbox.inputs / "model", bos="auto", special_tokens_in_text="text", bos_per="document")
    for allowed in (2, 0):
        source = source_of(*files, max_bad_records=allowed)
        cache = sandbox.out / f"cache{allowed}"
        cache.mkdir()
        found = tokens_of(source, Tokenisation(tokenizer, cache, FileDigests(cache / "digests.json"), 1), Ranks())
        found.check(sha256_of)
    for _ in read_pieces(source_of(*files), skip=(0, 1)):
        pass


def compressed(compress: Callable[[bytes], bytes], unpack: Callable[[bytes], bytes]) -> Any:
    """Changed before it is compressed, or after."""

    def change(content: bytes) -> st.SearchStrategy[bytes]:
        return st.one_of(changed_lines(unpack(content)).map(compress), spoiled(content))

    return change


def unzstd(content: bytes) -> bytes:
    with pa.CompressedInputStream(pa.BufferReader(content), "zstd") as stream:
        return bytes(stream.read())


def changed_table(content: bytes) -> st.SearchStrategy[bytes]:
    """Another table under the same name, or other bytes."""
    other = tables().map(as_parquet)
    return st.one_of(other, other.flatmap(spoiled), spoiled(content), spoiled(content))


def as_parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


COLUMNS: dict[str, Any] = {
    "texts": pa.array(TEXTS),
    "nulls": pa.array([None] * 4, pa.string()),
    "no type": pa.array([None] * 4),
    "some nulls": pa.array(["a", None, "", "b"]),
    "numbers": pa.array([1, 2, 3, 4]),
    "bytes": pa.array([b"\xff\xfe", b"a", b"", b"\xed\xa0\x80"]),
    "lists": pa.array([["a"], [], None, ["b", None]]),
    "structs": pa.array([{"text": "a"}, None, {"text": None}, {"text": "b"}]),
    "dictionary": pa.array(TEXTS).dictionary_encode(),
    "large": pa.array(TEXTS, pa.large_string()),
    "dates": pa.array([0, 1, 2, 2**31 - 1], pa.date32()),
    "floats": pa.array([0.5, float("nan"), float("inf"), None]),
    "half characters": pa.array([b"\xed\xa0\xbd"] * 4, pa.binary()).view(pa.binary()),
    "long": pa.array(["a" * 100_000, "", "b", "c"]),
}
_NAMES = ("text", "TEXT", "question", "choices", "answer", "", "a.b", "\x1b[31m", "列")


@st.composite
def tables(draw: Draw) -> pa.Table:
    names = draw(st.lists(st.sampled_from(_NAMES), min_size=1, max_size=3))
    if draw(st.integers(0, 3)):
        names[0] = "text"
    columns = [COLUMNS[draw(st.sampled_from(sorted(COLUMNS)))] for _ in names]
    return pa.Table.from_arrays(columns, names=names).slice(0, draw(st.sampled_from((4, 4, 2, 0))))


def corpus_kind(name: str, file: str, change: Any, **more: Any) -> Kind:
    top = Path(file).parts[0]
    return file_kind(file, change, lambda sandbox: read(sandbox, top), name=name, names=("data.domain",), **more)


KINDS = [
    corpus_kind("JSON lines", "records.jsonl", changed_lines, messages=10),
    corpus_kind("questions", "questions.jsonl", changed_lines),
    corpus_kind("plain text", "plain.txt", spoiled),
    corpus_kind("gzip", "records.jsonl.gz", compressed(partial(gzip.compress, mtime=0), gzip.decompress)),
    corpus_kind("zstd", "records.jsonl.zst", compressed(zstd, unzstd)),
    corpus_kind("Parquet", "table.parquet", changed_table),
    corpus_kind("dataset state", "dataset/state.json", changed_json),
    corpus_kind("dataset info", "dataset/dataset_info.json", changed_json),
    corpus_kind("dataset rows", "dataset/data-00000-of-00001.arrow", spoiled),
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_corpus_is_read_or_refused(kind: Kind, sandbox: Sandbox, fuzzing: Fuzzing) -> None:
    fuzzing(kind, sandbox)
