"""All that is asked of the device: the only place that speaks to torch.cuda and DeepSpeed's accelerator."""

from __future__ import annotations

import functools
import gc
import resource
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from adept_ds.base.errors import InputError


def device_name() -> str:
    """'cpu', 'cuda' and so on."""
    from deepspeed.accelerator import get_accelerator

    return str(get_accelerator().device_name())


def current_device() -> torch.device:
    """The one of this rank."""
    from deepspeed.accelerator import get_accelerator

    return torch.device(get_accelerator().current_device_name())


def take_device(local_rank: int) -> str:
    """Let this rank use its own device of the host; returns the backend of collectives between such devices."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        # A launcher may show each rank only its own device.
        accelerator.set_device(local_rank % accelerator.device_count())
    return str(accelerator.communication_backend_name())


def bound_device() -> torch.device | None:
    """To which the process group is bound at once, as DeepSpeed does it; None: not on this kind of device."""
    hangs = "2.6.0" < torch.__version__ < "2.7.1"  # pytorch #153960
    return current_device() if device_name() == "cuda" and not hangs else None


_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_precision(precision: str) -> torch.dtype:
    """Of `train.precision`: `auto` is bf16 on an accelerator, where it is fast, and fp32 on a CPU, where bf16 is not.

    Raises:
        InputError: the device cannot train in this precision.
    """
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if precision == "auto":
        return torch.float32 if accelerator.device_name() == "cpu" else torch.bfloat16
    if precision == "fp16" and not accelerator.is_fp16_supported():
        raise InputError(
            f"train.precision: DeepSpeed does not train in fp16 on this device ({accelerator.device_name()}); "
            "use bf16 or fp32"
        )
    return _PRECISIONS[precision]


def name_of_precision(precision: torch.dtype) -> str:
    """As `train.precision` says it, where it does not leave it to the device."""
    return next(name for name, dtype in _PRECISIONS.items() if dtype == precision)


def _uses_cuda() -> bool:
    """A CUDA device may be there and not be used (`DS_ACCELERATOR=cpu`)."""
    return torch.cuda.is_available() and device_name() == "cuda"


def synchronize() -> None:
    """Wait for all that was started on the device."""
    if _uses_cuda():
        torch.cuda.synchronize()


def host_copy(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in the host's memory that nobody waits for: its content is there for what the device does later."""
    if tensor.device.type == "cpu":
        return tensor.clone()
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


def pinned(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy in memory that the device fetches from by itself, while the host goes on; may be called in any thread.

    A tensor on the host, for a CPU, stays as it is.
    """
    if device.type != "cuda":
        return tensor
    with torch.cuda.device(device):  # a thread begins with the first one of the host
        return tensor.pin_memory()


class Stopwatch:
    """Seconds that the device works, from when the watch is made until it is stopped; neither waits for the device."""

    def __init__(self) -> None:
        self._start = self._stop = self._now()

    def stop(self) -> None:
        self._stop = self._now()

    def seconds(self) -> float:
        """Of a stopped watch. Waits until the device has come so far."""
        if isinstance(self._start, float):
            return float(self._stop - self._start)
        self._stop.synchronize()
        return float(self._start.elapsed_time(self._stop)) / 1000

    @staticmethod
    def _now() -> Any:
        if not _uses_cuda():
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def free_unused() -> None:
    """Before a model is loaded: an engine that was released is part of reference cycles, and still holds its memory."""
    gc.collect()
    if _uses_cuda():
        torch.cuda.empty_cache()


def device_rng_state() -> torch.Tensor | None:
    """Of the device's own random number generator; None on a CPU."""
    return torch.cuda.get_rng_state() if _uses_cuda() else None


def set_device_rng_state(state: torch.Tensor | None) -> None:
    """None, or a machine without the device, changes nothing."""
    if state is not None and _uses_cuda():
        torch.cuda.set_rng_state(state)


def peak_memory_bytes() -> int:
    """Peak of this rank so far: allocated on the accelerator, or resident in the process on a CPU."""
    if _uses_cuda():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_memory_bytes(ranks_on_host: int) -> int:
    """Memory that this rank could still take: of its accelerator, or its share of the host's."""
    if _uses_cuda():
        return int(torch.cuda.mem_get_info()[0])  # what the caching allocator holds back counts as used: it was needed
    return free_host_memory_bytes() // ranks_on_host


def free_host_memory_bytes() -> int:
    """Memory that a process of this host could still take."""
    return min(int(psutil.virtual_memory().available), free_in_cgroups())


@functools.cache
def device_memory_bytes(device: torch.device) -> int | None:
    """All memory of an accelerator; None: of a CPU, which shares it with others."""
    if device.type == "cpu":
        return None
    from deepspeed.accelerator import get_accelerator

    return int(get_accelerator().total_memory(device.index))


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
