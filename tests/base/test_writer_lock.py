"""One writer at a time: who is refused, who waits, who takes over, and what is said."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.launching import ROOT

from adept_ds.base import writer_lock
from adept_ds.base.errors import InputError
from adept_ds.base.writer_lock import Holder, WriterLock

_HOLDER = """
import sys, time
from pathlib import Path
from adept_ds.base import writer_lock
from adept_ds.base.writer_lock import WriterLock
writer_lock.HEARTBEAT, writer_lock.LEASE = 0.5, 2.0
sys.argv[1:] = ["run", "math.yaml"]
lock = WriterLock(Path("lock"), "run_dir")
with lock.held(lambda text: print("said", text, flush=True)):
    print("held", flush=True)
    for line in sys.stdin:
        if line.strip() == "end":
            break
        lock.ends()
        print("told", flush=True)
"""

_ELSEWHERE = "filelock/2\npid={pid}\nhost=n7\nmode=lease\ntoken=abc\nduration=2.0\nstart=5\n"


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"HEARTBEAT": 0.5, "LEASE": 2.0, "_SETTLES": 0.3, "_LOOKS": 0.02}.items():
        monkeypatch.setattr(writer_lock, name, seconds)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of `tmp_path`; it obeys what it reads."""
    with subprocess.Popen(
        [sys.executable, "-c", _HOLDER],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "SLURM_JOB_ID": "77"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def take(folder: Path, said: list[str] | None = None) -> None:
    with WriterLock(folder / "lock", "run_dir").held((said if said is not None else []).append):
        assert (folder / "lock").exists()


def tell(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{word}\n")
    process.stdin.flush()


def test_a_second_writer_is_refused_in_a_line_that_says_who_where_since_when_and_what_to_do(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    with pytest.raises(InputError) as refusal:
        take(tmp_path)
    message = str(refusal.value)
    assert message.startswith(
        f"run_dir: '{tmp_path}' is being written by process {holder.pid} on {os.uname().nodename}"
    )
    assert f" since {time.strftime('%Y-%m-%d')}" in message
    assert "`adept run math.yaml`, Slurm job 77" in message
    assert f"`kill -TERM {holder.pid}` there, and it keeps a checkpoint" in message
    tell(holder, "end")
    holder.wait()
    take(tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_of_this_host_held_is_taken_over_at_once(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    holder.kill()
    holder.wait()
    begun = time.monotonic()
    take(tmp_path)
    assert time.monotonic() - begun < writer_lock.LEASE / 2, "it waited for a heartbeat"


def test_a_process_of_this_host_keeps_its_lock_even_if_it_stands_still(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    """As under a debugger: it gives no sign of life, but it is there."""
    holder.send_signal(signal.SIGSTOP)
    time.sleep(writer_lock.HEARTBEAT)  # what it was about to do
    with pytest.raises(InputError, match=f"is being written by process {holder.pid} on "):
        take(tmp_path)


def test_one_that_was_asked_to_stop_is_waited_for(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    tell(holder, "stop")
    assert holder.stdout is not None
    assert holder.stdout.readline() == "told\n"
    said = list[str]()
    lock = WriterLock(tmp_path / "lock", "run_dir")
    subprocess.Popen(["sh", "-c", f"sleep 1; kill -9 {holder.pid}"])
    with lock.held(said.append):
        pass
    assert f"waiting for process {holder.pid} " in said[0]
    assert "was asked to stop and writes its checkpoint" in said[0]


def test_a_process_of_another_host_is_taken_over_after_a_time_without_heartbeat_and_refuses_with_one(
    tmp_path: Path,
) -> None:
    lock, said = tmp_path / "lock", list[str]()
    lock.write_text(_ELSEWHERE.format(pid=12))
    Holder(pid=12, host="n7", process="12,1,n7", since="yesterday").save(tmp_path / "lock.json")
    begun = time.monotonic()
    take(tmp_path, said)
    assert time.monotonic() - begun >= writer_lock.LEASE
    assert "waiting for process 12 on n7 since yesterday" in said[0]

    lock.write_text(_ELSEWHERE.format(pid=13))
    beats = subprocess.Popen(["sh", "-c", "for i in 1 2 3 4 5 6 7 8; do sleep 0.3; touch lock; done"], cwd=tmp_path)
    with pytest.raises(InputError, match="is being written by process 13 on n7"):
        take(tmp_path)
    beats.wait()


def test_a_lock_that_a_crash_of_the_machine_left_empty_does_not_last_for_ever(tmp_path: Path) -> None:
    (tmp_path / "lock").touch()
    take(tmp_path)


def test_whoever_was_taken_for_dead_ends_without_writing(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    """As on a host that slept: another one has taken over meanwhile."""
    holder.send_signal(signal.SIGSTOP)
    (tmp_path / "lock").unlink()
    with WriterLock(tmp_path / "lock", "run_dir").held(lambda text: None):
        holder.send_signal(signal.SIGCONT)
        assert holder.wait(20) == 1
    assert holder.stdout is not None
    assert "has had another writer since this process gave no sign of life" in holder.stdout.read()


def test_a_place_that_cannot_be_written_is_a_mistake_of_the_users(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"run_dir: '.*file/run' cannot be written \(Not a directory\)"):
        take(tmp_path / "file" / "run")
