"""Files are whole or absent; a crash in the middle leaves what was there before."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from adept_ds.base.files import new_directory, read_json_lines, stamp_files, write_json, write_text


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_written_text_is_read_back_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "note.txt"
    write_text(path, "eins\nzwei ä\n")
    assert path.read_text(encoding="utf-8") == "eins\nzwei ä\n"
    assert names(path.parent) == ["note.txt"]


def test_a_text_is_complete_on_disk_before_it_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader at any moment sees the old or the new text: the new one is whole and synced before the rename."""
    path = tmp_path / "note.txt"
    path.write_text("old")
    seen: list[str] = []
    synced: list[int] = []
    real_replace, real_fsync = Path.replace, os.fsync

    def watch_replace(self: Path, target: Any) -> Path:
        seen.extend([self.read_text(), path.read_text(), str(self.parent)])
        assert synced, "renamed before it was synced"
        return real_replace(self, target)

    monkeypatch.setattr(Path, "replace", watch_replace)
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(descriptor), real_fsync(descriptor))[1])
    write_text(path, "new")
    assert seen == ["new", "old", str(tmp_path)]
    assert path.read_text() == "new"


def test_a_write_that_fails_leaves_the_old_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "note.txt"
    write_text(path, "old")

    def full_disk(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_text(path, "new")
    assert path.read_text() == "old"


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert names(tmp_path) == ["record.json"]


def test_a_new_directory_appears_only_when_it_is_filled(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with new_directory(target) as folder:
        (folder / "a").write_text("1")
        assert not target.exists()
        assert folder.parent == target.parent, "another file system could not be renamed from"
    assert (target / "a").read_text() == "1"
    assert names(target.parent) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_interrupted_new_directory_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), new_directory(tmp_path / "out") as folder:
        (folder / "a").write_text("1")
        raise error
    assert names(tmp_path) == []


def test_an_interrupted_replacement_leaves_the_old_directory(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(RuntimeError), new_directory(target) as folder:
        (folder / "new").write_text("new")
        raise RuntimeError
    assert names(tmp_path) == ["out"]
    assert names(target) == ["old"]


def test_a_replaced_directory_keeps_nothing_of_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    with new_directory(target) as folder:
        (folder / "new").write_text("new")
        assert names(target) == ["old"]
    assert names(tmp_path) == ["out"]
    assert names(target) == ["new"]


def test_what_a_killed_process_left_behind_does_not_leak_into_a_new_directory(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), new_directory(tmp_path / "out") as folder:
        leftover = folder
        raise RuntimeError
    leftover.mkdir()  # as a SIGKILL leaves it
    (leftover / "half").write_text("x")
    with new_directory(tmp_path / "out") as folder:
        (folder / "a").write_text("1")
    assert names(tmp_path / "out") == ["a"]
    assert names(tmp_path) == ["out"]


def test_a_half_written_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    assert read_json_lines(path) == [{"step": 1}, {"step": 2}]


def test_a_broken_line_in_the_middle_is_not_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 1"):
        read_json_lines(path)


def test_a_missing_log_is_an_empty_one(tmp_path: Path) -> None:
    assert read_json_lines(tmp_path / "nothing.jsonl") == []


def test_a_stamp_changes_with_size_or_time_and_not_with_the_order(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_text("1")
    b.write_text("2")
    os.utime(a, ns=(0, 10**9))
    first = stamp_files([a, b])
    assert stamp_files([b, a]) == first
    os.utime(a, ns=(0, 10**9 + 1))
    assert stamp_files([a, b]) != first
    os.utime(a, ns=(0, 10**9))
    assert stamp_files([a, b]) == first
    a.write_text("11")
    os.utime(a, ns=(0, 10**9))
    assert stamp_files([a, b]) != first
