"""What is given for a configuration's file, and is none."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from adept_ds.base.errors import InputError
from adept_ds.config.deepspeed import read_deepspeed_config
from adept_ds.config.loading import load_config

NO_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda path: None, "no such file"),
    "a directory": (Path.mkdir, "Is a directory"),
    "a pipe": (os.mkfifo, "a pipe"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "a pipe or a device"),
    "a link in a circle": (lambda path: path.symlink_to(path), "Too many levels"),
    "UTF-16": (lambda path: path.write_text("model: m", encoding="utf-16"), "UTF-16"),
    "Latin-1": (lambda path: path.write_bytes(b"a: 1\nb: caf\xe9\n"), "line 2 is no UTF-8 text (byte 11)"),
    "far too much": (lambda path: path.write_bytes(b"#" * (1 << 20) + b"\n"), "larger than 1 MiB"),
}


@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize("read", [load_config, read_deepspeed_config])
def test_it_is_refused_by_its_name_and_not_waited_for(
    read: Callable[[Path], object], kind: str, tmp_path: Path
) -> None:
    make, words = NO_FILES[kind]
    path = tmp_path / "config"
    make(path)
    with pytest.raises(InputError) as refusal:
        read(path)
    assert str(path) in str(refusal.value)
    assert words in str(refusal.value)


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "x/" * 3000], ids=["NUL", "long name", "long path"])
@pytest.mark.parametrize("read", [load_config, read_deepspeed_config])
def test_a_name_that_no_file_can_have_is_refused(read: Callable[[Path], object], name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read(tmp_path / name)


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    config, deepspeed = tmp_path / "config.yaml", tmp_path / "ds.json"
    config.write_text("model: m\nrun_dir: r\n", encoding="utf-8-sig")
    assert load_config(config).model == "m"
    deepspeed.write_text('{"zero_optimization": {"stage": 1}}', encoding="utf-8-sig")
    assert read_deepspeed_config(deepspeed) == {"zero_optimization": {"stage": 1}}
