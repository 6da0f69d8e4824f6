"""activity.json: what a process is at as long as it holds the lock, how it ended, and that nothing ends by it."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from harness.waiting import until

from adept_ds.base import activity, progress
from adept_ds.base.activity import Activity, Teller
from adept_ds.base.errors import InputError, LostRankError, MachineError, StopRequestedError
from adept_ds.base.progress import stage
from adept_ds.base.terminal import Terminal
from adept_ds.base.writer_lock import WriterLock


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activity, "EVERY", 0.02)


def lock_in(folder: Path) -> WriterLock:
    return WriterLock(folder / "lock", "run_dir")


def told(folder: Path) -> Activity:
    return Activity.load(folder / "activity.json")


def test_it_tells_who_works_at_what_and_how_far_it_is(tmp_path: Path) -> None:
    lock = lock_in(tmp_path)
    with lock.held(lambda text: None), Teller(tmp_path / "activity.json", lock, ranks=2):
        first = told(tmp_path)
        assert (first.by.pid, first.ranks, first.stage, first.bars, first.ended) == (os.getpid(), 2, "", (), None)
        with stage("train"), Terminal(None).progress("training") as outer:
            outer(0.25, "step 1/4")
            with Terminal(None).progress("evaluating") as inner:
                inner(0.5)
                until(lambda: len(told(tmp_path).bars) == 2)
                found = told(tmp_path)
        until(lambda: told(tmp_path).bars == ())
    assert found.stage == "train"
    assert [(bar.title, bar.share, bar.text) for bar in found.bars] == [
        ("training", 0.25, "step 1/4"),
        ("evaluating", 0.5, ""),
    ]
    assert not (tmp_path / "lock").exists()


def test_time_left_is_by_the_pace_since_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step compiles and warms up: it says nothing about the others. 10 s a tenth: 80 s for the rest."""
    now = 1000.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with Terminal(None).progress("training") as bar:
        now += 500.0
        bar(0.1, "step 1/10")
        assert progress.open_bars()[0].left is None
        now += 10.0
        bar(0.2, "step 2/10")
        assert progress.open_bars()[0].left == pytest.approx(80.0)
        bar(1.0, "step 10/10")
        assert progress.open_bars()[0].left == 0.0


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (None, 0, ""),
        (StopRequestedError("stopped after step 3; checkpoint written"), 3, "stopped after step 3; checkpoint written"),
        (InputError("train.lr: with 1, it broke down; lower it"), 2, "train.lr: with 1, it broke down; lower it"),
        (MachineError("no space left on 'x'; make room"), 4, "no space left on 'x'; make room"),
        (LostRankError("rank 1 died", 4), 4, "rank 1 died"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (TypeError("no such thing"), 1, "unexpected TypeError: no such thing"),
    ],
)  # fmt: skip
def test_the_last_word_is_how_the_command_ended(
    tmp_path: Path, error: BaseException | None, code: int, reason: str
) -> None:
    lock = lock_in(tmp_path)
    try:
        with lock.held(lambda text: None), Teller(tmp_path / "activity.json", lock, ranks=1):
            if error is not None:
                raise error
    except BaseException as raised:
        assert raised is error
    ended = told(tmp_path).ended
    assert ended is not None
    assert (ended.code, ended.reason) == (code, reason)


def test_what_was_said_last_is_not_written_over(tmp_path: Path) -> None:
    """By the thread, or by the main thread that a watch has given up."""
    lock = lock_in(tmp_path)
    with lock.held(lambda text: None), Teller(tmp_path / "activity.json", lock, ranks=1) as teller:
        teller.end(4, "rank 1 hangs")
        with Terminal(None).progress("training") as bar:
            bar(0.5)
            time.sleep(5 * activity.EVERY)
    ended = told(tmp_path).ended
    assert ended is not None
    assert (ended.code, ended.reason) == (4, "rank 1 hangs")


def test_whoever_was_taken_for_dead_writes_nothing_any_more(tmp_path: Path) -> None:
    lock = lock_in(tmp_path)
    with lock.held(lambda text: None):
        with Teller(tmp_path / "activity.json", lock, ranks=1):
            record = json.loads((tmp_path / "lock.json").read_text())
            (tmp_path / "lock.json").write_text(json.dumps(record | {"process": "1,2,another"}))
            (tmp_path / "activity.json").write_text("of another")
            with Terminal(None).progress("training") as bar:
                bar(0.5)
                time.sleep(5 * activity.EVERY)
        assert (tmp_path / "activity.json").read_text() == "of another"


def test_no_work_ends_because_it_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    lock = lock_in(tmp_path)
    with lock.held(lambda text: None), Teller(tmp_path / "file" / "activity.json", lock, ranks=1):
        pass
    assert (tmp_path / "file").read_text() == "in the way"
