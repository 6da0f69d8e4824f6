"""One `adept compare` at a time works on a study.

The lock is of the system's, on an open file that runs hold open as well: a study that was killed lets go of it only
when the run that it had started has written its checkpoint and ended.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adept_ds.base.errors import InputError
from adept_ds.base.terminal import Terminal

_PATIENCE = 300.0
"""Seconds in which a run whose study was killed writes its checkpoint."""


@contextmanager
def locked(path: Path, terminal: Terminal) -> Iterator[int]:
    """Gives the descriptor of the lock, for the runs that are started.

    Raises:
        InputError: somebody else works on the study.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _wait(descriptor, path, terminal)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)


def _wait(descriptor: int, path: Path, terminal: Terminal) -> None:
    until, said = time.monotonic() + _PATIENCE, False
    while not _taken(descriptor):
        number, _, host = os.pread(descriptor, 300, 0).decode(errors="replace").partition(" ")
        abandoned = host.strip() == socket.gethostname() and number.isdigit() and not _is_running(int(number))
        if not abandoned or time.monotonic() > until:
            raise InputError(
                f"study_dir: '{path.parent}' is being worked on by process {number or '?'} on {host.strip() or '?'}; "
                "wait for it to end, or stop it (SIGTERM: it keeps a checkpoint)"
            )
        if not said:
            terminal.stage("compare", "a run of an interrupted study still writes its checkpoint: waiting for it")
            said = True
        time.sleep(0.2)


def _taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_running(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return not _is_zombie(number)


def _is_zombie(number: int) -> bool:
    """Ended, and only not yet asked about by its parent."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (OSError, IndexError):
        return False
