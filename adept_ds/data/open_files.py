"""Corpus files as streams of bytes, decompressed (gzip, zstd) whatever their names are."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

from adept_ds.base.errors import InputError

BUFFER_BYTES = 1 << 20

BOM = b"\xef\xbb\xbf"
"""What some programs put before UTF-8."""

_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"


class _Counted(io.RawIOBase):
    """A file that tells how much of it is read."""

    def __init__(self, path: Path, on_bytes: Callable[[int], None] | None) -> None:
        self._file, self._on_bytes = path.open("rb", buffering=0), on_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer) or 0
        if count and self._on_bytes:
            self._on_bytes(count)
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


@contextmanager
def open_bytes(key: str, path: Path, on_bytes: Callable[[int], None] | None = None) -> Iterator[io.BufferedReader]:
    """The bytes of a file, decompressed.

    Args:
        on_bytes: called with numbers of bytes as they lie on the disk.

    Raises:
        InputError: while it is open: it cannot be read to its end.
    """
    with readable(key, path), io.BufferedReader(_Counted(path, on_bytes), BUFFER_BYTES) as stored:
        unpacked = _unpacked(stored)
        with io.BufferedReader(unpacked, BUFFER_BYTES) if unpacked else nullcontext(stored) as file:
            yield cast(io.BufferedReader, file)


def _unpacked(stored: Any) -> Any:
    """None: it is not compressed."""
    magic = stored.peek(4)[:4]
    if magic.startswith(_GZIP):
        return gzip.GzipFile(fileobj=stored)
    if magic == _ZSTD:
        import pyarrow as pa

        return pa.CompressedInputStream(stored, "zstd")
    return None


@contextmanager
def readable(key: str, path: Path, *errors: type[Exception]) -> Iterator[None]:
    """What libraries raise where a file is damaged, `errors` among it, becomes an `InputError`."""
    kinds: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error, *errors)
    try:
        yield
    except InputError:
        raise
    except kinds as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise InputError(f"{key}: '{path}' cannot be read to its end ({reason}); get it again") from None
