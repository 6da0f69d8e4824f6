"""What tensors are, in 64 digits: SHA-256 over their names, kinds and bytes, however they fall on files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import NonNegativeInt

from adept_ds.base.digests import Digest, json_digest
from adept_ds.base.records import Record
from adept_ds.weights.tensor_files import StoredTensor

_NOT_OF_THE_FUNCTION = {"_name_or_path", "transformers_version"}
"""Keys of config.json that only say where a model comes from."""


class TensorRecord(Record):
    """A tensor without its bytes."""

    sha256: Digest
    dtype: str
    shape: tuple[NonNegativeInt, ...]


def hash_tensors(
    tensors: Mapping[str, StoredTensor], on_bytes: Callable[[int, str], None] | None = None
) -> dict[str, TensorRecord]:
    """Read all tensors once.

    Args:
        on_bytes: called with the number of bytes of each chunk and the tensor's name.
    """
    records = {}
    for name, tensor in tensors.items():
        digest = hashlib.sha256()
        for chunk in tensor.chunks():
            digest.update(chunk)
            if on_bytes:
                on_bytes(len(chunk), name)
        records[name] = TensorRecord(sha256=digest.hexdigest(), dtype=tensor.dtype, shape=tensor.shape)
    return records


def fingerprint_of(records: Mapping[str, TensorRecord]) -> str:
    """One SHA-256 for all: of the JSON list of [name, dtype, shape, sha256], sorted by name, without spaces."""
    listed = [[name, records[name].dtype, list(records[name].shape), records[name].sha256] for name in sorted(records)]
    return json_digest(listed)


def config_digest(config: Mapping[str, Any]) -> str:
    """SHA-256 of what a config.json says, however it is written; without what says only where the model comes from."""
    return json_digest({key: value for key, value in config.items() if key not in _NOT_OF_THE_FUNCTION})
