"""Sizes and rates as people write them: 80GB, 400Gb/s, 989 TFLOP/s. Imports no torch.

A unit is never guessed: GB are 10^9 bytes and GiB 2^30, a small b is a bit, and a number without a unit is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from adept_ds.base.errors import InputError

_PREFIXES = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}

_BYTES = {f"{prefix}B": factor for prefix, factor in (_PREFIXES | _BINARY).items()}
_BYTES_A_SECOND = {f"{unit}/s": factor for unit, factor in _BYTES.items()} | {
    f"{prefix}{bits}": factor / 8 for prefix, factor in _PREFIXES.items() for bits in ("b/s", "bit/s", "bps")
}
_OPERATIONS_A_SECOND = {
    f"{prefix}{name}": factor for prefix, factor in _PREFIXES.items() for name in ("FLOP/s", "FLOPS")
}


def parse_bytes(option: str, text: str) -> float:
    """'80GB' -> 8e10. Raises `InputError`, as all of these: no positive number with a unit of the kind."""
    return _parse(option, text, _BYTES, "80GB or 80GiB")


def parse_bandwidth(option: str, text: str) -> float:
    """Bytes a second: '400Gb/s' -> 5e10, '50GB/s' -> 5e10."""
    return _parse(option, text, _BYTES_A_SECOND, "400Gb/s (bits) or 50GB/s (bytes)")


def parse_operations(option: str, text: str) -> float:
    """Floating-point operations a second: '989TFLOP/s' -> 9.89e14."""
    return _parse(option, text, _OPERATIONS_A_SECOND, "989TFLOP/s")


def _parse(option: str, text: str, units: Mapping[str, float], example: str) -> float:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)\s*(\S*)\s*", text, flags=re.ASCII)
    shown = text if len(text) <= 60 else f"{text[:57]}..."
    if match is None:
        raise InputError(f"{option}: '{shown}' is no number with a unit; write it as {example}")
    number, unit = match.groups()
    if not unit:
        raise InputError(f"{option}: '{shown}' has no unit; write it as {example}")
    if unit not in units:
        raise InputError(f"{option}: '{shown}' has the unit '{unit[:30]}', which is none here; write it as {example}")
    value = float(number) * units[unit]
    if not 0 < value < math.inf:
        raise InputError(f"{option}: '{shown}' is not above 0, or has no end; write it as {example}")
    return value


def in_gb(size: float) -> str:
    """Of bytes: '12.3 GB', and as much of small ones as can be seen."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= 0.995 * factor:
            return f"{size / factor:,.{1 if size < 1000 * factor else 0}f} {unit}"
    return f"{size:.0f} B"


def in_seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
