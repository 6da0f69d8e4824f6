"""How a launcher announces ranks: deepspeed, torchrun, Open MPI, MPICH, Slurm, or none. The only place that knows.

What ranks of MPI have to know they ask each other (see `mpi`). Imports no torch.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass

import psutil

from adept_ds.base.errors import InputError
from adept_ds.base.lifeline import announced_launcher


@dataclass(frozen=True)
class LaunchedRank:
    """Who this process is among the processes of the run."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    master_addr: str
    master_port: int
    launcher: str

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def speaks(self) -> bool:
        """Whether it says for whom it waits: one on each host, and on that of rank 0 also who waits for it."""
        return self.local_rank == 0 or self.rank == 1


@dataclass(frozen=True)
class _Launcher:
    """The environment variables by which a launcher announces a rank."""

    name: str
    rank: str
    world_size: str
    local_rank: str
    local_size: tuple[str, ...]
    must_have: tuple[str, ...] = ()
    is_mpi: bool = False


# Order matters: an inner launcher (torchrun, mpirun) may run inside an outer one's step, and the innermost one
# started this process. srun's PMI plug-in sets PMI_RANK too, but not the local rank of MPICH's own launcher.
_LAUNCHERS = (
    _Launcher("env", "RANK", "WORLD_SIZE", "LOCAL_RANK", ("LOCAL_SIZE", "LOCAL_WORLD_SIZE")),
    _Launcher(
        "openmpi",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
        is_mpi=True,
    ),
    _Launcher(
        "mpich", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", ("MPI_LOCALNRANKS",), ("MPI_LOCALRANKID",), is_mpi=True
    ),
    _Launcher(
        "slurm",
        "SLURM_PROCID",
        "SLURM_STEP_NUM_TASKS",
        "SLURM_LOCALID",
        ("SLURM_STEP_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE"),
    ),
)

_STARTED_BY = {
    "CROSS_SIZE": 2,  # deepspeed's launcher on this host, and who started that
    "TORCHELASTIC_RUN_ID": 1,
    "OMPI_COMM_WORLD_RANK": 1,
    "MPI_LOCALRANKID": 1,
}
"""What a launcher sets for its ranks, and how many generations above them belong to it; Slurm ends steps by itself."""

_MARKS = ("CROSS_SIZE", "TORCHELASTIC_RUN_ID")
"""Of launchers that announce ranks by RANK and WORLD_SIZE, and that may run inside of another one's step."""


def rank_from_environment(env: Mapping[str, str]) -> LaunchedRank:
    """Derive who this process is from a launcher's environment variables; one process when there are none.

    Slurm counts only inside a step (SLURM_STEP_NUM_TASKS): the batch script itself also has SLURM_PROCID=0, and
    would wait for ranks that never come.

    Raises:
        InputError: the variables contradict each other, one is not a number, or ranks come without a master address on
            several hosts.
    """
    launcher = _launcher(env)
    if launcher is None:
        _check_no_half(env)
        return LaunchedRank(0, 1, 0, 1, "127.0.0.1", _free_port(), "none")
    rank, world_size = _number(env, launcher.rank), _number(env, launcher.world_size)
    if not 0 <= rank < world_size:
        raise InputError(
            f"{launcher.rank}={rank} does not fit {launcher.world_size}={world_size}; start all ranks with one launcher"
        )
    if launcher.is_mpi and world_size == 1:
        return LaunchedRank(0, 1, 0, 1, "127.0.0.1", _free_port(), launcher.name)
    if launcher.is_mpi:
        from adept_ds.ranks.mpi import world_of_mpi

        return world_of_mpi(launcher.name, launcher.world_size, world_size)
    if launcher.name == "env":
        _check_no_other_story(env, rank, world_size)
    local_size = _local_size(env, launcher, world_size)
    local_rank = _number(env, launcher.local_rank) if launcher.local_rank in env else rank
    if not 0 <= local_rank < local_size <= world_size:
        raise InputError(
            f"{launcher.local_rank}={local_rank} does not fit {local_size} ranks of this host and {world_size} in all; "
            "start all ranks with one launcher"
        )
    address, port = _master(env, is_one_host=local_size == world_size)
    return LaunchedRank(rank, world_size, local_rank, local_size, address, port, launcher.name)


def is_under_mpi(env: Mapping[str, str]) -> bool:
    """Whether mpirun has started this process itself, and others with it.

    One that is alone needs no MPI, and what it starts could not use it: there is one process for each of MPI's ranks.
    """
    launcher = _launcher(env)
    return launcher is not None and launcher.is_mpi and env[launcher.world_size] != "1"


def is_first_of_host(env: Mapping[str, str]) -> bool:
    """Whether no launcher, innermost or not, says that this is another rank of its host: then it may speak for all.

    Also where the variables make no sense otherwise, so that this is said once.
    """
    others = (env.get(launcher.local_rank, "0") for launcher in _LAUNCHERS[1:])
    return all(number == "0" for number in (env.get("LOCAL_RANK") or env.get("RANK", "0"), *others))


def rank_of_several(env: Mapping[str, str]) -> str | None:
    """The rank as the launcher writes it; None of one process."""
    launcher = _launcher(env)
    return None if launcher is None or env[launcher.world_size] == "1" else env[launcher.rank]


def share_cores(env: MutableMapping[str, str]) -> None:
    """Give each rank of a host its part of the cores (OMP_NUM_THREADS), unless that is set.

    Libraries read it when they are loaded, and would take all cores for each rank. A launcher that has bound the rank
    to fewer cores than it has itself is followed.
    """
    launcher = _launcher(env)
    if launcher is None or env.get("OMP_NUM_THREADS"):
        return
    try:
        local_size = _local_size(env, launcher, _number(env, launcher.world_size))
    except InputError:
        return  # it is said where ranks are needed
    if local_size > 1 or launcher.name == "slurm":
        env["OMP_NUM_THREADS"] = str(max(1, min(_cores(0), _cores_of_all(env, launcher) // max(1, local_size))))


def _cores_of_all(env: Mapping[str, str], launcher: _Launcher) -> int:
    """That the ranks of this host have together."""
    if launcher.name == "slurm" and env.get("SLURM_CPUS_ON_NODE", "").isdigit():
        return int(env["SLURM_CPUS_ON_NODE"])
    return max(_cores(0), _cores(os.getppid()))


def _cores(process: int) -> int:
    """That a process may use; 0 is this one."""
    try:
        return len(os.sched_getaffinity(process))
    except (AttributeError, OSError):  # not on every system, nor for every process
        return os.cpu_count() or 1


def _launcher(env: Mapping[str, str]) -> _Launcher | None:
    return next(_announcing(env), None)


def _announcing(env: Mapping[str, str]) -> Iterator[_Launcher]:
    """Innermost first."""
    return (
        entry for entry in _LAUNCHERS if all(key in env for key in (entry.rank, entry.world_size, *entry.must_have))
    )


def _check_no_half(env: Mapping[str, str]) -> None:
    """As of one that was meant to announce ranks: this would be one run for each of them, all in one directory."""
    for launcher in _LAUNCHERS[:2]:
        for key, other in ((launcher.rank, launcher.world_size), (launcher.world_size, launcher.rank)):
            if key in env:
                raise InputError(f"{key}='{env[key]}' is set, but {other} is not; unset it, or start with a launcher")


def _check_no_other_story(env: Mapping[str, str], rank: int, world_size: int) -> None:
    """Ranks that a shell has by accident would make each process of a step a run of its own, or wait for nobody."""
    if any(mark in env for mark in _MARKS):
        return
    for outer in list(_announcing(env))[1:]:
        found = _number(env, outer.rank), _number(env, outer.world_size)
        if found[1] > 1 and found != (rank, world_size):
            raise InputError(
                f"RANK={rank} of WORLD_SIZE={world_size} contradicts {outer.rank}={found[0]} of "
                f"{outer.world_size}={found[1]}; unset RANK and WORLD_SIZE"
            )


def launcher_processes(env: Mapping[str, str]) -> list[int]:
    """Processes without which a rank shall not go on (see `base.lifeline`); none for one that a user started.

    Whoever announced itself; and of deepspeed, torchrun and MPI the parent, which on other hosts than that of the
    launcher stands for it. Ranks that a script of the user's started with variables of its own may outlive it.
    """
    generations = next((count for mark, count in _STARTED_BY.items() if mark in env), 0)
    parents = [parent.pid for parent in psutil.Process().parents()[:generations]] if generations else []
    announced = announced_launcher(env)
    return parents if announced is None else [announced, *parents]


def _number(env: Mapping[str, str], key: str) -> int:
    try:
        return int(env[key])
    except ValueError:
        raise InputError(
            f"{key}='{env[key]}' in the environment is not a number; unset it or start with a launcher"
        ) from None


def _local_size(env: Mapping[str, str], launcher: _Launcher, world_size: int) -> int:
    key = next((key for key in launcher.local_size if key in env), None)
    if key is None:
        return world_size
    counts = _counts(key, env[key])
    node = env.get("SLURM_NODEID", "0") if len(counts) > 1 else "0"
    return counts[int(node)] if node.isdigit() and int(node) < len(counts) else counts[0]


def _counts(key: str, text: str) -> list[int]:
    """Tasks on each host; Slurm writes '4', '4(x2)' or '4(x2),3'."""
    counts = list[int]()
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise InputError(f"{key}='{text}' is not a number; unset it, or start the ranks with a launcher")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _master(env: Mapping[str, str], *, is_one_host: bool) -> tuple[str, int]:
    """Address and port of rank 0: announced, or derived in the same way by every rank."""
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST")
    address = env.get("MASTER_ADDR")
    if not address and not is_one_host:
        if not nodes:
            raise InputError("MASTER_ADDR is not set, and the ranks are on several hosts; set it to the host of rank 0")
        address = _first_host(nodes)
    if env.get("MASTER_PORT"):
        return address or "127.0.0.1", _number(env, "MASTER_PORT")
    # From the numbers of job and step, so that two on a host differ; below the ports that systems give out.
    job, step = (int(env.get(key, "0")) if env.get(key, "0").isdigit() else 0 for key in _OF_A_STEP)
    return address or "127.0.0.1", 20000 + (job + 1009 * step) % 10000


_OF_A_STEP = ("SLURM_JOB_ID", "SLURM_STEP_ID")


def _first_host(nodes: str) -> str:
    """Of Slurm's compressed list, such as 'gpu[03-05,9]-ib,login', which Slurm alone knows how to read."""
    if not re.search(r"[\[,]", nodes):
        return nodes
    try:
        listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=False)
        found, reason = listed.stdout.split(), listed.stderr.strip() or f"exit code {listed.returncode}"
    except OSError as error:
        found, reason = [], error.strerror or str(error)
    if not found:
        raise InputError(f"`scontrol show hostnames {nodes}` failed ({reason}); set MASTER_ADDR to the host of rank 0")
    return found[0]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
