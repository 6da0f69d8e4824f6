"""Runs as processes of this host: how they begin, are told to stop, and end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness.launching import ROOT
from harness.workspace import Workspace

from adept_ds.base.errors import InputError
from adept_ds.base.terminal import Terminal
from adept_ds.study.children import RunProcesses, last_words
from adept_ds.study.lock import locked

HOLDER = """
import subprocess, sys, time
from pathlib import Path
from adept_ds.base.terminal import Terminal
from adept_ds.study.lock import locked

with locked(Path(sys.argv[1]), Terminal(None)) as lock:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1.5)"], pass_fds=(lock,))
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def lock(tmp_path: Path) -> Iterator[int]:
    with locked(tmp_path / "lock", Terminal(None)) as descriptor:
        yield descriptor


def until(condition: Callable[[], bool], timeout: float = 90.0) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def ended(run: RunProcesses) -> int:
    until(lambda: run.poll() is not None)
    code = run.poll()
    assert code is not None
    return code


def test_what_a_run_says_is_in_its_log(tmp_path: Path, lock: int) -> None:
    log = tmp_path / "output.log"
    assert ended(RunProcesses(["version"], log, ranks=1, threads=1, lock=lock)) == 0
    assert last_words(log)
    assert ended(RunProcesses(["run", "nowhere.yaml"], log, ranks=1, threads=1, lock=lock)) == 2
    assert last_words(log) == "adept: nowhere.yaml: no such file; give the path of a YAML file"


def test_last_words_of_a_crash_are_its_error(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("data  12 blocks\nadept: unexpected KeyError\nTraceback (most recent call last):\nKeyError: 'x'\n")
    assert last_words(log) == "KeyError: 'x'"


def test_ranks_meet_and_stop_with_a_checkpoint(
    tmp_path: Path, workspace: Workspace, lock: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks, told to stop in the middle of training."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    run_dir = tmp_path / "run"
    config = workspace.config(run_dir, method="full", expand=None, importance=None, train={"steps": 5000})
    run = RunProcesses(["run", str(config)], tmp_path / "log", ranks=2, threads=1, lock=lock)
    metrics = run_dir / "metrics.jsonl"
    try:
        until(lambda: metrics.is_file() and '"loss"' in metrics.read_text())
        run.stop()
        assert ended(run) == 3, last_words(tmp_path / "log")
    finally:
        run.kill()
    assert json.loads((run_dir / "summary.json").read_text())["world_size"] == 2
    assert list((run_dir / "checkpoints").glob("step_*/manifest.json"))


def test_two_cannot_work_on_one_study(tmp_path: Path, lock: int) -> None:
    with (
        pytest.raises(InputError, match=f"being worked on by process {os.getpid()} on "),
        locked(tmp_path / "lock", Terminal(None)),
    ):
        pass


def test_a_killed_study_is_held_until_its_run_has_ended(tmp_path: Path) -> None:
    """The lock is the run's too: whoever comes next waits for the checkpoint that it writes."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "lock")], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    begun = time.monotonic()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with locked(tmp_path / "lock", Terminal(None)):
        assert time.monotonic() - begun > 0.5
