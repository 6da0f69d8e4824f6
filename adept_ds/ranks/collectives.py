"""Ranks from any launcher, and the few small collectives that the program needs.

This is the only place that knows how a launcher announces ranks (deepspeed, torchrun, Open MPI, MPICH, Slurm).
Control traffic (a handful of numbers, an error, a yes or no) goes over a gloo group on the CPU: it never waits
for an accelerator's stream, and sums are float64 on every device.
"""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from adept_ds.base.errors import AdeptError
from adept_ds.ranks.launchers import Ranks

if TYPE_CHECKING:
    import torch


T = TypeVar("T")


_PATIENCE = datetime.timedelta(hours=24)


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


def _dist() -> Any:
    import torch.distributed as dist

    return dist


def _is_parallel() -> bool:
    dist = _dist()
    return bool(dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)
