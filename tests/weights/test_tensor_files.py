"""Files that are put together from others' bytes are what the safetensors library itself would read and write."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from adept_ds.base.errors import InputError
from adept_ds.weights import tensor_files
from adept_ds.weights.tensor_files import ConstantTensor, in_library_order, read_header, write_tensors

TENSORS = {
    "matrix": torch.arange(35.0).view(5, 7),
    "half": torch.linspace(-3, 3, 9, dtype=torch.bfloat16),
    "numbers": torch.arange(3),
    "nothing": torch.zeros(0, 4),
    "one": torch.tensor(2.5),
    "eight": torch.randn(16, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn),
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "source.safetensors", metadata={"format": "pt"})
    return tmp_path / "source.safetensors"


def refuse(*_: int) -> int:
    raise OSError(errno.EXDEV, "not on this file system")


@pytest.mark.parametrize("kernel", ["copies", "cannot", "has no such call"])
@pytest.mark.parametrize("chunk", [3, 1 << 23])
def test_pieces_of_a_file_come_back_bit_for_bit_under_other_names(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, kernel: str
) -> None:
    monkeypatch.setattr(tensor_files, "_CHUNK", chunk)
    if kernel == "cannot":
        monkeypatch.setattr(os, "copy_file_range", refuse)
    elif kernel == "has no such call":
        monkeypatch.delattr(os, "copy_file_range")
    stored = read_header(source)
    assert stored.keys() == TENSORS.keys()
    pieces = {f"new.{name}": stored[name] for name in reversed(list(stored))}
    seen: list[int] = []
    target = tmp_path / "target.safetensors"
    digests = write_tensors(target, pieces | {"zeroed": ConstantTensor(stored["matrix"])}, seen.append)
    assert digests == {
        name: hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in load_file(target).items()
    }
    assert sum(seen) == sum(tensor.nbytes for tensor in TENSORS.values()) + TENSORS["matrix"].nbytes
    loaded = load_file(target)
    assert torch.equal(loaded.pop("zeroed"), torch.zeros(5, 7))
    assert loaded.keys() == {f"new.{name}" for name in TENSORS}
    for name, tensor in TENSORS.items():
        assert loaded[f"new.{name}"].dtype == tensor.dtype
        assert loaded[f"new.{name}"].shape == tensor.shape
        mine, wanted = (value.reshape(-1).view(torch.uint8) for value in (loaded[f"new.{name}"], tensor))
        assert torch.equal(mine, wanted)
    with safe_open(target, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_constant_is_that_value_in_every_dtype_of_a_norm(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_files, "_CHUNK", 16)
    save_file({"gain": torch.ones(37, dtype=dtype)}, tmp_path / "a.safetensors")
    pieces = {"gain": ConstantTensor(read_header(tmp_path / "a.safetensors")["gain"], -1.0)}
    write_tensors(tmp_path / "b.safetensors", pieces)
    loaded = load_file(tmp_path / "b.safetensors")["gain"]
    assert loaded.dtype == dtype
    assert torch.equal(loaded, torch.full((37,), -1.0, dtype=dtype))


def test_a_constant_that_a_dtype_cannot_hold_is_refused(source: Path) -> None:
    with pytest.raises(InputError, match=r"F8_E4M3, where -1\.0 cannot be written"):
        ConstantTensor(read_header(source)["eight"], -1.0)


def test_tensors_of_all_dtypes_lie_in_a_file_as_the_library_puts_them(tmp_path: Path) -> None:
    """The export writes with the library; otherwise `adept delta apply` would not give the same files."""
    wide, narrow = "float64 int64 uint64 float32 int32 uint32", "bfloat16 float16 int16 uint16 int8 uint8 bool"
    kinds = f"{narrow} float8_e4m3fn float8_e5m2 {wide}".split()
    tensors = {f"t{i % 4}.{kind}": torch.ones(3, dtype=getattr(torch, kind)) for i, kind in enumerate(kinds)}
    save_file(tensors, tmp_path / "a", metadata={"format": "pt"})
    write_tensors(tmp_path / "b", in_library_order(dict(reversed(read_header(tmp_path / "a").items()))))
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()


def header_of(tensors: dict[str, dict[str, object]], data: bytes) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"1234567", id="shorter than a length"),
        pytest.param(struct.pack("<Q", 1 << 40) + b"{}", id="a header longer than the file"),
        pytest.param(struct.pack("<Q", 4) + b"\xff{}[", id="no JSON"),
        pytest.param(struct.pack("<Q", 2) + b"[]", id="a list"),
        pytest.param(header_of({"a": {"dtype": "F32", "shape": [2]}}, b"12345678"), id="no place"),
        pytest.param(header_of({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"1234"), id="cut short"),
        pytest.param(header_of({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}}, b"12345678"), id="size"),
        pytest.param(header_of({"a": {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]}}, b"12345678"), id="a hole"),
        pytest.param(header_of({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}, b"12345678"), id="more"),
    ],
)
def test_a_damaged_file_is_an_input_error_that_names_it(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"bad\.safetensors' is damaged .*complete the download"):
        read_header(path)


def test_a_file_that_shrinks_while_it_is_read_is_an_input_error(source: Path, tmp_path: Path) -> None:
    stored = read_header(source)
    source.write_bytes(source.read_bytes()[:-8])
    with pytest.raises(InputError, match="shorter than its header says"):
        write_tensors(tmp_path / "target", stored)
