"""What `adept status` reads: a run's state is told by its lock and its last word, the rest by the end of its log."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness.launching import ROOT
from harness.made_up_run import make_run

from adept_ds.base.activity import Teller
from adept_ds.base.errors import InputError, StopRequestedError
from adept_ds.base.progress import stage
from adept_ds.base.run_dir import RunDirectory, checkpoint_tag, manifest_of
from adept_ds.base.run_records import log_line
from adept_ds.base.terminal import Terminal
from adept_ds.base.writer_lock import LEASE, WriterLock
from adept_ds.report.status import RunStatus, read_status, words_of

_HOLDER = """
import sys, time
from pathlib import Path
from adept_ds.base.activity import Teller
from adept_ds.base.writer_lock import WriterLock
sys.argv[1:] = ["run", "math.yaml"]
lock = WriterLock(Path("lock"), "run_dir")
with lock.held(print), Teller(Path("activity.json"), lock, ranks=1):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """At step 6 of 10, with a checkpoint of step 5; nobody works there."""
    run = RunDirectory(tmp_path / "math")
    run.root.mkdir()
    run.config.write_text(yaml.safe_dump({"train": {"steps": 10}}))
    write_steps(run, 6)
    for step in (5, 3):
        manifest_of(run.checkpoints / checkpoint_tag(step)).parent.mkdir(parents=True)
        manifest_of(run.checkpoints / checkpoint_tag(step)).write_text("{}")
    run.ledger.write_text(json.dumps({"probe": {}, "probe_corpus": {}, "eval_base": {}}))
    run.expanded.mkdir()
    run.expansion.write_text("{}")
    return run


def write_steps(run: RunDirectory, steps: int, **more: Any) -> None:
    lines: list[dict[str, Any]] = [{"step": 0, "refresh_seconds": 0.5}]
    lines += [{"step": 0, "eval": {"general": {"loss": 2.5}, "domain": {"loss": 2.0}}}]
    for step in range(1, steps + 1):
        line = {"step": step, "loss": 2.0 - 0.1 * step, "lr": 1e-3, "tokens": 100 * step, "seconds": 0.5}
        lines.append(line | {"tokens_per_second": 200.0, "mfu": 0.1} | more)
        if step == 4:
            lines.append({"step": 4, "eval": {"general": {"loss": 2.6}}})
    run.metrics.write_text("".join(map(log_line, lines)))


def end_with(run: RunDirectory, error: Exception | None = None) -> None:
    """A command that held the lock, and has ended so."""
    lock = WriterLock(run.lock, "run_dir")
    try:
        with lock.held(lambda text: None), Teller(run.activity, lock, ranks=2):
            if error:
                raise error
    except type(error or Exception()):
        pass


def hold(run: RunDirectory, *, process: str, since: str = "2026-03-02 14:03:22+01:00", age: float = 0.0) -> None:
    """A lock as somebody else has left it, who touched it so many seconds ago."""
    run.lock.write_text("filelock/2\n")
    os.utime(run.lock, (time.time() - age,) * 2)
    run.lock.with_name("lock.json").write_text(
        json.dumps({"pid": 4711, "host": "n1", "process": process, "since": since, "command": "adept run math.yaml"})
    )


ELSEWHERE = "4711,1,another-machine"


# --- how far it is --------------------------------------------------------------------------------------------------


def test_step_loss_speed_time_left_and_checkpoint_are_those_of_the_files(run: RunDirectory) -> None:
    found = read_status(run.root)
    assert (found.step, found.steps, found.loss, found.lr) == (6, 10, pytest.approx(1.4), 1e-3)
    assert (found.tokens, found.tokens_per_second) == (600, 200.0)
    assert found.left_seconds == pytest.approx(4 * 0.5), "four steps of half a second each"
    assert (found.checkpoint, found.done) == (5, ("probe", "expand"))
    assert {name: (held.step, held.loss) for name, held in found.held_out.items()} == {
        "general": (4, 2.6),
        "domain": (0, 2.0),
    }


@pytest.mark.parametrize(
    "torn", ['{"step": 7, "lo', '{"step": 7, "loss": 1.0, "crc32": "00000000"}\n', "\x00\x00", "7\n"]
)
def test_a_line_that_is_being_written_or_is_damaged_is_passed_over(run: RunDirectory, torn: str) -> None:
    with run.metrics.open("a") as file:
        file.write(torn)
    assert read_status(run.root).step == 6


def test_of_a_long_log_its_end_is_enough(run: RunDirectory) -> None:
    """20 MB: more than is read. What stands before is not known, and is not needed."""
    write_steps(run, 40, padding="x" * 500_000)
    found = read_status(run.root)
    assert run.metrics.stat().st_size > 20_000_000
    assert (found.step, found.held_out) == (40, {})


def test_a_loss_that_is_no_number_is_none_and_skipped_steps_are_counted(run: RunDirectory) -> None:
    with run.metrics.open("a") as file:
        file.write(log_line({"step": 7, "loss": float("nan"), "tokens": 700, "skipped": "loss", "skipped_steps": 3}))
    found = read_status(run.root)
    assert (found.step, found.loss, found.skipped_steps) == (7, None, 3)


def test_without_a_configuration_the_newest_checkpoint_says_how_many_steps_there_are(run: RunDirectory) -> None:
    """As after `adept train`, which writes no config.yaml."""
    run.config.unlink()
    assert read_status(run.root).steps is None
    manifest_of(run.checkpoints / checkpoint_tag(5)).write_text(json.dumps({"settings": {"train.steps": 12}}))
    assert read_status(run.root).steps == 12


@pytest.mark.parametrize("name", ["config", "ledger", "guard", "activity", "metrics"])
@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"[1]", b"{", b"null", b"{a: [}"])
def test_no_damaged_file_keeps_it_from_telling_the_rest(run: RunDirectory, name: str, content: bytes) -> None:
    getattr(run, name).write_bytes(content)
    found = read_status(run.root)
    assert found.checkpoint == 5
    assert RunStatus.model_validate_json(json.dumps(found.to_json())) == found


# --- its state ------------------------------------------------------------------------------------------------------


def test_a_run_that_somebody_works_on_says_who_at_what_and_since_when_it_went_on(run: RunDirectory) -> None:
    lock = WriterLock(run.lock, "run_dir")
    with lock.held(lambda text: None), stage("train"), Terminal(None).progress("training") as bar:
        bar(0.6, "step 6/10")
        with Teller(run.activity, lock, ranks=2):
            found = read_status(run.root)
    assert (found.state, found.stage, found.ranks) == ("running", "train", 2)
    assert found.by is not None
    assert found.by.pid == os.getpid()
    assert f"process {os.getpid()} on {os.uname().nodename}" in found.why
    assert [(at.title, at.share) for at in found.doing] == [("training", 0.6)]
    assert found.moved_seconds is not None
    assert found.seen_seconds is not None


def test_one_that_was_asked_to_stop_is_stopping(run: RunDirectory) -> None:
    lock = WriterLock(run.lock, "run_dir")
    with lock.held(lambda text: None), Teller(run.activity, lock, ranks=1):
        lock.ends()
        assert read_status(run.root).state == "stopping"


def test_one_that_was_killed_is_not_taken_for_running(run: RunDirectory) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _HOLDER],
        cwd=run.root,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        assert read_status(run.root).state == "running"
        process.send_signal(signal.SIGKILL)
        process.wait()
        found = read_status(run.root)
    assert found.state == "killed"
    assert f"process {process.pid} on " in found.why
    assert (found.stage, found.doing, found.seen_seconds) == (None, (), None)


def test_on_another_host_the_heartbeat_decides(run: RunDirectory) -> None:
    for age, state in ((1.0, "running"), (LEASE - 20, "running"), (LEASE + 20, "killed")):
        hold(run, process=ELSEWHERE, age=age)
        assert read_status(run.root).state == state


def test_a_process_that_is_there_and_gives_no_sign_of_life_is_silent(run: RunDirectory) -> None:
    """As after SIGSTOP; or the directory is a copy of the one where it writes."""
    lock = WriterLock(run.lock, "run_dir")
    with lock.held(lambda text: None):
        os.utime(run.lock, (time.time() - LEASE - 20,) * 2)
        found = read_status(run.root)
    assert found.state == "silent"
    assert "2 min" in found.why


def test_what_was_told_by_an_earlier_writer_is_not_taken_for_the_present_ones(run: RunDirectory) -> None:
    end_with(run, InputError("train.lr: broke down"))
    hold(run, process=ELSEWHERE)
    found = read_status(run.root)
    assert (found.state, found.doing, found.ranks) == ("running", (), None)


@pytest.mark.parametrize(
    ("error", "state", "words"),
    [
        (None, "unfinished", "training is at step 6 of 10; `adept run "),
        (StopRequestedError("stopped after step 6 of 10; checkpoint written"), "stopped", "; the same command goes on"),
        (InputError("train.lr: with 1, weights are no numbers; lower it"), "failed", "with exit code 2: train.lr: "),
        (ZeroDivisionError("here"), "failed", "with exit code 1: unexpected ZeroDivisionError: here"),
    ],
)  # fmt: skip
def test_one_that_ended_says_how(run: RunDirectory, error: Exception | None, state: str, words: str) -> None:
    end_with(run, error)
    found = read_status(run.root)
    assert found.state == state
    assert words in found.why
    assert (found.ranks, found.seen_seconds) == (2, None)


def test_one_is_finished_when_it_is_trained_and_exported(run: RunDirectory) -> None:
    """Whichever command was the last one there."""
    write_steps(run, 10)
    end_with(run)
    assert read_status(run.root).state == "unfinished"
    run.ledger.write_text(json.dumps({"probe": {}, "export": {}}))
    found = read_status(run.root)
    assert (found.state, found.left_seconds, found.done) == ("finished", None, ("probe", "expand", "train", "export"))


def test_one_that_the_guard_has_ended_is_trained(run: RunDirectory) -> None:
    run.guard.write_text(json.dumps({"reason": "general text 'web' has risen", "step": 6, "best": 5}))
    run.ledger.write_text(json.dumps({"export": {}}))
    end_with(run)
    found = read_status(run.root)
    assert (found.state, found.guard, found.left_seconds) == ("finished", "general text 'web' has risen", None)


def test_one_that_could_not_write_down_how_it_ended_has_failed(run: RunDirectory) -> None:
    """A full disk takes its last word too."""
    lock = WriterLock(run.lock, "run_dir")
    with lock.held(lambda text: None), Teller(run.activity, lock, ranks=1):
        kept = run.activity.read_bytes()
    run.activity.write_bytes(kept)
    found = read_status(run.root)
    assert found.state == "failed"
    assert "could not write down how" in found.why


def test_of_one_whose_ranks_have_not_met_nothing_is_written_yet(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.log(0).parent.mkdir()
    found = read_status(tmp_path)
    assert found.state == "not begun"
    assert "its ranks have not met" in found.why


def test_a_run_of_which_no_last_word_is_known_is_judged_by_its_files(tmp_path: Path) -> None:
    run = RunDirectory(make_run(tmp_path / "run"))
    assert read_status(run.root).state == "unfinished"
    run.ledger.write_text(json.dumps({"export": {}}))
    found = read_status(run.root)
    assert (found.state, found.step, found.steps) == ("finished", 100, 100)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    for place, words in ((tmp_path, "is no run directory"), (tmp_path / "none", "is no directory")):
        with pytest.raises(InputError, match=words):
            read_status(place)


def test_looking_changes_nothing(run: RunDirectory) -> None:
    """Neither a file nor the time of a directory, in which a temporary file would show."""
    end_with(run)

    def everything() -> dict[Path, tuple[int, bytes | None]]:
        paths = [run.root, *run.root.rglob("*")]
        return {path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None) for path in paths}

    before = everything()
    read_status(run.root)
    assert everything() == before


def test_durations_are_in_the_unit_that_people_use() -> None:
    assert [words_of(seconds) for seconds in (0, 89, 90, 3600, 5400, 86400, 172800)] == [
        "0 s", "89 s", "2 min", "60 min", "1.5 h", "24.0 h", "2.0 d"
    ]  # fmt: skip
