"""What corpus files are, by what is in them; names count only where they contradict it.

Compressed files (gzip, zstd) are looked into and read as streams. What holds no text, or text of another encoding, is
refused as a whole; a bad record among good ones is not the business of this module.
"""

from __future__ import annotations

import codecs
import re
from pathlib import Path
from typing import Any, Literal

from adept_ds.base.errors import InputError
from adept_ds.config.corpus_entries import Format
from adept_ds.config.corpus_files import DATASET_SPLITS, is_dataset
from adept_ds.data.open_files import BOM, open_bytes
from adept_ds.data.record_text import NotJsonError, parse_json

Found = Literal["jsonl", "text", "parquet", "dataset"]

_HEAD_BYTES = 1 << 16
"""So much of a file is looked at."""

_PARQUET = b"PAR1"

_NO_TEXT = {
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"%PDF-": "a PDF document",
    b"PK\x03\x04": "a zip archive",
    b"7z\xbc\xaf": "a 7z archive",
    b"Rar!": "a rar archive",
    b"\x1f\x8b": "a gzip file in another",
    b"\x28\xb5\x2f\xfd": "a zstd file in another",
    b"BZh": "a bzip2 file",
    b"\xfd7zXZ": "an xz file",
    b"\x04\x22\x4d\x18": "an lz4 file",
    b"\x7fELF": "a program",
    b"GGUF": "a GGUF model",
    b"SQLite format 3": "an SQLite database",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
    b"ARROW1": "an Arrow file",
    b"\xff\xff\xff\xff": "an Arrow stream (of a dataset, give the directory)",
    b"Obj\x01": "an Avro file",
    b"ORC": "an ORC file",
    b"PARE": "an encrypted Parquet file",
    b"{\\rtf": "an RTF document",
} | {bytes([0x80, protocol]): "a pickle" for protocol in (2, 3, 4, 5)}

_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]")
"""Bytes that are rare in text, and in every binary file."""

_WIDE = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
"""Marks at the beginning; those of UTF-32 first, which begin alike."""

_OBJECT_BEGINS = re.compile(r'\s*\{\s*"(?:[^"\\]|\\.)*"\s*:')
_ARRAY_BEGINS = re.compile(r'\s*\[\s*(?:\{\s*"|"(?:[^"\\]|\\.)*"\s*,\s*")')

_NAMES_OF_RECORDS = {".jsonl", ".jsonlines", ".ndjson", ".json", ".parquet", ".pq", ".arrow", ".csv", ".tsv"}
_NAMES_OF_COMPRESSION = {".gz", ".gzip", ".zst", ".zstd"}

_SAY = "say with data.format what it is (jsonl, text)"


def format_of(key: str, path: Path, declared: Format) -> Found:
    """How a file, or the directory of a dataset, is read.

    Args:
        declared: `data.format`.

    Raises:
        InputError: it is not what was declared; or, where nothing was, it cannot be told for sure.
    """
    place = f"{key}: '{path}'"
    if path.is_dir():
        found: Found = _dataset(place, path)
    else:
        with open_bytes(key, path) as file:
            head = file.read(_HEAD_BYTES)
        found = _Head(place, path, head, declared).found()
    if declared not in ("auto", found):
        raise InputError(f"{place} is {WORDS[found]}, not {WORDS[declared]} as data.format says; correct one of both")
    return found


WORDS = {"jsonl": "JSON lines", "text": "plain text", "parquet": "Parquet", "dataset": "an on-disk dataset"}


def _dataset(place: str, directory: Path) -> Found:
    if (directory / DATASET_SPLITS).is_file():
        splits = sorted(path.name for path in directory.iterdir() if is_dataset(path))
        shown = ", ".join(f"'{directory / split}'" for split in splits) or "its splits, which are missing"
        raise InputError(f"{place} is a dataset of several splits; give one of {shown}")
    return "dataset"


class _Head:
    """The beginning of a file, and what it says of the rest."""

    def __init__(self, place: str, path: Path, head: bytes, declared: Format) -> None:
        self._place, self._path, self._head, self._declared = place, path, head, declared
        self._is_all = len(head) < _HEAD_BYTES
        lines = head.removeprefix(BOM).decode(errors="replace").split("\n")
        self._cut = None if self._is_all else lines.pop()
        """Of a line that goes on."""
        self._lines = [line for line in lines if line.strip()]

    def found(self) -> Found:
        head = self._head
        if head.startswith(_PARQUET):
            return "parquet"
        self._refuse_no_text()
        if not head.removeprefix(BOM).strip() and self._is_all:
            raise InputError(f"{self._place} holds nothing but white space; leave it out, or give a file with a text")
        if self._declared == "text":
            self._refuse_binary()
            return "text"
        if _ARRAY_BEGINS.match(self._beginning):
            raise InputError(
                f"{self._place} is a JSON array; write one record on each line, for example with "
                f"`jq -c '.[]' '{self._path}'`, or set data.format: text if that is meant"
            )
        if self._declared == "jsonl" or self._has_records():
            return "jsonl"
        self._refuse_binary()
        self._refuse_doubtful()
        return "text"

    @property
    def _beginning(self) -> str:
        return "\n".join([*self._lines, self._cut or ""]).lstrip()

    def _refuse_no_text(self) -> None:
        head = self._head
        kind = _kind(head)
        if kind is not None:
            raise InputError(f"{self._place} is {kind}, not text; give JSON lines, Parquet or plain text")
        encoding = next((name for mark, name in _WIDE.items() if head.startswith(mark)), None) or _wide_encoding(head)
        if encoding is not None:
            raise InputError(
                f"{self._place} is {encoding}; convert it: `iconv -f {encoding} -t UTF-8 '{self._path}' > NEW`"
            )

    def _refuse_binary(self) -> None:
        """Text of another encoding is found while it is read."""
        position = self._head.find(0)
        if position < 0 and not _is_utf8(self._head) and (found := _CONTROL.search(self._head)):
            position = found.start()
        if position >= 0:
            raise InputError(
                f"{self._place} is not text (byte 0x{self._head[position]:02x} at position {position + 1}); "
                "give JSON lines, Parquet or plain text"
            )

    def _has_records(self) -> bool:
        """Whether the first or second line is an object; a long one is taken for one if it begins so."""
        if not self._lines:
            return bool(_OBJECT_BEGINS.match(self._cut or ""))
        first, *rest = self._lines[:2]
        if not first.lstrip().startswith("{"):
            return False
        return any(map(_is_object, [first, *rest])) or bool(not rest and _OBJECT_BEGINS.match(self._cut or ""))

    def _refuse_doubtful(self) -> None:
        """What is no JSON lines, but begins as if it were, or has the name of such files."""
        lines = self._lines[:3]
        if lines and lines[0].lstrip().startswith("{"):
            raise InputError(f"{self._place} begins with '{{', but its first line is not one JSON object; {_SAY}")
        values = [_value(line) for line in lines]
        is_list = bool(values) and isinstance(values[0], list)
        if is_list or (len(values) > 1 and all(isinstance(value, str | bool | list) for value in values)):
            raise InputError(f"{self._place} has lines of JSON that are no objects; write objects, or {_SAY}")
        if isinstance(_value("\n".join(self._lines)), list):
            raise InputError(f"{self._place} is a JSON array; write one record on each line, or {_SAY}")
        suffixes = [suffix.lower() for suffix in self._path.suffixes]
        while suffixes and suffixes[-1] in _NAMES_OF_COMPRESSION:
            suffixes.pop()
        if suffixes and suffixes[-1] in _NAMES_OF_RECORDS:
            raise InputError(
                f"{self._place} holds no records such as its name promises: line 1 is no JSON object; "
                f"write JSON lines, or {_SAY}"
            )


_NOTHING = object()


def _value(line: str) -> Any:
    """What a line says as JSON; `_NOTHING`: it is none."""
    try:
        return parse_json(line)
    except ValueError:
        return _NOTHING


def _is_object(line: str) -> bool:
    """Also one that is too deep, or has too large a number: that is a bad record, not another format."""
    try:
        return isinstance(parse_json(line), dict)
    except NotJsonError:
        return False
    except ValueError:
        return line.lstrip().startswith("{")


def _kind(head: bytes) -> str | None:
    """What no text begins like."""
    if head[257:262] == b"ustar":
        return "a tar archive"
    if head[8:9] == b"{" and 0 < int.from_bytes(head[:8], "little") < 1 << 27:
        return "a safetensors file"
    if not (_CONTROL.search(head) or head.startswith((b"%PDF-", b"{\\rtf"))):  # 'ORCHESTRA' is a word
        return None
    return next((kind for magic, kind in _NO_TEXT.items() if head.startswith(magic)), None)


def _is_utf8(head: bytes) -> bool:
    """Whose last character may be cut."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return True


def _wide_encoding(head: bytes) -> str | None:
    """UTF-16 or UTF-32 without a mark: many zero bytes, and characters that are all plain."""
    if head.count(0) * 5 < len(head):
        return None
    for encoding in ("UTF-32LE", "UTF-32BE", "UTF-16LE", "UTF-16BE"):
        try:
            text = head[: len(head) // 4 * 4].decode(encoding)
        except UnicodeDecodeError:
            continue
        if text and all(char.isprintable() or char.isspace() for char in text):
            return encoding
    return None
