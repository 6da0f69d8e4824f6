"""Ranks from any launcher, and the few small collectives that the program needs.

This is the only place that knows how a launcher announces ranks (deepspeed, torchrun, Open MPI, MPICH, Slurm).
Control traffic (a handful of numbers, an error, a yes or no) goes over a gloo group on the CPU: it never waits
for an accelerator's stream, and sums are float64 on every device.
"""

from __future__ import annotations

import datetime
import os
import re
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from adept_ds.errors import AdeptError, InputError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
_PATIENCE = datetime.timedelta(hours=24)


@dataclass(frozen=True)
class Ranks:
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


def ranks_from_environment(env: Mapping[str, str]) -> Ranks:
    """Derive the ranks from a launcher's environment variables; one process when there are none.

    Slurm counts only inside a step (SLURM_STEP_NUM_TASKS): the batch script itself also has SLURM_PROCID=0, and
    would wait for ranks that never come.

    Raises:
        InputError: a variable is not a number, or ranks come without a master address on several hosts.
    """
    launcher = next((entry for entry in _LAUNCHERS if _announces(env, entry)), None)
    if launcher is None:
        return Ranks(0, 1, 0, 1, "127.0.0.1", _free_port(), "none")
    rank, world_size = _number(env, launcher.rank), _number(env, launcher.world_size)
    if not 0 <= rank < world_size:
        raise InputError(
            f"{launcher.rank}={rank} does not fit {launcher.world_size}={world_size}; start all ranks with one launcher"
        )
    local_rank = _number(env, launcher.local_rank) if launcher.local_rank in env else rank
    local_size = next((_first_number(key, env[key]) for key in launcher.local_size if key in env), world_size)
    address, port = _master(env, is_one_host=local_size >= world_size)
    return Ranks(rank, world_size, local_rank, local_size, address, port, launcher.name)


def init_distributed(ranks: Ranks, timeout_minutes: float = 30.0) -> None:
    """Join the process group through DeepSpeed, with the ranks that were derived here.

    A peer that dies silently ends the run after `timeout_minutes`.
    """
    os.environ.update(
        RANK=str(ranks.rank),
        WORLD_SIZE=str(ranks.world_size),
        LOCAL_RANK=str(ranks.local_rank),
        LOCAL_SIZE=str(ranks.local_size),
        MASTER_ADDR=ranks.master_addr,
        MASTER_PORT=str(ranks.master_port),
    )
    # DeepSpeed compiles extensions at first use with ninja, which pip installs beside this Python.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    import deepspeed
    import torch.distributed as dist
    from deepspeed.accelerator import get_accelerator

    timeout = datetime.timedelta(minutes=timeout_minutes)
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        # A launcher may show each rank only its own device.
        accelerator.set_device(ranks.local_rank % accelerator.device_count())
    # One of a run that crashed here would be taken for this run's.
    _remove_shared_buffer(ranks)
    deepspeed.init_distributed(
        accelerator.communication_backend_name(), auto_mpi_discovery=False, verbose=False, timeout=timeout
    )
    global _control_group, _patient_group
    _control_group = _new_control_group(timeout)
    dist.barrier(_control_group)
    _remove_shared_buffer(ranks)
    _patient_group = dist.new_group(backend="gloo", timeout=_PATIENCE)


def _remove_shared_buffer(ranks: Ranks) -> None:
    """Take away the name of the memory that DeepSpeed (0.19.8, csrc/cpu/comm/shm.cpp) shares between CPU ranks.

    DeepSpeed never does: every run would leave 66 MiB of memory for each rank behind. Once every rank has mapped it,
    nobody needs the name, and the memory goes with the last process.
    """
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{ranks.master_addr}_{ranks.master_port}_{ranks.rank}"
    (Path("/dev/shm") / name).unlink(missing_ok=True)


_control_group: Any = None
_patient_group: Any = None
"""For `on_main_rank`: the others wait while rank 0 packs a large corpus or writes a large model."""


def _new_control_group(timeout: datetime.timedelta | None = None) -> Any:
    import torch.distributed as dist

    return dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo", timeout=timeout)


def _control() -> Any:
    """The group for small collectives; made at first use where `init_distributed` was not called (see `UnitLR`)."""
    global _control_group
    if _control_group is None:
        _control_group = _new_control_group()
    return _control_group


def shutdown() -> None:
    """Leave the process group, if there is one."""
    import torch.distributed as dist

    global _control_group, _patient_group
    _control_group = _patient_group = None
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return _dist().get_rank() if _is_parallel() else 0


def world_size() -> int:
    return _dist().get_world_size() if _is_parallel() else 1


def local_size() -> int:
    """Number of ranks on this host."""
    return int(os.environ["LOCAL_SIZE"]) if _is_parallel() else 1


def sum_over_ranks(values: Sequence[float] | torch.Tensor) -> torch.Tensor:
    """Element-wise float64 sum over ranks: one all-reduce of len(values) * 8 bytes."""
    import torch

    total = torch.as_tensor(values, dtype=torch.float64).cpu().clone()
    if _is_parallel():
        _dist().all_reduce(total, group=_control())
    return total


def max_over_ranks(*values: float) -> list[float]:
    """Element-wise maximum over ranks, in one all-reduce."""
    import torch

    result = torch.tensor(values, dtype=torch.float64)
    if _is_parallel():
        _dist().all_reduce(result, op=_dist().ReduceOp.MAX, group=_control())
    return [float(value) for value in result]


def all_ranks_equal(value: float) -> bool:
    """Whether every rank gave the same number; every rank gets the same answer."""
    highest, lowest = max_over_ranks(value, -value)
    return highest == -lowest


def gather_objects(value: T) -> list[T]:
    """The value of every rank, on every rank, in rank order."""
    if not _is_parallel():
        return [value]
    values: list[Any] = [None] * world_size()
    _dist().all_gather_object(values, value, group=_control())
    return values


def barrier() -> None:
    if _is_parallel():
        _dist().barrier(group=_control())


def on_main_rank(action: Callable[[], T]) -> T:
    """Run `action` on rank 0 and give every rank its result; an `AdeptError` there is raised everywhere.

    For work that belongs to one process (writing files). Without this, an error on rank 0 leaves the others
    waiting in a collective until the timeout.
    """
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = action()
        except AdeptError as error:
            outcome[1] = error
    if _is_parallel():
        _dist().broadcast_object_list(outcome, src=0, group=_patient_group)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def share_of_rank(count: int, rank: int, world_size: int) -> range:
    """The contiguous share of `count` items that falls to `rank`; shares differ by at most one item."""
    return range(count * rank // world_size, count * (rank + 1) // world_size)


def _dist() -> Any:
    import torch.distributed as dist

    return dist


def _is_parallel() -> bool:
    dist = _dist()
    return bool(dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)


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
