"""safetensors files put together from pieces of others, without ever holding a tensor in memory.

The safetensors library reads single tensors, but writes a file only from a dictionary of all of them. Here bytes go
from file to file, whatever their dtype. The format: 8 bytes (little-endian length), a JSON header, the data.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import queue
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adept_ds.errors import InputError

_CHUNK = 1 << 23
_MAX_HEADER = 100 << 20
"""The format's own limit."""
_ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file."""

    file: Path
    start: int
    """First byte in the file."""
    num_bytes: int
    dtype: str
    """As the format calls it: 'F32', 'BF16'."""
    shape: tuple[int, ...]

    def chunks(self) -> Iterator[bytes]:
        with self.file.open("rb") as file:
            file.seek(self.start)
            left = self.num_bytes
            while left:
                chunk = file.read(min(left, _CHUNK))
                if not chunk:
                    raise InputError(f"model: '{self.file}' is shorter than its header says; complete the download")
                left -= len(chunk)
                yield chunk


@dataclass(frozen=True)
class Zeros:
    """A tensor of zeros, of the dtype and shape of another; zero has zero bytes in every dtype."""

    like: StoredTensor

    @property
    def num_bytes(self) -> int:
        return self.like.num_bytes

    @property
    def dtype(self) -> str:
        return self.like.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.like.shape

    def chunks(self) -> Iterator[bytes]:
        zeros = bytes(min(_CHUNK, self.num_bytes))
        for start in range(0, self.num_bytes, _CHUNK):
            yield zeros[: self.num_bytes - start]


Piece = StoredTensor | Zeros


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, in the order in which they lie in it.

    Raises:
        InputError: the file is cut short, or no safetensors file.
    """

    def damaged(reason: str) -> InputError:
        return InputError(f"model: '{path}' is damaged ({reason}); complete the download")

    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        if len(head) < 8:
            raise damaged("no header")
        (length,) = struct.unpack("<Q", head)
        if length > min(_MAX_HEADER, size - 8):
            raise damaged("the header is longer than the file")
        try:
            header: dict[str, Any] = json.loads(file.read(length))
            entries = sorted((entry["data_offsets"], name) for name, entry in header.items() if name != "__metadata__")
            tensors = {}
            for (begin, end), name in entries:
                dtype, shape = header[name]["dtype"], tuple(header[name]["shape"])
                tensors[name] = StoredTensor(path, 8 + length + begin, end - begin, dtype, shape)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise damaged(f"header: {error}") from None
    position = 8 + length
    for name, tensor in tensors.items():
        item = _ITEM_BYTES.get(tensor.dtype)
        if tensor.start != position or (item and tensor.num_bytes != item * math.prod(tensor.shape)):
            raise damaged(f"'{name}' does not lie where it should")
        position += tensor.num_bytes
    if position != size:
        raise damaged(f"{size} bytes, where its header wants {position}")
    return tensors


def write_tensors(path: Path, pieces: Mapping[str, Piece], on_bytes: Callable[[int], None] | None = None) -> str:
    """Write a safetensors file; returns its SHA-256.

    Args:
        pieces: by name, in the order in which they shall lie in the file.
        on_bytes: called with the number of bytes of each chunk that was written.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, piece in pieces.items():
        end = position + piece.num_bytes
        header[name] = {"dtype": piece.dtype, "shape": list(piece.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file, _Hasher() as hasher:
        for chunk in _file_chunks(text, pieces):
            hasher.put(chunk)
            file.write(chunk)
            if on_bytes:
                on_bytes(len(chunk))
        file.flush()
        os.fsync(file.fileno())
    return hasher.digest()


def _file_chunks(header: bytes, pieces: Mapping[str, Piece]) -> Iterator[bytes]:
    yield struct.pack("<Q", len(header)) + header
    for piece in pieces.values():
        yield from piece.chunks()


class _Hasher:
    """SHA-256 in a thread of its own: hashing takes about as long as writing."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._queue: queue.Queue[bytes | None] = queue.Queue(maxsize=2)  # more would be memory
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> _Hasher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._queue.put(None)
        self._thread.join()

    def put(self, chunk: bytes) -> None:
        self._queue.put(chunk)

    def digest(self) -> str:
        return self._hash.hexdigest()

    def _work(self) -> None:
        while (chunk := self._queue.get()) is not None:
            self._hash.update(chunk)
