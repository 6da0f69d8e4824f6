"""Runs as processes of this host: how they begin, are told to stop, and end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from harness.waiting import until
from harness.workspace import Workspace

from adept_ds.study.children import RunProcesses, last_words


def ended(run: RunProcesses) -> int:
    until(lambda: run.poll() is not None)
    code = run.poll()
    assert code is not None
    return code


def test_what_a_run_says_is_in_its_log(tmp_path: Path) -> None:
    log = tmp_path / "output.log"
    assert ended(RunProcesses(["version"], log, ranks=1, threads=1)) == 0
    assert last_words(log)
    assert ended(RunProcesses(["run", "nowhere.yaml"], log, ranks=1, threads=1)) == 2
    assert last_words(log) == "adept: nowhere.yaml: no such file; give the path of a YAML file"


def test_last_words_of_a_crash_are_its_error(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("data  12 blocks\nadept: unexpected KeyError\nTraceback (most recent call last):\nKeyError: 'x'\n")
    assert last_words(log) == "KeyError: 'x'"


def test_ranks_meet_and_stop_with_a_checkpoint(
    tmp_path: Path, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks, told to stop in the middle of training."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    run_dir = tmp_path / "run"
    config = workspace.config(run_dir, method="full", expand=None, importance=None, train={"steps": 5000})
    run = RunProcesses(["run", str(config)], tmp_path / "log", ranks=2, threads=1)
    metrics = run_dir / "metrics.jsonl"
    try:
        until(lambda: metrics.is_file() and '"loss"' in metrics.read_text())
        run.stop()
        assert ended(run) == 3, last_words(tmp_path / "log")
    finally:
        run.kill()
    assert json.loads((run_dir / "summary.json").read_text())["world_size"] == 2
    assert list((run_dir / "checkpoints").glob("step_*/manifest.json"))
