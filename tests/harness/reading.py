"""Corpus files of any kind, and what the program reads in them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from harness.packing import text_source

from adept_ds.data.documents import BadRecords, TextSource, read_pieces
from adept_ds.data.pieces import Piece


def source_of(*files: Path, **options: Any) -> TextSource:
    return text_source(files, **options)


def texts_of(*files: Path, **options: Any) -> list[str]:
    """The documents."""
    return joined(read_pieces(source_of(*files, **options)))


def joined(pieces: Sequence[Piece] | Any) -> list[str]:
    """Documents, each put together from its pieces."""
    texts: list[str] = []
    for piece in pieces:
        part = piece.text[piece.start : piece.stop]
        if piece.begins:
            texts.append(part)
        else:
            texts[-1] += part
    return texts


def skipped(*files: Path, allowed: int, **options: Any) -> tuple[list[str], BadRecords]:
    """The documents, and the records that were none."""
    source = source_of(*files, max_bad_records=allowed, **options)
    bad = BadRecords(source)
    return joined(read_pieces(source, bad=bad)), bad


def json_lines(*texts: str, key: str = "text") -> bytes:
    return "".join(json.dumps({key: text}) + "\n" for text in texts).encode()


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue())


def write_parquet(path: Path, columns: dict[str, Any], row_group_size: int | None = None) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path


def write_dataset(path: Path, columns: dict[str, Any]) -> Path:
    """As `datasets` writes it."""
    from datasets import Dataset

    Dataset.from_dict(columns).save_to_disk(str(path))
    return path


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "zstd": zstd}
