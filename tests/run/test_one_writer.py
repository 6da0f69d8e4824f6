"""One writer for each run directory: a second one is refused before anything heavy, and who only reads is not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.fresh_process import run_fresh
from harness.inprocess import run_here
from harness.launching import ROOT
from harness.made_up_run import make_run
from harness.marks import slow
from harness.waiting import until
from harness.workspace import Workspace

from adept_ds.base.files import read_json_lines
from adept_ds.base.writer_lock import WriterLock


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Path]:
    """A run directory into which this process writes."""
    run_dir = tmp_path / "run"
    with WriterLock(run_dir / "lock", "run_dir").held(lambda text: None):
        yield run_dir


@pytest.mark.parametrize("command", ["run", slow("expand")])
def test_a_second_writer_is_refused_before_anything_heavy(command: str, workspace: Workspace, held: Path) -> None:
    config = workspace.config(held, expand={"k": None, "layers": [1]})
    ended = run_fresh(command, config)
    assert ended.code == 2
    assert not ended.loaded
    (line,) = ended.err.splitlines()
    assert line.startswith(f"adept: run_dir: '{held}' is being written by process {os.getpid()} on ")
    assert "wait for it to end, or stop it" in line
    assert not (held / "expanded").exists()
    assert (held / "lock").exists()


def test_who_only_reads_is_not_held_up(workspace: Workspace, held: Path) -> None:
    make_run(held)
    config = workspace.config(held)
    for arguments in (["report", str(held)], ["report", str(config)], ["show", str(config)]):
        ended = run_here(arguments, ROOT)
        assert ended.code == 0, ended.err


@pytest.mark.slow
def test_a_killed_launcher_and_the_same_command_again_train_each_step_once(
    workspace: Workspace, tmp_path: Path
) -> None:
    """kill -9 of local.sh: its ranks write a checkpoint and end; the next start waits for that, and goes on."""
    run_dir = tmp_path / "run"
    train = {"steps": 4000, "checkpoint_every": 4000}
    config = workspace.config(run_dir, expand={"k": None, "layers": [1]}, importance={"initial": "ones"}, train=train)
    command = ["bash", str(ROOT / "launch/local.sh"), "2", "run", str(config)]
    env = os.environ | {"ADEPT_PYTHON": sys.executable}

    def last_step() -> int:
        return max((line["step"] for line in read_json_lines(run_dir / "metrics.jsonl") if "loss" in line), default=0)

    first = subprocess.Popen(command, cwd=ROOT, env=env)
    until(lambda: last_step() >= 2, timeout=1800)
    writer = json.loads((run_dir / "lock.json").read_text())
    first.send_signal(signal.SIGKILL)
    first.wait()
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) as second:
        until((run_dir / "checkpoints").is_dir, timeout=600)
        until(lambda: any((run_dir / "checkpoints").glob("step_*/manifest.json")), timeout=600)
        stopped_at = last_step()
        until(lambda: last_step() > stopped_at + 1, timeout=1800)
        assert json.loads((run_dir / "lock.json").read_text())["pid"] != writer["pid"]
        second.send_signal(signal.SIGTERM)
        out, _ = second.communicate(timeout=1800)
        assert second.returncode == 3
    assert f"resuming after step {stopped_at}" in out
    steps = [line["step"] for line in read_json_lines(run_dir / "metrics.jsonl") if "loss" in line]
    assert steps == [*range(1, len(steps) + 1)]
