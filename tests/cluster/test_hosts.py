"""Two hosts: they run as one does, and what goes wrong with a host or a link is said, and costs nothing but time."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from cluster.hosts import NAMES, Hosts, shell
from harness.faults import CHECKPOINT_EVERY, Run, assert_same
from harness.launching import ROOT, adept
from harness.system_packages import need
from harness.waiting import outcome, until
from harness.workspace import Workspace

pytestmark = pytest.mark.cluster

SOON = 0.5
"""Minutes (`dist_timeout_minutes`) where a link is cut."""

_TELLS_THREADS = """
import os, sys
def hook(event, arguments):
    if event == "open" and str(arguments[0]).endswith("missing.yaml"):
        with open(f"{os.environ['PYTHON_TELLS']}.{os.environ['RANK']}", "w") as file:
            file.write(os.environ.get("OMP_NUM_THREADS", "all"))
sys.addaudithook(hook)
"""
"""As a rank has it when it reads its configuration."""


@pytest.fixture(scope="session")
def hosts(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    need(
        pytestconfig,
        {"sshd": "openssh-server", "ssh": "openssh-client", "pdsh": "pdsh", "ip": "iproute2", "mpirun": "openmpi-bin"},
    )
    two = Hosts(tmp_path_factory.mktemp("hosts"))
    yield two
    two.end()


@pytest.fixture
def hostfile(tmp_path: Path) -> Path:
    file = tmp_path / "hostfile"
    file.write_text("".join(f"{name} slots=1\n" for name in NAMES))
    return file


@pytest.fixture(scope="session")
def on_one_host(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same run on two ranks of this host."""
    run = Run(workspace, tmp_path_factory.mktemp("one") / "run", 2)
    ended = adept(2, "run", run.config())
    assert ended.returncode == 0, ended.stderr
    return run


@pytest.fixture
def run(workspace: Workspace, tmp_path: Path) -> Run:
    return Run(workspace, tmp_path / "run", 2)


def multinode(hostfile: Path, *arguments: object) -> str:
    return shell("bash", ROOT / "launch" / "multinode.sh", hostfile, *arguments)


def without_hosts(said: str) -> list[str]:
    """Lines without pdsh's prefix."""
    return [re.sub(r"^host[ab]: ", "", line) for line in said.splitlines()]


def go_on(hosts: Hosts, hostfile: Path, run: Run, on_one_host: Run, out: Path) -> None:
    """The same command again, which comes to the same, to the last bit."""
    process = hosts.start(multinode(hostfile, "run", run.config()), out=out, OMP_NUM_THREADS="1")
    code, said = outcome(process, out)
    assert code == 0, said
    assert "resuming after step" in said
    assert_same(run.results(), on_one_host.results())


Note = Callable[[str, object], None]


def test_two_hosts_run_as_one_does_and_nobody_else_says_anything(
    hosts: Hosts, hostfile: Path, run: Run, on_one_host: Run, tmp_path: Path, record_property: Note
) -> None:
    """To the last bit: two ranks have one order in which they can be summed. Neither DeepSpeed nor pdsh speaks."""
    record_property("ranks", 2)
    out = tmp_path / "out"
    process = hosts.start(multinode(hostfile, "run", run.config()), out=out, OMP_NUM_THREADS="1")
    code, said = outcome(process, out)
    assert code == 0, said
    assert_same(run.results(), on_one_host.results())
    assert not re.search(r"\[(INFO|WARNING|ERROR)\]|pdsh@|launcher|\x1b", said), said
    record_property("result", "as on one host, to the last bit")


def test_ranks_share_the_cores_of_their_host_and_arguments_arrive_as_they_are(
    hosts: Hosts, tmp_path: Path, record_property: Note
) -> None:
    record_property("ranks", 3)
    (tmp_path / "sitecustomize.py").write_text(_TELLS_THREADS)
    (tmp_path / "hostfile").write_text("hosta slots=2\nhostb slots=1\n")
    odd = 'run_dir=it\'s 100%n "$HOME" `id`'
    process = hosts.start(
        multinode(tmp_path / "hostfile", "run", tmp_path / "missing.yaml", odd),
        out=tmp_path / "out",
        PYTHONPATH=f"{tmp_path}:{ROOT}",
        PYTHON_TELLS=str(tmp_path / "threads"),
    )
    code, said = outcome(process, tmp_path / "out")
    assert code == 2
    cores = len(os.sched_getaffinity(0))
    threads = [(tmp_path / f"threads.{rank}").read_text() for rank in range(3)]
    assert threads[:2] == [str(max(1, cores // 2))] * 2
    assert threads[2] in ("all", str(cores)), "alone on its host"
    assert without_hosts(said) == [f"adept: {tmp_path}/missing.yaml: no such file; give the path of a YAML file"]
    record_property("result", f"{threads[0]} threads of {cores} each, bad input said once")


def test_a_host_that_cannot_be_reached_is_named_and_nothing_starts(
    hosts: Hosts, hostfile: Path, run: Run, tmp_path: Path, record_property: Note
) -> None:
    hosts.kill("hostb")
    try:
        process = hosts.start(multinode(hostfile, "run", run.config()), out=tmp_path / "out")
        code, said = outcome(process, tmp_path / "out")
    finally:
        hosts.begin("hostb")
    assert code == 2
    unreached, refused = said.splitlines()
    found = re.fullmatch(
        r"multinode.sh: hostb: ssh: connect to host hostb port 22: (No route to host|.*timed out)", unreached
    )
    assert found, said
    assert refused == (
        f"multinode.sh: nothing was started, because of the hosts above; mend them, or remove them from '{hostfile}'"
    )
    assert not run.root.exists()
    record_property("result", f"refused: {found[1]}")


def test_a_host_that_dies_is_named_and_the_same_command_goes_on(
    hosts: Hosts, hostfile: Path, run: Run, on_one_host: Run, tmp_path: Path, record_property: Note
) -> None:
    record_property("ranks", 2)
    process = hosts.start(multinode(hostfile, "run", run.config()), out=tmp_path / "out", OMP_NUM_THREADS="1")
    until(lambda: run.steps_done > CHECKPOINT_EVERY or process.poll() is not None, 300)
    hosts.kill("hostb")
    killed = time.monotonic()
    code, said = outcome(process, tmp_path / "out")
    took = time.monotonic() - killed
    hosts.begin("hostb")
    assert code == 4, said
    assert re.search(r"^hosta: adept: rank 1 \(process \d+ on hostb\) ", said, flags=re.MULTILINE), said
    go_on(hosts, hostfile, run, on_one_host, tmp_path / "again")
    record_property("result", f"named and ended {took:.0f} s later, resumed to the last bit")


def test_a_link_that_goes_down_ends_the_run_and_the_same_command_goes_on(
    hosts: Hosts, hostfile: Path, run: Run, on_one_host: Run, tmp_path: Path, record_property: Note
) -> None:
    record_property("ranks", 2)
    config = run.config(dist_timeout_minutes=SOON)
    process = hosts.start(multinode(hostfile, "run", config), out=tmp_path / "out", OMP_NUM_THREADS="1")
    until(lambda: run.steps_done > CHECKPOINT_EVERY or process.poll() is not None, 300)
    hosts.cut("hostb")
    cut = time.monotonic()
    try:
        code, said = outcome(process, tmp_path / "out")
    finally:
        hosts.join("hostb")
    took = time.monotonic() - cut
    assert code == 4, said
    assert re.search(r"^hosta: adept: rank 1 \(process \d+ on hostb\) ", said, flags=re.MULTILINE), said
    go_on(hosts, hostfile, run, on_one_host, tmp_path / "again")
    record_property(
        "result", f"named and ended {took:.0f} s later ({60 * SOON:.0f} s allowed), resumed to the last bit"
    )


def test_a_signal_to_the_script_stops_all_hosts_with_a_checkpoint(
    hosts: Hosts, hostfile: Path, run: Run, on_one_host: Run, tmp_path: Path, record_property: Note
) -> None:
    record_property("ranks", 2)
    process = hosts.start("exec " + multinode(hostfile, "run", run.config()), out=tmp_path / "out", OMP_NUM_THREADS="1")
    until(lambda: run.steps_done >= 1 or process.poll() is not None, 300)
    for script in psutil.Process(process.pid).children():  # nsenter's only one
        script.send_signal(signal.SIGTERM)
    code, said = outcome(process, tmp_path / "out")
    assert code == 3, said
    assert sum("run the same command again" in line for line in said.splitlines()) == 1, said
    go_on(hosts, hostfile, run, on_one_host, tmp_path / "again")


def test_mpirun_on_two_hosts_needs_no_address_of_rank_0(
    hosts: Hosts, run: Run, on_one_host: Run, tmp_path: Path, record_property: Note
) -> None:
    """Each host has an interface, and the first one at that, which leads nowhere."""
    record_property("ranks", 2)
    script = tmp_path / "start"
    made = adept(
        1, "launch", "--scheduler", "mpi", "--nodes", 2, "--gpus-per-node", 0, "--hosts", "hosta,hostb", run.config()
    )
    assert made.returncode == 0, made.stderr
    script.write_text(made.stdout)
    process = hosts.start(
        shell("bash", script),
        out=tmp_path / "out",
        OMP_NUM_THREADS="1",
        OMPI_ALLOW_RUN_AS_ROOT="1",
        OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1",
    )
    code, said = outcome(process, tmp_path / "out")
    assert code == 0, said
    assert_same(run.results(), on_one_host.results())
    record_property("result", "as on one host, to the last bit")


@pytest.mark.parametrize("launcher", ["pdsh", "openmpi"])
def test_the_deepspeed_launcher_itself_starts_ranks_on_two_hosts(
    launcher: str, hosts: Hosts, hostfile: Path, run: Run, on_one_host: Run, tmp_path: Path, record_property: Note
) -> None:
    """It hands pdsh an address of rank 0, and mpirun none."""
    record_property("ranks", 2)
    words = ["deepspeed", "--hostfile", hostfile, "--launcher", launcher, "--no_local_rank", "--module", "adept_ds"]
    (tmp_path / "env").write_text("OMP_NUM_THREADS=1\nDS_ACCELERATOR=cpu\n")
    process = hosts.start(
        shell(*words, "run", run.config()),
        out=tmp_path / "out",
        DS_ENV_FILE=str(tmp_path / "env"),
        OMPI_ALLOW_RUN_AS_ROOT="1",
        OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1",
    )
    code, said = outcome(process, tmp_path / "out")
    assert code == 0, said
    assert_same(run.results(), on_one_host.results())
    record_property("result", "as on one host, to the last bit")


def test_one_script_for_torchrun_starts_each_host_as_what_it_is(
    hosts: Hosts, run: Run, on_one_host: Run, tmp_path: Path, record_property: Note
) -> None:
    record_property("ranks", 2)
    options = ["--scheduler", "torchrun", "--nodes", 2, "--gpus-per-node", 0, "--hosts", "hosta,hostb"]
    made = adept(1, "launch", *options, run.config())
    assert made.returncode == 0, made.stderr
    (tmp_path / "start").write_text(made.stdout)
    outs = {name: tmp_path / name for name in NAMES}
    started = {
        name: hosts.start(shell("bash", tmp_path / "start"), out=out, on=name, OMP_NUM_THREADS="1")
        for name, out in outs.items()
    }
    for name, process in started.items():
        code, said = outcome(process, outs[name])
        assert code == 0, said
    assert_same(run.results(), on_one_host.results())
    record_property("result", "as on one host, to the last bit")
