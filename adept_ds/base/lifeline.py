"""Processes that end when those are gone which started them, whatever ended these.

Whoever starts processes of adept says who it is in the environment (`LAUNCHER`), as `launch/` and `adept compare` do; a
launcher of somebody else's is known as a parent (see `ranks.launchers`). Once a second it is looked at, which needs no
help of the system's and sees a launcher that is not the parent.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Collection, Mapping
from pathlib import Path

import psutil

LAUNCHER = "ADEPT_LAUNCHER"
"""Environment variable: process, namespace of processes and machine of a launcher, as `this_launcher` writes it."""

PATIENCE = 300.0
"""Seconds that a process has for its checkpoint when its launcher is gone; then it is killed."""

_LOOKS = 1.0


def this_launcher() -> dict[str, str]:
    """What a process puts into the environment of those that shall end with it."""
    return {LAUNCHER: f"{os.getpid()},{_namespace()},{_machine()}"}


def announced_launcher(env: Mapping[str, str]) -> int | None:
    """The process that announced itself, where it is one of this host and can be seen from here."""
    number, _, rest = env.get(LAUNCHER, "").partition(",")
    namespace, _, machine = rest.partition(",")
    seen = number.isdigit() and machine == _machine() and namespace == _namespace()
    return int(number) if seen else None


def end_with(numbers: Collection[int], patience: float = PATIENCE) -> None:
    """From now on, as soon as one of these processes is gone: SIGTERM to this one, and after `patience` SIGKILL."""
    if numbers:
        watched = [_process(number) for number in numbers]
        threading.Thread(target=_watch, args=(watched, patience), name="lifeline", daemon=True).start()


def is_running(number: int) -> bool:
    """Whether there is such a process, and not only its exit code."""
    process = _process(number)
    return process is not None and _is_running(process)


def _watch(watched: Collection[psutil.Process | None], patience: float) -> None:
    while all(process is not None and _is_running(process) for process in watched):
        time.sleep(_LOOKS)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(patience)
    os.kill(os.getpid(), signal.SIGKILL)


def _process(number: int) -> psutil.Process | None:
    try:
        return psutil.Process(number)  # knows by its start that a later process of this number is another one
    except psutil.NoSuchProcess:
        return None


def _is_running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _machine() -> str:
    """By its start, where the system tells it: hosts of small clusters may all have the same name."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()


def _namespace() -> str:
    """In which processes have their numbers: another one in each container. Empty where the system has none."""
    try:
        return str(Path("/proc/self/ns/pid").stat().st_ino)
    except OSError:
        return ""
