"""Real ranks: processes with the environment that a launcher gives them.

Everything runs in fp32 on the CPU, one thread per rank, so that sums are formed in a fixed order.
"""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from harness.rank_processes import RankProcess

ROOT = Path(__file__).resolve().parent.parent.parent
"""Of the repository."""


def launch(world_size: int, arguments: Sequence[str], timeout: float = 600.0) -> subprocess.CompletedProcess[str]:
    """Start `python ARGUMENTS` on `world_size` real ranks; the result of the first rank that failed, else of rank 0."""
    processes = start(world_size, arguments)
    results = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=timeout)
            results.append(subprocess.CompletedProcess(list(arguments), process.wait(), out, err))
    finally:
        for process in processes:
            process.kill()
    return next((result for result in results if result.returncode != 0), results[0])


def start(world_size: int, arguments: Sequence[str]) -> list[RankProcess]:
    """Start `python ARGUMENTS` on real ranks and leave them running."""
    port = free_port()
    return [RankProcess(arguments, rank_environment(rank, world_size, port), ROOT) for rank in range(world_size)]


def adept(world_size: int, *arguments: object, timeout: float = 600.0) -> subprocess.CompletedProcess[str]:
    """`adept ARGUMENTS` on real ranks."""
    return launch(world_size, ["-m", "adept_ds", *map(str, arguments)], timeout)


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    launcher = (
        {}
        if world_size == 1
        else {
            "RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_RANK": str(rank),
            "LOCAL_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    )
    return os.environ | launcher | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def counted(workspace: Path, output: Path, what: str) -> dict[str, Any]:
    """What `harness.counting_worker` found on two ranks."""
    result = launch(2, ["-m", "harness.counting_worker", str(workspace), str(output), what])
    assert result.returncode == 0, result.stderr
    return dict(torch.load(output))
