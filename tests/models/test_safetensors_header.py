"""A header is read strictly: what the safetensors library would not read either is refused in one line."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from adept_ds.base.errors import InputError
from adept_ds.models.safetensors_header import read_entries


def file_of(path: Path, header: bytes, data: bytes = b"") -> Path:
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def tensor(dtype: Any = "U8", shape: Any = (4,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def header(**tensors: Any) -> bytes:
    return json.dumps(tensors).encode()


def test_entries_are_what_the_library_wrote(tmp_path: Path) -> None:
    tensors = {"b": torch.zeros(3, 5), "a": torch.ones(7, dtype=torch.bfloat16), "c": torch.zeros(0, 2)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    found = read_entries(tmp_path / "x.safetensors")
    assert {name: (entry.dtype, entry.shape, entry.num_bytes) for name, entry in found.items()} == {
        "b": ("F32", (3, 5), 60),
        "a": ("BF16", (7,), 14),
        "c": ("F32", (0, 2), 0),
    }
    raw = (tmp_path / "x.safetensors").read_bytes()
    assert raw[found["a"].start : found["a"].start + 14] == tensors["a"].view(torch.uint8).numpy().tobytes()
    assert [entry.start for entry in found.values()] == sorted(entry.start for entry in found.values())


BAD_HEADERS: dict[str, tuple[bytes, str]] = {
    "100,000 brackets": (b"[" * 100_000, "nested too deeply"),
    "100,000 objects": (b'{"a":' * 100_000, "nested too deeply"),
    "no text": (b"\xff\xfe{}", "can't decode"),
    "half a text": (b'{"a": {"dtype"', "delimiter"),
    "UTF-16": (header(a=tensor()).decode().encode("utf-16"), "can't decode"),
    "a list": (b"[]", "no JSON object"),
    "a number": (b"7", "no JSON object"),
    "null": (b"null", "no JSON object"),
    "a tensor that is a number": (header(a=7), "'a'"),
    "no dtype": (header(a={"shape": [4], "data_offsets": [0, 4]}), "'a.dtype'"),
    "an unknown key": (header(a=tensor() | {"stride": 1}), "'a.stride'"),
    "an unknown dtype": (header(a=tensor(dtype="Q4")), "unknown dtype 'Q4'"),
    "a dtype in small letters": (header(a=tensor(dtype="u8")), "unknown dtype 'u8'"),
    "a number as dtype": (header(a=tensor(dtype=8)), "'a.dtype'"),
    "null as dtype": (header(a=tensor(dtype=None)), "'a.dtype'"),
    "a negative shape": (header(a=tensor(shape=[-4])), "'a.shape.0'"),
    "two negatives": (header(a=tensor(shape=[-2, -2])), "'a.shape.0'"),
    "a shape with a fraction": (header(a=tensor(shape=[4.0])), "'a.shape.0'"),
    "true in a shape": (header(a=tensor(shape=[True, 4])), "'a.shape.0'"),
    "a text in a shape": (header(a=tensor(shape=["4"])), "'a.shape.0'"),
    "a text as shape": (header(a=tensor(shape="4")), "'a.shape'"),
    "a huge shape": (header(a=tensor(shape=[1 << 70])), "'a.shape.0'"),
    "a huge product": (header(a=tensor(shape=[1 << 62, 1 << 62, 0, 1 << 62], offsets=[0, 4])), "does not lie where"),
    "a shape of 1,000 ones": (header(a=tensor(shape=[1] * 1000)), "'a.shape'"),
    "a number of 5,000 digits": (b'{"a": {"dtype": "U8", "shape": [' + b"9" * 5000 + b"]}}", "limit"),
    "three offsets": (header(a=tensor(offsets=[0, 4, 4])), "'a.data_offsets'"),
    "one offset": (header(a=tensor(offsets=[0])), "'a.data_offsets"),
    "negative offsets": (header(a=tensor(offsets=[-4, 0])), "'a.data_offsets.0'"),
    "offsets in reverse": (header(a=tensor(offsets=[4, 0])), "does not lie where"),
    "offsets beyond the file": (header(a=tensor(shape=[8], offsets=[0, 8])), "bytes, where its header wants"),
    "overlapping": (header(a=tensor(), b=tensor()), "'b' does not lie where"),
    "NaN": (b'{"a": NaN}', "NaN"),
    "infinity": (b'{"a": {"dtype": "U8", "shape": [Infinity], "data_offsets": [0, 4]}}', "Infinity"),
    "a name twice": (b'{"a": %b, "a": %b}' % (header(x=1)[6:-1], header(x=1)[6:-1]), "'a' stands in it twice"),
    "a key twice": (b'{"a": {"dtype": "U8", "dtype": "U8"}}', "'dtype' stands in it twice"),
}


@pytest.mark.parametrize("mistake", BAD_HEADERS)
def test_a_bad_header_is_refused_in_one_line_that_names_the_file(tmp_path: Path, mistake: str) -> None:
    content, words = BAD_HEADERS[mistake]
    path = file_of(tmp_path / "bad.safetensors", content, b"1234")
    with pytest.raises(InputError) as refusal:
        read_entries(path)
    message = str(refusal.value)
    assert message.startswith(f"model: '{path}' is damaged (") and message.endswith("; complete the download")
    assert words in message and len(message) < 600 and "\n" not in message, message


@pytest.mark.parametrize("mistake", sorted(BAD_HEADERS.keys() - {"an unknown key", "a shape of 1,000 ones"}))
def test_the_library_refuses_it_too(tmp_path: Path, mistake: str) -> None:
    """Otherwise the model that is loaded would be another one than that which is expanded."""
    path = file_of(tmp_path / "bad.safetensors", BAD_HEADERS[mistake][0], b"1234")
    with pytest.raises((SafetensorError, OverflowError)), safe_open(path, framework="pt") as file:
        file.keys()


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing.safetensors"):
        with pytest.raises(InputError, match=f"^model: '{path}' cannot be read "):
            read_entries(path)


def test_a_good_header_with_odd_spaces_is_read(tmp_path: Path) -> None:
    path = file_of(tmp_path / "x.safetensors", b"  " + header(**{"a\nb": tensor()}) + b" \n ", b"1234")
    assert read_entries(path)["a\nb"].shape == (4,)
