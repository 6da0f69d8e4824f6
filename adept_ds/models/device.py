"""Memory of one rank: what it used at most, and what is left over."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import psutil
import torch

from adept_ds.base.errors import InputError
from adept_ds.config.schema import Config


def peak_memory_bytes() -> int:
    """Peak of this rank so far: allocated on the accelerator, or resident in the process on a CPU."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_memory_bytes(ranks_on_host: int) -> int:
    """Memory that this rank could still take: of its accelerator, or its share of the host's."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])  # what the caching allocator holds back counts as used: it was needed
    return min(int(psutil.virtual_memory().available), free_in_cgroups()) // ranks_on_host


def free_in_cgroups(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """What the control groups around this process (a Slurm job, a container) leave; sys.maxsize without a limit.

    Args:
        root, own: where the kernel (cgroup v2) shows all groups, and the name of this process's own.
    """
    try:
        (entry,) = [line for line in own.read_text().splitlines() if line.startswith("0::")]
    except (OSError, ValueError):
        return sys.maxsize
    group, free = root / entry.removeprefix("0::").lstrip("/"), sys.maxsize
    for folder in (group, *group.parents):
        limit, used = folder / "memory.max", folder / "memory.current"
        if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
            free = min(free, max(0, int(text) - int(used.read_text())))
    return free


def resolve_precision(config: Config) -> torch.dtype:
    """`auto` is bf16 on an accelerator, where it is fast, and fp32 on a CPU, where it is emulated.

    Raises:
        InputError: the device cannot train in this precision.
    """
    from deepspeed.accelerator import get_accelerator

    accelerator, precision = get_accelerator(), config.train.precision
    if precision == "auto":
        return torch.float32 if accelerator.device_name() == "cpu" else torch.bfloat16
    if precision == "fp16" and not accelerator.is_fp16_supported():
        raise InputError(
            f"train.precision: DeepSpeed does not train in fp16 on this device ({accelerator.device_name()}); "
            "use bf16 or fp32"
        )
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
