"""How a launcher announces ranks: deepspeed, torchrun, Open MPI, MPICH, Slurm, or none. The only place that knows.

Imports no torch.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
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
    ),
    _Launcher("mpich", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", ("MPI_LOCALNRANKS",), ("MPI_LOCALRANKID",)),
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


def rank_from_environment(env: Mapping[str, str]) -> LaunchedRank:
    """Derive who this process is from a launcher's environment variables; one process when there are none.

    Slurm counts only inside a step (SLURM_STEP_NUM_TASKS): the batch script itself also has SLURM_PROCID=0, and
    would wait for ranks that never come.

    Raises:
        InputError: a variable is not a number, or ranks come without a master address on several hosts.
    """
    launcher = next((entry for entry in _LAUNCHERS if _announces(env, entry)), None)
    if launcher is None:
        return LaunchedRank(0, 1, 0, 1, "127.0.0.1", _free_port(), "none")
    rank, world_size = _number(env, launcher.rank), _number(env, launcher.world_size)
    if not 0 <= rank < world_size:
        raise InputError(
            f"{launcher.rank}={rank} does not fit {launcher.world_size}={world_size}; start all ranks with one launcher"
        )
    local_rank = _number(env, launcher.local_rank) if launcher.local_rank in env else rank
    local_size = next((_first_number(key, env[key]) for key in launcher.local_size if key in env), world_size)
    address, port = _master(env, is_one_host=local_size >= world_size)
    return LaunchedRank(rank, world_size, local_rank, local_size, address, port, launcher.name)


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


def _announces(env: Mapping[str, str], launcher: _Launcher) -> bool:
    return all(key in env for key in (launcher.rank, launcher.world_size, *launcher.must_have))


def _first_number(key: str, text: str) -> int:
    """Slurm writes task counts as '4' or '4(x2)'."""
    match = re.match(r"\d+", text)
    if match is None:
        raise InputError(f"{key}='{text}' is not a number; unset it, or start the ranks with a launcher")
    return int(match.group())


def _master(env: Mapping[str, str], *, is_one_host: bool) -> tuple[str, int]:
    """Address and port of rank 0: announced, or derived in the same way by every rank."""
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST")
    address = env.get("MASTER_ADDR") or (_first_host(nodes) if nodes else None)
    if address is None and not is_one_host:
        raise InputError("MASTER_ADDR is not set, and the ranks are on several hosts; set it to the host of rank 0")
    if "MASTER_PORT" in env:
        return address or "127.0.0.1", _number(env, "MASTER_PORT")
    # From the job's number, so that two jobs on a host differ; below the ports that systems give out by themselves.
    job = re.search(r"\d+", env.get("SLURM_JOB_ID") or env.get("PMIX_NAMESPACE") or "0")
    return address or "127.0.0.1", 20000 + int(job.group() if job else 0) % 10000


def _first_host(node_list: str) -> str:
    """First host of Slurm's compressed list: 'gpu[03-05,9]-ib,login' -> 'gpu03-ib'."""
    head = re.match(r"(?:[^\[,]|\[[^\]]*\])*", node_list)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", head.group() if head else node_list)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
