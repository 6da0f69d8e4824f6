"""safetensors files put together from tensors of others, without ever holding a tensor in memory.

The safetensors library reads single tensors, but writes a file only from a dictionary of all of them. Here bytes go
from file to file, whatever their dtype. The format: 8 bytes (little-endian length), a JSON header, the data.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from adept_ds.base.errors import InputError
from adept_ds.base.files import write_all
from adept_ds.models.safetensors_header import ITEM_BYTES, TensorEntry, read_entries

_CHUNK = 1 << 23
_SYNC_BYTES = 1 << 27
"""So many are written before the disk is asked for them."""


_NOT_IN_KERNEL = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, None}
"""How file systems say that they cannot copy from file to file by themselves; None: Python has no such call here."""


_LIBRARY_ORDER = (
    *("U64", "I64", "F64", "C64", "F32", "U32", "I32"),
    *("BF16", "F16", "U16", "I16", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"),
)
"""Dtypes as they follow one another in a file of the safetensors library: the widest first, so that all are aligned."""


_FLOAT_FORMATS = {"F64": "<d", "F32": "<f", "F16": "<e", "BF16": "<f"}


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

    def chunks(self, size: int = _CHUNK) -> Iterator[memoryview]:
        """Its bytes, so many at a time; a chunk is valid until the next one."""
        buffer = memoryview(bytearray(min(size, self.num_bytes)))
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.start)
            for start in range(0, self.num_bytes, size):
                chunk = buffer[: self.num_bytes - start]
                if file.readinto(chunk) != len(chunk):
                    raise self._too_short()
                yield chunk

    def copy_to(self, target: FileIO) -> Iterator[int]:
        """Append its bytes to a file; yields the number of each chunk."""
        copied = 0
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.start)
            while copied < self.num_bytes:
                try:
                    step = os.copy_file_range(file.fileno(), target.fileno(), min(self.num_bytes - copied, _CHUNK))
                except (OSError, AttributeError) as error:
                    if copied or getattr(error, "errno", None) not in _NOT_IN_KERNEL:
                        raise
                    yield from (write_all(target, chunk) for chunk in self.chunks())
                    return
                if not step:
                    raise self._too_short()
                copied += step
                yield step

    def _too_short(self) -> InputError:
        return InputError(f"model: '{self.file}' is shorter than its header says; complete the download")


@dataclass(frozen=True)
class ConstantTensor:
    """A tensor of the dtype and shape of another, with one value in every element.

    Raises:
        InputError: another value than zero, in a dtype that it cannot be written in.
    """

    like: StoredTensor
    value: float = 0.0

    def __post_init__(self) -> None:
        if self.value and self.dtype not in _FLOAT_FORMATS:
            raise InputError(
                f"model: '{self.like.file}' holds a norm in {self.dtype}, where {self.value} cannot be written; "
                f"convert the model to one of {', '.join(_FLOAT_FORMATS)}"
            )

    @property
    def num_bytes(self) -> int:
        return self.like.num_bytes

    @property
    def dtype(self) -> str:
        return self.like.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.like.shape

    def chunks(self) -> Iterator[memoryview]:
        item = self._item()
        values = memoryview(item * (min(_CHUNK, self.num_bytes) // len(item)))
        for start in range(0, self.num_bytes, _CHUNK):
            yield values[: self.num_bytes - start]

    def copy_to(self, target: FileIO) -> Iterator[int]:
        yield from (write_all(target, chunk) for chunk in self.chunks())

    def _item(self) -> bytes:
        """The bytes of one element; zero has zero bytes in every dtype."""
        if not self.value:
            return b"\0"
        if self.dtype == "BF16":
            return struct.pack("<f", self.value)[2:]  # the upper half of a float32: exact for small whole numbers
        return struct.pack(_FLOAT_FORMATS[self.dtype], self.value)


@dataclass(frozen=True)
class TurnedTensor:
    """Between two tensors: origin + alpha (trained - origin), in fp32, rounded once to the dtype of `trained`.

    As `zero.dialled.Dial` sets weights, without a model. Made by `turned_tensor`.
    """

    trained: StoredTensor
    origin: StoredTensor | float
    """Of the same shape, in any of the dtypes; or its one value."""
    alpha: float

    @property
    def num_bytes(self) -> int:
        return self.trained.num_bytes

    @property
    def dtype(self) -> str:
        return self.trained.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.trained.shape

    def chunks(self) -> Iterator[memoryview]:
        for trained, origin in zip(_values(self.trained), self._origin(), strict=False):
            yield memoryview(encoded(origin + np.float32(self.alpha) * (trained - origin), self.dtype))

    def copy_to(self, target: FileIO) -> Iterator[int]:
        yield from (write_all(target, chunk) for chunk in self.chunks())

    def _origin(self) -> Iterator[NDArray[np.float32] | np.float32]:
        if isinstance(self.origin, StoredTensor):
            return _values(self.origin)
        return itertools.repeat(np.float32(self.origin))


@dataclass(frozen=True)
class MadeTensor:
    """A tensor whose bytes are made when they are written, such as one that lies in parts in several files."""

    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], Iterable[bytes | memoryview]]
    """All of its bytes, piece by piece."""

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    def chunks(self) -> Iterator[memoryview]:
        yield from (memoryview(piece) for piece in self.make())

    def copy_to(self, target: FileIO) -> Iterator[int]:
        yield from (write_all(target, chunk) for chunk in self.chunks())


TensorContent = StoredTensor | ConstantTensor | TurnedTensor | MadeTensor
"""What a tensor of a new file consists of."""


def in_dtype(tensor: StoredTensor, dtype: str) -> TensorContent:
    """The same numbers in another floating-point dtype, rounded once; what is no floating-point number stays as it is.

    Raises:
        InputError: they are of a kind that cannot be computed with.
    """
    if tensor.dtype == dtype or not tensor.dtype.startswith(("F", "BF")):
        return tensor
    if tensor.dtype not in _FLOAT_FORMATS:
        raise InputError(
            f"'{tensor.file}' holds weights in {tensor.dtype}, which cannot be converted; convert the model to one of "
            f"{', '.join(_FLOAT_FORMATS)}"
        )
    return MadeTensor(dtype, tensor.shape, lambda: (encoded(values, dtype) for values in _values(tensor)))


def turned_tensor(trained: StoredTensor, origin: StoredTensor | float, alpha: float) -> TensorContent:
    """A tensor as far from its origin as `alpha` says: at 1 `trained` itself, at 0 the origin, bit for bit.

    Numbers that are none of a model's weights, such as integers, stay as they are.

    Raises:
        InputError: both are not of one shape, or floating-point numbers of a kind that cannot be computed with.
    """
    if isinstance(origin, StoredTensor) and origin.shape != trained.shape:
        raise InputError(
            f"'{trained.file}' holds a tensor of shape {trained.shape}, its base {origin.shape}; give its own base"
        )
    if alpha == 1 or not trained.dtype.startswith(("F", "BF")):
        return trained
    if alpha == 0 and not isinstance(origin, StoredTensor):
        return ConstantTensor(trained, origin)
    if alpha == 0 and isinstance(origin, StoredTensor) and origin.dtype == trained.dtype:
        return origin
    for tensor in (trained, origin):
        if isinstance(tensor, StoredTensor) and tensor.dtype not in _FLOAT_FORMATS:
            raise InputError(
                f"'{tensor.file}' holds weights in {tensor.dtype}, which cannot be turned down; convert the model to "
                f"one of {', '.join(_FLOAT_FORMATS)}"
            )
    return TurnedTensor(trained, origin, alpha)


_TURNED_ELEMENTS = _CHUNK // 8
"""Computed with at once: as many of both tensors, whatever their dtypes."""


def _values(tensor: StoredTensor) -> Iterator[NDArray[np.float32]]:
    """Its elements in fp32, so many at a time."""
    for chunk in tensor.chunks(_TURNED_ELEMENTS * ITEM_BYTES[tensor.dtype]):
        if tensor.dtype == "BF16":  # the upper half of a float32
            yield (np.frombuffer(chunk, "<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            yield np.frombuffer(chunk, _FLOAT_FORMATS[tensor.dtype]).astype(np.float32)


def encoded(values: NDArray[np.float32], dtype: str) -> bytes:
    """Rounded to nearest, ties to even, as torch rounds."""
    if dtype != "BF16":
        return values.astype(_FLOAT_FORMATS[dtype]).tobytes()
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype("<u2").tobytes()


C = TypeVar("C", bound=TensorContent)


def in_library_order(contents: Mapping[str, C]) -> dict[str, C]:
    """As safetensors orders the tensors of a file, by dtype and name: the same tensors give the same file."""
    ranks = {dtype: rank for rank, dtype in enumerate(_LIBRARY_ORDER)}
    return dict(sorted(contents.items(), key=lambda item: (ranks.get(item[1].dtype, len(ranks)), item[0])))


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, in the order in which they lie in it.

    Raises:
        InputError: the file is cut short, or no safetensors file.
    """
    return located(path, read_entries(path))


def located(path: Path, entries: Mapping[str, TensorEntry]) -> dict[str, StoredTensor]:
    """What the header of a file lists, with the file."""
    return {name: StoredTensor(path, of.start, of.num_bytes, of.dtype, of.shape) for name, of in entries.items()}


def write_tensors(
    path: Path,
    contents: Mapping[str, TensorContent],
    on_bytes: Callable[[int], None] | None = None,
    *,
    digested: bool = True,
) -> dict[str, str]:
    """Write a safetensors file; returns the SHA-256 of each tensor's bytes.

    Args:
        contents: by name, in the order in which they shall lie in the file.
        on_bytes: called with the number of bytes of each chunk that was written.
        digested: without it nothing is returned, and what is made when it is written is made once, not twice.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, content in contents.items():
        end = position + content.num_bytes
        header[name] = {"dtype": content.dtype, "shape": list(content.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(max_workers=2) as pool:
        # Hashing takes longer than copying, which the kernel does without showing us the bytes. Meanwhile they go to
        # the disk, so that little is left to wait for at the end.
        digests = pool.submit(_sha256, contents if digested else {})
        write_all(file, struct.pack("<Q", len(text)) + text)
        unsynced, syncing = 0, pool.submit(os.fsync, file.fileno())
        for content in contents.values():
            for num_bytes in content.copy_to(file):
                unsynced += num_bytes
                if unsynced >= _SYNC_BYTES and syncing.done():
                    syncing.result()
                    unsynced, syncing = 0, pool.submit(os.fsync, file.fileno())
                if on_bytes:
                    on_bytes(num_bytes)
        syncing.result()
        return digests.result()


def _sha256(contents: Mapping[str, TensorContent]) -> dict[str, str]:
    known: dict[TensorContent, str] = {}  # a layer and its copy are the same bytes
    for content in contents.values():
        if content not in known:
            digest = hashlib.sha256()
            for chunk in content.chunks():
                digest.update(chunk)
            known[content] = digest.hexdigest()
    return {name: known[content] for name, content in contents.items()}
