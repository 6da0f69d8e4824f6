"""Which weights are no finite numbers: looked for where a loss is none. Reads bits; no torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from adept_ds.weights.hf_directory import stored_tensors
from adept_ds.weights.tensor_files import StoredTensor

_NOT_FINITE = {
    "F64": ("<u8", 0x7FF0_0000_0000_0000),
    "C64": ("<u4", 0x7F80_0000),
    "F32": ("<u4", 0x7F80_0000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
    "F8_E5M2": ("<u1", 0x7C),
    "F8_E4M3": ("<u1", 0x7F),
    "F8_E8M0": ("<u1", 0xFF),
}
"""Dtype -> how its items lie in a file, and the bits that are all set in NaN and infinity, and in no other number."""


def first_non_finite(model_dir: Path) -> str | None:
    """The first tensor with NaN or infinity in it, in the order of the files; None: all are finite.

    Streams over the files, at the speed of the disk.
    """
    return next((name for name, tensor in stored_tensors(model_dir).items() if not _is_finite(tensor)), None)


def _is_finite(tensor: StoredTensor) -> bool:
    if tensor.dtype not in _NOT_FINITE:
        return True
    item, bits = _NOT_FINITE[tensor.dtype]
    mask = np.array(bits, item)
    return not any(((np.frombuffer(chunk, item) & mask) == mask).any() for chunk in tensor.chunks())
