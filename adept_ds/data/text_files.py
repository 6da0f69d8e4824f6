"""Plain text files as characters, in chunks."""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from adept_ds.base.errors import InputError
from adept_ds.data.open_files import BOM

_CHUNK_BYTES = 1 << 18


def decoded(key: str, path: Path, file: BinaryIO) -> Iterator[str]:
    """The text of a file from its first word on, its line ends as '\\n', without a byte order mark.

    Raises:
        InputError: it is not UTF-8, has a NUL character, or no word at all.
    """
    decoder, newlines = _Decoder(key, path), io.IncrementalNewlineDecoder(None, translate=True)
    is_blank, chunk = True, file.read(_CHUNK_BYTES).removeprefix(BOM)
    while chunk:
        following = file.read(_CHUNK_BYTES)
        text = newlines.decode(decoder.decode(chunk, final=not following), final=not following)
        is_blank = is_blank and (not text or text.isspace())
        if not is_blank:
            yield text
        chunk = following
    if is_blank:
        raise InputError(f"{key}: '{path}' holds nothing but white space; leave it out, or give a file with a text")


class _Decoder:
    """UTF-8, and where it is not."""

    def __init__(self, key: str, path: Path) -> None:
        self._key, self._path = key, path
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._line = 1

    def decode(self, chunk: bytes, *, final: bool) -> str:
        try:
            text = self._decoder.decode(chunk, final)
        except UnicodeDecodeError as error:
            byte, line = error.object[error.start], self._line + error.object.count(b"\n", 0, error.start)
            raise InputError(
                f"{self._key}: '{self._path}' is not UTF-8 text (byte 0x{byte:02x} in line {line}); "
                f"convert it, from Latin-1 for example: `iconv -f LATIN1 -t UTF-8 '{self._path}' > NEW`"
            ) from None
        if "\0" in text:
            line = self._line + text.count("\n", 0, text.index("\0"))
            raise InputError(f"{self._key}: '{self._path}' is not text (NUL character in line {line}); leave it out")
        self._line += chunk.count(b"\n")
        return text
