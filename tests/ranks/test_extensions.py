"""DeepSpeed's extensions: each environment builds in its own place, and nobody waits for the dead."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.launching import ROOT
from harness.waiting import until

from adept_ds.base.errors import InputError
from adept_ds.ranks import extensions
from adept_ds.ranks.extensions import Baton, directory_of_environment

_BUILDER = """
import sys, time
from adept_ds.ranks.extensions import Baton
baton = Baton(sys.argv[1], say=lambda text: None)
assert baton.try_acquire()
print("builds", flush=True)
sys.stdin.readline()
baton.release()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(extensions, "_SAID_EVERY", 0.2)
    folder = tmp_path / "deepspeed_shm_comm"
    folder.mkdir()
    return folder


@pytest.fixture
def builder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that builds there, until it reads a line."""
    with subprocess.Popen(
        [sys.executable, "-c", _BUILDER, str(folder / "lock")],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "builds\n"
        yield process
        process.kill()


def test_what_a_killed_build_of_torchs_left_behind_holds_nobody_up(folder: Path) -> None:
    (folder / "lock").touch()
    said = list[str]()
    baton = Baton(str(folder / "lock"), say=said.append)
    assert baton.try_acquire()
    assert said == [f"compiling DeepSpeed's extension in '{folder}': a minute, once for this environment"]
    baton.release()


def test_others_wait_for_who_builds_and_say_for_whom(folder: Path, builder: subprocess.Popen[str]) -> None:
    said, answers = list[str](), list[bool]()
    waiting = threading.Thread(
        target=lambda: answers.append(Baton(str(folder / "lock"), say=said.append).try_acquire())
    )
    waiting.start()
    until(lambda: len(said) > 1)
    assert f"waiting for process {builder.pid} on " in said[0]
    assert not answers
    (folder / "extension.so").touch()
    assert builder.stdin is not None
    builder.stdin.write("\n")
    builder.stdin.flush()
    waiting.join(60)
    assert answers == [False], "it is built"


def test_the_build_of_a_killed_process_is_taken_over(folder: Path, builder: subprocess.Popen[str]) -> None:
    builder.kill()
    builder.wait()
    baton = Baton(str(folder / "lock"), say=lambda text: None)
    assert baton.try_acquire()
    baton.release()


def test_a_compiler_that_outlived_who_started_it_is_waited_for(folder: Path) -> None:
    """It still writes the same files."""
    said = list[str]()
    with subprocess.Popen(["sleep", "1"], cwd=folder) as compiler:
        baton = Baton(str(folder / "lock"), say=said.append)
        assert baton.try_acquire()
        assert compiler.poll() is not None
    assert f"waiting for process {compiler.pid}, left by one that was killed" in said[0]
    baton.release()


def test_every_environment_has_a_directory_of_its_own_however_ranks_are_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    mine = directory_of_environment()
    assert mine.parent == tmp_path / "adept_ds" / "torch_extensions"
    for accelerator in ("cpu", "cuda"):
        monkeypatch.setenv("DS_ACCELERATOR", accelerator)
        assert directory_of_environment() == mine
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "mine"))
    assert directory_of_environment() == tmp_path / "mine" / mine.name
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(directory_of_environment()))
    assert directory_of_environment() == tmp_path / "mine" / mine.name, "as in a process that a rank started"
    others = set[str]()
    for where, name, value in ((sys, "prefix", "/other"), (extensions, "_instructions", lambda: "flags: older")):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, value)
            others.add(directory_of_environment().name)
    with monkeypatch.context() as patch:
        patch.setattr(extensions, "_version", lambda package: "0.1")
        others.add(directory_of_environment().name)
    assert len(others | {mine.name}) == 4


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"^TORCH_EXTENSIONS_DIR: '.*file' cannot be written \(.*\); set another$"):
        Baton(str(tmp_path / "file" / "lock"), say=lambda text: None).try_acquire()
