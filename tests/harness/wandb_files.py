"""What an offline run of Weights & Biases has on disk: records of its protocol in LevelDB's log format.

The format: a header of 7 bytes, then blocks of 32 KiB; in a block, pieces of records, each behind checksum (4 bytes),
length (2) and kind (1: whole, 2: first, 3: middle, 4: last); fewer than 7 bytes at the end of a block are padding.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK, _HEADER = 32 * 1024, 7
_LAST = (1, 4)


def history(file: Path) -> list[dict[str, Any]]:
    """The rows that were logged."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows = []
    for data in _records(file.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        if record.HasField("history"):
            items = record.history.item
            rows.append({".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items})
    return rows


def _records(content: bytes) -> Iterator[bytes]:
    assert content.startswith(b":W&B")
    at, parts = _HEADER, list[bytes]()
    while at + _HEADER <= len(content):
        if _BLOCK - at % _BLOCK < _HEADER:
            at += _BLOCK - at % _BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + _HEADER])
        if not kind:
            return
        parts.append(content[at + _HEADER : at + _HEADER + length])
        at += _HEADER + length
        if kind in _LAST:
            yield b"".join(parts)
            parts = []
