"""Processes end with those that started them, whatever ended these."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from harness.launching import ROOT
from harness.waiting import until

from adept_ds.base.lifeline import LAUNCHER, announced_launcher, is_running, this_launcher
from adept_ds.ranks.launchers import launcher_processes

# A launcher that starts a launcher that starts a rank, as deepspeed does; each writes its number.
_CHAIN = """
import os, pathlib, subprocess, sys
name, *rest = sys.argv[1:]
pathlib.Path(name).write_text(str(os.getpid()))
subprocess.run([sys.executable, "-c", os.environ["PROGRAM"] if rest else os.environ["RANK_PROGRAM"], *rest])
"""

_RANK = """
import os, pathlib, signal, sys, time
from adept_ds.base.lifeline import end_with
from adept_ds.ranks.launchers import launcher_processes

def stop(*_):
    pathlib.Path("asked").touch()
    if "STUBBORN" not in os.environ:
        sys.exit(3)

signal.signal(signal.SIGTERM, stop)
end_with(launcher_processes(os.environ), patience=1.0)
pathlib.Path("rank").write_text(str(os.getpid()))
while True:
    time.sleep(0.1)
"""


class Chain:
    """launcher -> helper -> rank."""

    def __init__(self, folder: Path, **env: str) -> None:
        self.folder = folder
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CHAIN, "launcher", "helper"],
            cwd=folder,
            env=os.environ | {"PROGRAM": _CHAIN, "RANK_PROGRAM": _RANK, "PYTHONPATH": str(ROOT)} | env,
        )
        until(lambda: (folder / "rank").is_file() and bool((folder / "rank").read_text()))

    def number(self, name: str) -> int:
        return int((self.folder / name).read_text())

    def kill(self, name: str) -> None:
        os.kill(self.number(name), signal.SIGKILL)
        if name == "launcher":
            self._process.wait()

    def end(self) -> None:
        for name in ("rank", "helper", "launcher"):
            if is_running(self.number(name)):
                self.kill(name)
        self._process.wait()


@pytest.mark.parametrize(
    ("env", "killed"),
    [
        ({"CROSS_SIZE": "1"}, "launcher"),
        ({"CROSS_SIZE": "1"}, "helper"),
        ({"TORCHELASTIC_RUN_ID": "none"}, "helper"),
        ({"OMPI_COMM_WORLD_RANK": "0"}, "helper"),
    ],
    ids=["deepspeed", "deepspeed-on-this-host", "torchrun", "mpirun"],
)
def test_a_rank_is_asked_to_stop_when_its_launcher_is_killed(env: dict[str, str], killed: str, tmp_path: Path) -> None:
    chain = Chain(tmp_path, **env)
    try:
        chain.kill(killed)
        until((tmp_path / "asked").exists)
        until(lambda: not is_running(chain.number("rank")))
    finally:
        chain.end()


def test_a_launcher_that_says_who_it_is_need_not_be_a_parent_and_who_does_not_obey_is_killed(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as launcher:
        (mine,) = this_launcher().values()
        announced = mine.replace(str(os.getpid()), str(launcher.pid), 1)
        chain = Chain(tmp_path, STUBBORN="yes", **{LAUNCHER: announced})
        try:
            assert is_running(chain.number("rank"))
            launcher.kill()
            launcher.wait()
            until((tmp_path / "asked").exists)
            until(lambda: not is_running(chain.number("rank")))
        finally:
            chain.end()


def test_a_rank_that_starts_after_its_launcher_was_killed_ends_too(tmp_path: Path) -> None:
    """As where deepspeed itself takes its time to start."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    (mine,) = this_launcher().values()
    rank = subprocess.Popen(
        [sys.executable, "-c", _RANK],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), LAUNCHER: mine.replace(str(os.getpid()), str(gone.pid), 1)},
    )
    assert rank.wait(60) == 3


def test_processes_of_users_and_of_other_hosts_are_nobodys_children() -> None:
    """`nohup adept run &` outlives its shell; numbers of processes mean nothing on another host or in a container."""
    (mine,) = this_launcher().values()
    number, namespace, host = mine.split(",")
    assert announced_launcher({LAUNCHER: mine}) == os.getpid()
    for foreign in ("", f"{number},{namespace},n7", f"{number},1,{host}", "garbage", f",{namespace},{host}"):
        assert announced_launcher({LAUNCHER: foreign}) is None
        assert launcher_processes({LAUNCHER: foreign, "RANK": "0", "WORLD_SIZE": "2"}) == []
    assert launcher_processes({}) == []
