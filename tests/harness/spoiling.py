"""Files changed as a mistake, an attacker or a crash would, and refusals of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adept_ds.base.digests import sha256_of
from adept_ds.base.errors import InputError
from adept_ds.base.files import read_json, write_json
from adept_ds.base.outputs import MARK_NAME, OutputMark


def changed_json(path: Path, change: Callable[[Any], Any]) -> None:
    """`change` mutates what the file holds, or returns something else to hold."""
    value = read_json(path)
    result = change(value)
    write_json(path, value if result is None else result)


def flip_bit(path: Path, position: int = -1) -> None:
    text = bytearray(path.read_bytes())
    text[position] ^= 1
    path.write_bytes(text)


def put(name: str, *keys: Any, value: Any) -> Callable[[Path], None]:
    """Set one entry of a JSON file."""

    def change(directory: Path) -> None:
        def at(tree: Any) -> None:
            for key in keys[:-1]:
                tree = tree[key]
            tree[keys[-1]] = value

        changed_json(directory / name, at)

    return change


def cut(name: str) -> Callable[[Path], None]:
    return lambda directory: os.truncate(directory / name, (directory / name).stat().st_size - 5)


def text(name: str, content: str) -> Callable[[Path], Any]:
    return lambda directory: (directory / name).write_text(content)


def assert_refused(tmp_path: Path, words: list[str], work: Callable[[Path], Any]) -> None:
    """One line with all `words`; nothing else in the directory than before."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError) as refusal:
        work(tmp_path / "out")
    message = str(refusal.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    assert sorted(tmp_path.rglob("*")) == before


def bit_in_a_tensor(model: Path) -> None:
    """In its last weight file."""
    flip_bit(max(model.glob("*.safetensors")))


def marked_anew(output: Path) -> Path:
    """What its files are by now counts as what its command wrote."""
    mark = OutputMark.load(output / MARK_NAME)
    found = {name: (output / name).stat() for name in mark.files}
    stamps = {name: (status.st_size, status.st_mtime_ns) for name, status in found.items()}
    digests = {name: sha256_of(output / name) for name in stamps}
    mark.model_copy(update={"files": stamps, "sha256": digests}).save(output / MARK_NAME)
    return output
