"""Sizes and rates are read with their units, and nothing is guessed."""

from __future__ import annotations

import pytest

from adept_ds.base.errors import InputError
from adept_ds.planning.quantities import (
    in_gb,
    in_seconds,
    parse_bandwidth,
    parse_bytes,
    parse_operations,
)


@pytest.mark.parametrize(
    ("text", "value"),
    [("80GB", 80e9), ("80 GiB", 80 * 2**30), ("1.5TB", 1.5e12), ("512MiB", 2**29), ("8e10B", 8e10)],
)
def test_sizes_are_bytes(text: str, value: float) -> None:
    assert parse_bytes("--gpu-memory", text) == value


@pytest.mark.parametrize(
    ("text", "value"), [("400Gb/s", 50e9), ("400Gbit/s", 50e9), ("400Gbps", 50e9), ("50GB/s", 50e9), ("1GiB/s", 2**30)]
)
def test_a_small_b_is_a_bit(text: str, value: float) -> None:
    assert parse_bandwidth("--bandwidth", text) == value


def test_operations_have_prefixes() -> None:
    assert parse_operations("--flops", "989TFLOP/s") == 989e12
    assert parse_operations("--flops", "0.989 PFLOPS") == 989e12


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("80", "has no unit"),
        ("80gb", "unit 'gb'"),
        ("80Gb", "unit 'Gb'"),
        ("GB", "no number"),
        ("-80GB", "no number"),
        ("0GB", "not above 0"),
        ("1e999GB", "has no end"),
        ("80GB/s", "unit 'GB/s'"),
        ("80 G B", "no number"),
        ("", "no number"),
        ("٨GB", "no number"),
    ],
)
def test_what_is_no_size_is_refused_with_an_example(text: str, words: str) -> None:
    with pytest.raises(InputError, match="--gpu-memory") as refusal:
        parse_bytes("--gpu-memory", text)
    assert words in str(refusal.value)
    assert "80GB or 80GiB" in str(refusal.value)


def test_numbers_are_shown_as_large_as_they_are() -> None:
    assert [in_gb(size) for size in (16.4e9, 2345.6e9, 5.1e6, 12)] == ["16.4 GB", "2,346 GB", "5.1 MB", "12 B"]
    assert [in_seconds(s) for s in (12.34, 0.0123)] == ["12.3 s", "12.3 ms"]
