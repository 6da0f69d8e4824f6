"""mpirun on this host: real Open MPI, real ranks."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from harness.faults import Run, assert_same
from harness.launching import ROOT, adept
from harness.system_packages import need
from harness.waiting import outcome, until
from harness.workspace import Workspace

pytestmark = pytest.mark.cluster

Note = Callable[[str, object], None]

_FAILS = """
from adept_ds.base.errors import InputError
from adept_ds.cli.app import main
import adept_ds.run.train
def broken(*arguments):
    raise {error}
adept_ds.run.train.train_stage = broken
main()
"""
"""`adept`, which fails when it trains: long after the ranks have met."""


@pytest.fixture(scope="session", autouse=True)
def _open_mpi(pytestconfig: pytest.Config) -> None:
    need(pytestconfig, {"mpirun": "openmpi-bin"})


@pytest.fixture
def run(workspace: Workspace, tmp_path: Path) -> Run:
    return Run(workspace, tmp_path / "run", 2)


def program(*arguments: object) -> list[str]:
    return [sys.executable, "-u", *map(str, arguments)]


def failing(error: str, run: Run) -> list[str]:
    return program("-c", _FAILS.format(error=error), "run", run.config())


def begin(out: Path, *ranks: tuple[int, list[str]]) -> subprocess.Popen[bytes]:
    """mpirun with so many ranks of each program; without a word about where rank 0 is."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }
    contexts = [part for count, words in ranks for part in (":", "-n", str(count), *words)][1:]
    with out.open("wb") as file:
        return subprocess.Popen(
            ["mpirun", "--quiet", "--oversubscribe", *contexts],
            env=environment,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )


@pytest.mark.parametrize("ranks", [2, 3])
def test_mpirun_runs_what_other_launchers_run(
    ranks: int, workspace: Workspace, tmp_path: Path, record_property: Note
) -> None:
    """Bit for bit with ranks that were given RANK and MASTER_ADDR; and a log has no escapes and few lines."""
    record_property("ranks", ranks)
    other = Run(workspace, tmp_path / "other", ranks)
    done = adept(ranks, "run", other.config())
    assert done.returncode == 0, done.stderr
    run = Run(workspace, tmp_path / "run", ranks)
    code, said = outcome(
        begin(tmp_path / "out", (ranks, program("-m", "adept_ds", "run", run.config()))), tmp_path / "out"
    )
    assert code == 0, said
    assert_same(run.results(), other.results())
    assert "\x1b" not in said
    record_property("result", f"the same to the last bit, {len(said)} bytes of output")


def test_a_rank_that_raises_ends_all_and_is_named(run: Run, tmp_path: Path, record_property: Note) -> None:
    record_property("ranks", 3)
    whole = program("-m", "adept_ds", "run", run.config())
    process = begin(tmp_path / "out", (2, whole), (1, failing('ZeroDivisionError("planted")', run)))
    code, said = outcome(process, tmp_path / "out")
    assert code == 1, said
    assert "adept[rank 2]: unexpected ZeroDivisionError" in said
    assert re.search(r"^adept: rank 2 on \S+ has failed, and ends all ranks$", said, flags=re.MULTILINE), said
    assert not [child for child in psutil.Process().children(recursive=True) if str(run.root) in words_of(child)]
    record_property("result", "named, all ranks gone")


def test_what_one_rank_finds_while_the_others_train_is_said_once(
    run: Run, tmp_path: Path, record_property: Note
) -> None:
    """By another one, as under any launcher: mpirun gives it the time."""
    record_property("ranks", 2)
    whole = program("-m", "adept_ds", "run", run.config())
    process = begin(tmp_path / "out", (1, whole), (1, failing('InputError("key: bad; mend it")', run)))
    code, said = outcome(process, tmp_path / "out")
    assert code == 2, said
    assert said.count("adept: key: bad; mend it\n") == 1, said


def test_input_that_is_bad_for_all_is_said_once(run: Run, tmp_path: Path, record_property: Note) -> None:
    record_property("ranks", 3)
    process = begin(tmp_path / "out", (3, program("-m", "adept_ds", "run", run.config(), "train.lr=-1")))
    code, said = outcome(process, tmp_path / "out")
    assert code == 2
    assert re.fullmatch(r"adept: .*train\.lr: -1 is not possible.*\n", said), said


def test_input_that_is_bad_for_one_rank_ends_all_and_names_it(run: Run, tmp_path: Path, record_property: Note) -> None:
    record_property("ranks", 2)
    good, bad = (program("-m", "adept_ds", "run", run.config(), *more) for more in ((), ("train.lr=-1",)))
    code, said = outcome(begin(tmp_path / "out", (1, good), (1, bad)), tmp_path / "out")
    assert code == 2, said
    assert re.search(r"^adept: rank 1 on \S+ has failed, and ends all ranks: .*train\.lr", said, flags=re.MULTILINE), (
        said
    )


def test_two_jobs_at_once_on_a_host_do_not_meet(workspace: Workspace, tmp_path: Path, record_property: Note) -> None:
    record_property("ranks", "2 + 2")
    runs = [Run(workspace, tmp_path / name, 2) for name in ("first", "second")]
    outs = [tmp_path / f"{run.root.name}.out" for run in runs]
    started = [
        begin(out, (2, program("-m", "adept_ds", "run", run.config()))) for run, out in zip(runs, outs, strict=True)
    ]
    for process, out in zip(started, outs, strict=True):
        code, said = outcome(process, out)
        assert code == 0, said
    assert_same(runs[0].results(), runs[1].results())
    record_property("result", "both finished, with the same")


def test_a_signal_to_mpirun_stops_with_a_checkpoint(run: Run, tmp_path: Path, record_property: Note) -> None:
    """SIGUSR1, which it passes on; and the same command goes on."""
    record_property("ranks", 2)
    command = program("-m", "adept_ds", "run", run.config())
    process = begin(tmp_path / "out", (2, command))
    until(lambda: run.steps_done >= 1 or process.poll() is not None, 300)
    process.send_signal(signal.SIGUSR1)
    code, said = outcome(process, tmp_path / "out")
    assert code == 3, said
    assert said.count("run the same command again") == 1, said
    code, said = outcome(begin(tmp_path / "again", (2, command)), tmp_path / "again")
    assert code == 0, said
    assert "resuming after step" in said


def test_ranks_outlive_mpirun_for_a_checkpoint(run: Run, tmp_path: Path, record_property: Note) -> None:
    record_property("ranks", 2)
    process = begin(tmp_path / "out", (2, program("-m", "adept_ds", "run", run.config())))
    until(lambda: run.steps_done >= 1 or process.poll() is not None, 300)
    ranks = psutil.Process(process.pid).children(recursive=True)
    steps = run.steps_done
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed = time.monotonic()
    until(lambda: not any(is_alive(rank) for rank in ranks))
    assert max(int(folder.name.removeprefix("step_")) for folder in run.files.checkpoints.glob("step_*")) >= steps
    record_property("result", f"a checkpoint, and gone {time.monotonic() - killed:.0f} s later")


def test_variables_of_an_mpirun_that_is_not_there_are_refused(run: Run) -> None:
    """As in a shell that something under mpirun has started: ranks 1 and 2 would never come."""
    left = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    done = subprocess.run(
        program("-m", "adept_ds", "run", run.config()),
        env=os.environ | left,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert re.fullmatch(r"adept: OMPI_COMM_WORLD_SIZE=3, but mpi4py knows 1 \(it uses Open MPI .*\); .*\n", done.stderr)


def words_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
