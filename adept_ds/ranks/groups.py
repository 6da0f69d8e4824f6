"""Meeting the other ranks, and leaving them: the process groups of a run."""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adept_ds.base.errors import InputError
from adept_ds.ranks.collectives import Ranks
from adept_ds.ranks.extensions import own_builds
from adept_ds.ranks.launchers import LaunchedRank
from adept_ds.ranks.meeting import meet
from adept_ds.ranks.mpi import leave_mpi


def join(
    launched: LaunchedRank, timeout_minutes: float = 30.0, say: Callable[[str], None] = lambda text: None
) -> Ranks:
    """Join the process group through DeepSpeed, as the rank that the launcher announced.

    A peer that dies silently ends the run after `timeout_minutes`.

    Args:
        say: what is waited for.

    Raises:
        InputError: ranks do not find each other, or cannot connect.
    """
    os.environ.update(
        RANK=str(launched.rank),
        WORLD_SIZE=str(launched.world_size),
        LOCAL_RANK=str(launched.local_rank),
        LOCAL_SIZE=str(launched.local_size),
        MASTER_ADDR=launched.master_addr,
        MASTER_PORT=str(launched.master_port),
    )
    # DeepSpeed compiles extensions at first use with ninja, which pip installs beside this Python.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    import deepspeed
    import torch.distributed as dist

    from adept_ds.models.device import bound_device, take_device

    timeout = datetime.timedelta(minutes=timeout_minutes)
    backend = take_device(launched.local_rank)
    own_builds(say if launched.local_rank == 0 else lambda text: None)  # who waits on a host waits for the same
    # One of a run that crashed here would be taken for this run's.
    _remove_shared_buffer(launched)
    store = meet(launched, timeout_minutes, say)
    leave_mpi()
    with _naming_interfaces():
        dist.init_process_group(
            backend,
            store=store,
            rank=launched.rank,
            world_size=launched.world_size,
            timeout=timeout,
            device_id=bound_device() if launched.world_size > 1 else None,
        )
        control, of_main = control_group(timeout), dist.new_group(backend="gloo", timeout=timeout)
        dist.barrier(control)
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)
    dist.barrier(control)
    _remove_shared_buffer(launched)
    sign_of_life = min(10.0, 60 * timeout_minutes / 3)
    return Ranks(launched.rank, launched.world_size, launched.local_size, control, of_main, sign_of_life)


def joined() -> Ranks:
    """The ranks of a process group that somebody else has made; alone, if there is none. Every rank calls this."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return Ranks()
    group = control_group()
    local_size = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or dist.get_world_size())
    return Ranks(dist.get_rank(), dist.get_world_size(), local_size, group, group)


def leave() -> None:
    """Leave the process group, if there is one."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def control_group(timeout: datetime.timedelta | None = None) -> Any:
    """A gloo group of all ranks: the default one where that is one."""
    import torch.distributed as dist

    return dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo", timeout=timeout)


@contextmanager
def _naming_interfaces() -> Iterator[None]:
    """Ranks that have met at the store now connect with each other, by whichever network each of them chose."""
    try:
        yield
    except RuntimeError as error:
        raise InputError(
            f"the ranks have met, but cannot connect with each other ({str(error).splitlines()[0][:200]}); set "
            "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface that connects their hosts"
        ) from None


def _remove_shared_buffer(launched: LaunchedRank) -> None:
    """Take away the name of the memory that DeepSpeed (0.19.8, csrc/cpu/comm/shm.cpp) shares between CPU ranks.

    DeepSpeed never does: every run would leave 66 MiB of memory for each rank behind. Once every rank has mapped it,
    nobody needs the name, and the memory goes with the last process.
    """
    rank = f"{launched.master_addr}_{launched.master_port}_{launched.rank}"
    (Path("/dev/shm") / f"deepspeed_allreduce_buffer_{os.getuid()}_{rank}").unlink(missing_ok=True)
