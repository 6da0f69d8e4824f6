"""`adept status`: quick, for people and for programs, of runs and of studies; it changes nothing."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from harness.fresh_process import run_fresh
from harness.inprocess import run_here
from harness.launching import ROOT
from harness.made_up_run import make_run
from harness.waiting import until

from adept_ds.base.activity import Teller
from adept_ds.base.run_dir import RunDirectory
from adept_ds.base.writer_lock import WriterLock


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(make_run(tmp_path / "[bold]math"))


def test_it_loads_nothing_heavy(run: RunDirectory) -> None:
    ended = run_fresh("status", run.root)
    assert (ended.code, ended.loaded, ended.err) == (0, set(), "")


def test_people_read_every_figure_that_a_program_gets(run: RunDirectory) -> None:
    text = " ".join(run_here(["status", str(run.root)], ROOT).out.split())
    found = json.loads(run_here(["status", str(run.root), "--json"], ROOT).out)
    assert found["state"] == "unfinished"
    assert str(run.root) in text, "a name is no markup"
    for words in (
        "state unfinished: nobody works here",
        "step 100 of 100 (100%)",
        f"loss {found['loss']:.4f}, learning rate {found['lr']:.3g}",
        "held out general 2.2100, domain 1.6211 (step 100)",
        f"speed {found['tokens_per_second']:,.0f} tokens/s, 204,800 tokens so far",
        "done expand, train",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["status", "none"], "'none' is no directory; give the run_dir of a run, or the study_dir of a study"),
        (["status", "."], "'.' is no run directory; give the run_dir of a run"),
        (["status", "run", "--watch"], "--watch: is for a terminal"),
        (["status", "run", "--watch", "--json"], "--watch: is for a terminal"),
    ],
)
def test_what_cannot_be_told_is_one_line_with_exit_code_2(tmp_path: Path, arguments: list[str], words: str) -> None:
    make_run(tmp_path / "run")
    ended = run_here(arguments, tmp_path)
    (line,) = ended.err.splitlines()
    assert ended.code == 2
    assert line.startswith(f"adept: {words}")


def test_watching_goes_on_until_nobody_works_there(run: RunDirectory) -> None:
    """On a terminal of its own, as a person has it."""
    lock = WriterLock(run.lock, "run_dir")
    controller, terminal = pty.openpty()
    try:
        with lock.held(lambda text: None), Teller(run.activity, lock, ranks=1):
            process = subprocess.Popen(
                [sys.executable, "-m", "adept_ds", "status", str(run.root), "--watch"],
                cwd=ROOT,
                env=os.environ | {"COLUMNS": "300", "TERM": "xterm"},
                stdout=terminal,
                stderr=terminal,
            )
            shown = b""

            def has(words: bytes) -> bool:
                nonlocal shown
                shown += os.read(controller, 1 << 16)
                return words in shown

            until(lambda: has(b"running"))
            assert process.poll() is None
        until(lambda: has(b"ended"))
        assert process.wait(60) == 0
    finally:
        os.close(terminal)
        os.close(controller)


def test_a_study_is_told_by_its_cells(tmp_path: Path) -> None:
    """One that failed, one that is being run, one whose results are there, and one that was killed before."""
    study = tmp_path / "study"
    for name in ("adept_1", "full_2", "lora_3", "replay_4"):
        make_run(study / "cells" / name)
    (study / "cells" / "full_2" / "evaluation.json").unlink()
    for name in ("adept_1", "lora_3", "replay_4"):
        (study / "cells" / name / "document_losses.safetensors").touch()
    failure = {"code": 2, "reason": "adept: train.lr: with 1, weights are no numbers; lower it"}
    (study / "cells" / "lora_3" / "failure.json").write_text(json.dumps(failure))
    gone = RunDirectory(study / "cells" / "replay_4")
    record = {"pid": 1, "host": "n9", "process": "1,1,elsewhere", "since": "then", "command": "adept run x"}
    gone.lock.touch()
    os.utime(gone.lock, (1e9, 1e9))
    gone.lock.with_name("lock.json").write_text(json.dumps(record))
    running = RunDirectory(study / "cells" / "full_2")
    lock = WriterLock(running.lock, "run_dir")
    with lock.held(lambda text: None), Teller(running.activity, lock, ranks=1):
        found = json.loads(run_here(["status", str(study), "--json"], ROOT).out)
        text = run_here(["status", str(study)], ROOT).out
    assert {cell["name"]: cell["state"] for cell in found["cells"]} == {
        "adept_1": "finished",
        "full_2": "running",
        "lora_3": "failed",
        "replay_4": "killed",
    }
    assert found["state"] == "running", "whoever holds the cell works on the study"
    for words in ("1 finished", "1 running", "1 failed", "1 killed", "lower it"):
        assert words in " ".join(text.split())
