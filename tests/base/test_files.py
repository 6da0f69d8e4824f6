"""Files are whole or absent; a crash in the middle leaves what was there before."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness.launching import ROOT

from adept_ds.base.errors import InputError, MachineError
from adept_ds.base.files import (
    NewDirectory,
    new_directory,
    read_json_lines,
    remove_abandoned,
    remove_abandoned_files,
    write_bytes,
    write_json,
    write_text,
    writing,
)

ANOTHER_PROCESS = """
import os, sys
from pathlib import Path
from adept_ds.base import files

os.getpid = lambda: 1  # as the first process of every container
kind, path, text = sys.argv[1], Path(sys.argv[2]), sys.argv[3]

def wait(temporary):
    print(temporary, flush=True)
    sys.stdin.readline()

if kind == "file":
    replace = Path.replace
    Path.replace = lambda self, target: (wait(self), replace(self, target))[1]
    files.write_text(path, text)
else:
    with files.new_directory(path, lambda old: None) as folder:
        (folder / "half").write_text(text)
        wait(folder)
        (folder / "whole").write_text(text)
"""


class Writer:
    """Another process, which writes a file or fills a directory and waits just before that takes its name."""

    def __init__(self, kind: str, path: Path, text: str) -> None:
        command = [sys.executable, "-c", ANOTHER_PROCESS, kind, str(path), text]
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.temporary = Path(self._process.stdout.readline().strip())

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def finish(self) -> None:
        self._process.communicate("\n", timeout=60)
        assert self._process.returncode == 0

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate(timeout=60)
        assert self._process.returncode == -signal.SIGKILL


def anything(_: Path) -> None:
    """Whatever stands there may be removed."""


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What the program asks of the disk, in its order: ("sync" or "rename", inode of the file or directory)."""
    events: list[tuple[str, int]] = []
    fsync, replace, rename = os.fsync, Path.replace, Path.rename

    def watched_fsync(descriptor: int) -> None:
        events.append(("sync", os.fstat(descriptor).st_ino))
        fsync(descriptor)

    def watched_replace(self: Path, target: Any) -> Path:
        events.append(("rename", self.stat().st_ino))
        return replace(self, target)

    def watched_rename(self: Path, target: Any) -> Path:
        events.append(("rename", self.stat().st_ino))
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "replace", watched_replace)
    monkeypatch.setattr(Path, "rename", watched_rename)
    return events


def inode(path: Path) -> int:
    return path.stat().st_ino


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

    def watch_fsync(descriptor: int) -> None:
        synced.append(descriptor)
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watch_fsync)
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
    with pytest.raises(RuntimeError), new_directory(target, anything) as folder:
        (folder / "new").write_text("new")
        raise RuntimeError
    assert names(tmp_path) == ["out"]
    assert names(target) == ["old"]


def test_a_replaced_directory_keeps_nothing_of_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    with new_directory(target, anything) as folder:
        (folder / "new").write_text("new")
        assert names(target) == ["old"]
    assert names(tmp_path) == ["out"]
    assert names(target) == ["new"]


def test_an_empty_directory_is_taken_without_asking(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with new_directory(tmp_path / "out") as folder:
        (folder / "new").write_text("new")
    assert names(tmp_path / "out") == ["new"]


def test_a_filled_directory_is_not_replaced_unless_its_removal_is_approved(tmp_path: Path) -> None:
    target = tmp_path / "thesis"
    target.mkdir()
    (target / "notes.txt").write_text("x")
    with pytest.raises(InputError, match=f"^'{target}' is there and not empty; give the name of a new directory$"):
        NewDirectory(target)
    assert (target / "notes.txt").read_text() == "x"
    assert names(tmp_path) == ["thesis"]


@pytest.mark.parametrize("asked", [True, False])
def test_what_somebody_puts_there_meanwhile_stays(tmp_path: Path, asked: bool) -> None:
    """Filling takes hours: what may be removed is asked again at the end."""

    def only_ours(old: Path) -> None:
        if names(old) != ["ours"]:
            raise InputError("not ours alone")

    target = tmp_path / "out"
    if asked:
        target.mkdir()
        (target / "ours").write_text("old")
    with (
        pytest.raises(InputError, match="not ours alone" if asked else "is there and not empty"),
        new_directory(target, only_ours if asked else None) as folder,
    ):
        (folder / "new").write_text("new")
        target.mkdir(exist_ok=True)
        (target / "notes.txt").write_text("x")
    assert (target / "notes.txt").read_text() == "x"
    assert names(tmp_path) == ["out"]


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


# --- several processes ---------------------------------------------------------------------------------------------


def test_two_processes_write_one_file_under_different_names(tmp_path: Path) -> None:
    """Both have the same number, as on two hosts or in two containers; each file is whole all the time."""
    path = tmp_path / "note.txt"
    with Writer("file", path, "first") as first, Writer("file", path, "second") as second:
        assert first.temporary != second.temporary
        assert (first.temporary.read_text(), second.temporary.read_text()) == ("first", "second")
        second.finish()
        assert path.read_text() == "second"
        first.finish()
    assert path.read_text() == "first"
    assert names(tmp_path) == ["note.txt"]


def test_two_processes_fill_one_directory_under_different_names(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with Writer("directory", path, "first") as first, Writer("directory", path, "second") as second:
        assert first.temporary != second.temporary
        second.finish()
        assert (path / "half").read_text() == "second"
        first.finish()
    assert {file.name: file.read_text() for file in path.iterdir()} == {"half": "first", "whole": "first"}
    assert names(tmp_path) == ["out"]


def test_what_a_killed_process_left_behind_is_removed_and_what_a_living_one_fills_is_not(tmp_path: Path) -> None:
    path = tmp_path / "out[1]*"  # no pattern of names
    with Writer("directory", path, "killed") as killed, Writer("directory", path, "living") as living:
        for _ in range(2):
            with new_directory(path, anything) as folder:
                (folder / "mine").write_text("1")
            assert (killed.temporary / "half").read_text() == "killed", "it was still at work"
        killed.kill()
        assert (killed.temporary / "half").exists(), "a killed process cannot remove anything"
        with new_directory(path, anything):
            assert not killed.temporary.exists()
        assert (living.temporary / "half").read_text() == "living"
        living.finish()
    assert names(tmp_path) == [path.name], "not even a lock is left"
    assert names(path) == ["half", "whole"]


def test_what_was_meant_for_another_name_is_left_alone_unless_all_is_to_be_removed(tmp_path: Path) -> None:
    with (
        Writer("directory", tmp_path / "other", "") as killed,
        Writer("directory", tmp_path / "other", "") as living,
        Writer("directory", tmp_path / "out.other", "") as suffix,
    ):
        killed.kill()
        suffix.kill()
        with new_directory(tmp_path / "out"):
            assert killed.temporary.is_dir() and suffix.temporary.is_dir()
        remove_abandoned(tmp_path)
        assert not killed.temporary.exists() and not suffix.temporary.exists()
        assert living.temporary.is_dir()
        living.finish()
    assert names(tmp_path) == ["other", "out"]


def test_only_directories_with_a_temporary_name_are_taken_for_abandoned(tmp_path: Path) -> None:
    digits = "0123456789abcdef" * 2
    theirs = [tmp_path / name for name in (".out.tmp", f".out.{digits}", f"out.{digits}.tmp", f".out.{digits[1:]}.tmp")]
    for path in theirs:
        path.mkdir()
    (tmp_path / f".out.{digits}.tmp").symlink_to(theirs[0])
    before = names(tmp_path)
    remove_abandoned(tmp_path)
    assert names(tmp_path) == before


def test_files_that_killed_processes_left_behind_are_removed_and_those_of_living_ones_are_not(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    theirs = tmp_path / "cache" / ".notes.tmp"
    theirs.write_text("not of adept")
    with (
        Writer("file", tmp_path / "first", "killed") as killed,
        Writer("file", tmp_path / "cache" / "second", "killed") as deeper,
        Writer("file", tmp_path / "cache" / "second", "living") as living,
    ):
        remove_abandoned_files(tmp_path)
        assert killed.temporary.exists() and deeper.temporary.exists(), "they were still at work"
        killed.kill()
        deeper.kill()
        remove_abandoned_files(tmp_path)
        assert living.temporary.exists()
        living.finish()
    assert names(tmp_path) == ["cache"]
    assert names(tmp_path / "cache") == [".notes.tmp", "second"]
    assert (tmp_path / "cache" / "second").read_text() == "living"


# --- what is on the disk when ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("existed", [False, True])
def test_a_file_is_synced_before_it_takes_its_name_and_its_directory_after(
    tmp_path: Path, disk: list[tuple[str, int]], existed: bool
) -> None:
    path = tmp_path / "note"
    if existed:
        path.write_bytes(b"old")
    write_bytes(path, b"new")
    assert disk == [("sync", inode(path)), ("rename", inode(path)), ("sync", inode(tmp_path))]


@pytest.mark.parametrize("existed", [False, True])
def test_a_whole_tree_is_synced_before_it_takes_its_name_and_the_directory_above_after(
    tmp_path: Path, disk: list[tuple[str, int]], existed: bool
) -> None:
    path = tmp_path / "out"
    if existed:
        path.mkdir()
        (path / "old").touch()
    before = inode(path) if existed else None
    with new_directory(path, anything) as folder:
        (folder / "deep" / "er").mkdir(parents=True)
        for place in ("a", "deep/b", "deep/er/c"):
            (folder / place).write_text(place)
        assert disk == []
    renamed = disk.index(("rename", inode(path)))
    everything = {inode(path), *(inode(place) for place in path.rglob("*"))}
    assert len(everything) == 6
    synced = [number for event, number in disk[:renamed] if event == "sync"]
    assert set(synced) == everything
    assert [number for event, number in disk[:renamed] if event == "rename"] == ([before] if existed else [])
    assert disk[renamed + 1 :] == [("sync", inode(tmp_path))]


@pytest.mark.parametrize(
    "complaint", [errno.EINVAL, errno.ENOTSUP, errno.EBADF], ids=lambda number: errno.errorcode[number]
)
def test_a_file_system_that_cannot_sync_directories_is_put_up_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, complaint: int
) -> None:
    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(complaint, os.strerror(complaint))

    monkeypatch.setattr(os, "fsync", fsync)
    write_text(tmp_path / "note", "1")
    with new_directory(tmp_path / "out") as folder:
        (folder / "a").write_text("1")
    assert names(tmp_path) == ["note", "out"]


@pytest.mark.parametrize("is_failing", [stat.S_ISDIR, stat.S_ISREG], ids=["directories", "files"])
def test_a_disk_that_fails_below_a_new_directory_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_failing: Callable[[int], bool]
) -> None:
    """Of files nothing is put up with; of directories, nothing but that there is no such thing as syncing them."""
    complaint = errno.EIO if is_failing is stat.S_ISDIR else errno.EINVAL
    words = "input/output error" if complaint == errno.EIO else os.strerror(complaint)

    def fsync(descriptor: int) -> None:
        if is_failing(os.fstat(descriptor).st_mode):
            raise OSError(complaint, os.strerror(complaint))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises((MachineError, OSError), match=words), new_directory(tmp_path / "out") as folder:
        (folder / "a").write_text("1")
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "what"),
    [("taken/a.txt", "taken' cannot be written .File exists"), ("folder", "folder' cannot be written .Is a directory")],
)
def test_what_stands_in_the_way_of_a_write_is_named_and_stays(tmp_path: Path, name: str, what: str) -> None:
    (tmp_path / "taken").write_text("theirs")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=rf"'{tmp_path}/{what}.; move away what is in its place"):
        write_text(tmp_path / name, "ours")
    assert names(tmp_path) == ["folder", "taken"]
    assert (tmp_path / "taken").read_text() == "theirs"


def test_what_is_read_in_the_meantime_is_not_said_to_be_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "texts" / "folder").mkdir(parents=True)
    with pytest.raises(IsADirectoryError), writing(tmp_path / "run" / "out"):
        (tmp_path / "texts" / "folder").read_text()
    with pytest.raises(IsADirectoryError), writing():
        (tmp_path / "texts" / "folder").read_text()


# --- new directories by hand ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "link", "link to nothing"])
def test_a_place_that_is_taken_by_no_directory_is_refused(tmp_path: Path, kind: str) -> None:
    path, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    if kind == "file":
        path.write_text("1")
    else:
        path.symlink_to(elsewhere)
    if kind == "link":
        elsewhere.mkdir()
    before = names(tmp_path)
    with pytest.raises(InputError, match=f"^'{path}' is there and is no directory; give the name of a new one$"):
        NewDirectory(path)
    assert names(tmp_path) == before


def test_what_was_published_is_not_discarded_any_more(tmp_path: Path) -> None:
    new = NewDirectory(tmp_path / "out")
    (new.temporary / "a").write_text("1")
    new.publish()
    new.discard()
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["a"]


def test_what_was_discarded_leaves_nothing(tmp_path: Path) -> None:
    new = NewDirectory(tmp_path / "out")
    (new.temporary / "a").write_text("1")
    new.discard()
    new.discard()
    assert names(tmp_path) == []


# --- records of a log, and stamps ----------------------------------------------------------------------------------


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


def test_json_is_valid_for_every_reader_and_what_is_no_number_is_null(tmp_path: Path) -> None:
    """`json` writes NaN as a word that JSON does not have."""
    value = {"a": [1.5, math.nan, (math.inf, -math.inf)], "b": {"c": math.nan, "d": "NaN"}, "e": 10**400}
    write_json(tmp_path / "file.json", value)

    def refuse(word: str) -> None:
        raise AssertionError(word)

    read = json.loads((tmp_path / "file.json").read_text(), parse_constant=refuse)
    assert read == {"a": [1.5, None, [None, None]], "b": {"c": None, "d": "NaN"}, "e": 10**400}
