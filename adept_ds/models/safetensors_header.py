"""What a safetensors file says of itself: names, dtypes, shapes and places of its tensors. Read strictly; no torch.

The format: 8 bytes (little-endian length), a JSON header, the data, without holes.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

from pydantic import Field, TypeAdapter, ValidationError

from adept_ds.base.errors import InputError
from adept_ds.base.records import Record, first_mistake

_MAX_HEADER = 100 << 20
"""The format's own limit."""


ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
}
"""Of an element, by dtype."""


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of a file, without its content."""

    start: int
    """First byte in the file."""
    num_bytes: int
    dtype: str
    """As the format calls it: 'F32', 'BF16'."""
    shape: tuple[int, ...]


_Count = Annotated[int, Field(ge=0, lt=1 << 63)]


class HeaderEntry(Record):
    """A tensor as it stands in the header."""

    dtype: str
    shape: Annotated[tuple[_Count, ...], Field(max_length=64)]
    data_offsets: tuple[_Count, _Count]


_ENTRIES = TypeAdapter(dict[str, HeaderEntry])


def read_entries(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file, in the order in which they lie in it.

    Raises:
        InputError: the file is cut short, or no safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
            if len(head) < 8:
                raise ValueError("no header")
            (length,) = struct.unpack("<Q", head)
            if length > min(_MAX_HEADER, size - 8):
                raise ValueError("the header is longer than the file")
            entries = parse_header(file.read(length).decode())
        return _placed(entries, 8 + length, size)
    except OSError as error:
        raise InputError(f"model: '{path}' cannot be read ({error.strerror}); complete the download") from None
    except ValueError as error:
        reason = str(error).splitlines()[0][:200]
        raise InputError(f"model: '{path}' is damaged ({reason}); complete the download") from None


def parse_header(header: str) -> dict[str, HeaderEntry]:
    """The tensors that a header lists, in the order in which they lie in the file. Raises `ValueError`."""
    try:
        tree = json.loads(header, object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("header: nested too deeply") from None
    if not isinstance(tree, dict):
        raise ValueError("header: no JSON object")
    tree.pop("__metadata__", None)
    for entry in tree.values():
        if isinstance(entry, dict):  # JSON has no tuples
            entry |= {key: tuple(value) for key, value in entry.items() if isinstance(value, list)}
    try:
        entries = _ENTRIES.validate_python(tree)
    except ValidationError as error:
        raise ValueError(f"header: {first_mistake(error)}") from None
    return dict(sorted(entries.items(), key=lambda item: (item[1].data_offsets, item[0])))


def _placed(entries: dict[str, HeaderEntry], start: int, size: int) -> dict[str, TensorEntry]:
    """Where they lie in a file of `size` bytes whose data begins at `start`."""
    tensors, position = {}, start
    for name, entry in entries.items():
        begin, end = entry.data_offsets
        item = ITEM_BYTES.get(entry.dtype)
        if item is None:
            raise ValueError(f"'{name}' has the unknown dtype {entry.dtype!r}")
        if start + begin != position or end - begin != item * math.prod(entry.shape):
            raise ValueError(f"'{name}' does not lie where it should")
        tensors[name] = TensorEntry(position, end - begin, entry.dtype, entry.shape)
        position = start + end
    if position != size:
        raise ValueError(f"{size} bytes, where its header wants {position}")
    return tensors


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in pairs:
        if name in tree:
            raise ValueError(f"header: '{name[:100]}' stands in it twice")
        tree[name] = value
    return tree


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"header: {name}, which is no JSON")
