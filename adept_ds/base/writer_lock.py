"""One writer at a time: the lock on the directory of a run, or of a study.

The lock is a file that exists (`filelock.SoftFileLease`), so it also holds on network file systems that lock nothing.
Its holder touches it every `HEARTBEAT` seconds. Whoever comes next takes it over

    at once     from a process of this host that is gone; a later one of the same number has another start time
    after LEASE seconds without a heartbeat, by its own clock, from a process of another host

and is refused by any other. A holder that was asked to stop, or whose launcher is gone, writes its checkpoint first:
that is waited for. One that was taken for dead and comes back (a host that slept) ends without writing anything.
"""

from __future__ import annotations

import os
import shlex
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import NoReturn

from filelock import LeaseSettingsMismatch, SoftFileLease, Timeout

from adept_ds.base.errors import InputError
from adept_ds.base.lifeline import LAUNCHER, PATIENCE, announced_launcher, is_running, this_launcher
from adept_ds.base.records import Record

HEARTBEAT, LEASE = 10.0, 120.0
"""Seconds. Clients of network file systems may show times of files that are 60 s old."""

_SETTLES = 3.0
"""Seconds in which a holder may turn out to be about to end."""

_LOOKS, _SAID_EVERY = 0.2, 30.0

_COMMAND_CHARACTERS = 120


class Holder(Record):
    """What stands beside the lock (lock.json), for people and for those who wait."""

    pid: int
    host: str
    process: str = ""
    """As `lifeline.this_launcher` writes it."""
    since: str = "?"
    command: str = "?"
    job: str | None = None
    """Of Slurm."""
    ends: bool = False
    """It was asked to stop."""

    @classmethod
    def of_this_process(cls) -> Holder:
        command = shlex.join(["adept", *sys.argv[1:]])
        (process,) = this_launcher().values()
        return cls(
            pid=os.getpid(),
            host=socket.gethostname(),
            process=process,
            since=datetime.now().astimezone().isoformat(" ", "seconds"),
            command=command if len(command) <= _COMMAND_CHARACTERS else f"{command[:_COMMAND_CHARACTERS]}...",
            job=os.environ.get("SLURM_JOB_ID"),
        )

    @property
    def is_seen_running(self) -> bool:
        """False also where it cannot be seen from here, or has ended and nobody has asked for its code yet."""
        return announced_launcher({LAUNCHER: self.process}) is not None and is_running(self.pid)

    def __str__(self) -> str:
        job = f", Slurm job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host} since {self.since} (`{self.command}`{job})"


class WriterLock:
    """The lock on a directory.

    Args:
        path: of the lock, in the directory.
        key: by which the user knows the directory.
    """

    def __init__(self, path: Path, key: str) -> None:
        self._path, self._record, self._key = path, path.with_name(f"{path.name}.json"), key
        self._lease = SoftFileLease(
            path, lease_duration=LEASE, heartbeat_interval=HEARTBEAT, on_compromise=self._lost, thread_local=False
        )
        self._say: Callable[[str], None] = lambda text: None
        self._mine: Holder | None = None

    @contextmanager
    def held(self, say: Callable[[str], None]) -> Iterator[None]:
        """Wait until nobody else holds it, saying so, and hold it until the block ends.

        Raises:
            InputError: somebody else works there, or nothing can be written there.
        """
        self._say = say
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._acquire()
            self._mine = Holder.of_this_process()
            self._mine.save(self._record)
        except OSError as error:
            self._lease.release()
            raise InputError(
                f"{self._key}: '{self._path.parent}' cannot be written ({error.strerror}); choose another"
            ) from None
        try:
            yield
        finally:
            self._mine = None
            self._record.unlink(missing_ok=True)
            self._lease.release()

    @property
    def holder(self) -> Holder | None:
        """This process, while it holds the lock, and as far as the record beside it goes."""
        try:
            found = Holder.load(self._record)
        except InputError:
            return None
        mine = self._mine
        return found if mine is not None and (found.process, found.since) == (mine.process, mine.since) else None

    def ends(self) -> None:
        """Tell those who come that they need not wait long: this process was asked to stop."""
        if self._mine is not None:
            with suppress(OSError):
                self._mine.model_copy(update={"ends": True}).save(self._record)

    def _acquire(self) -> None:
        begun, said, first_seen = time.monotonic(), 0.0, self._stamp()
        while not self._try():
            holder, waited = self._holder(), time.monotonic() - begun
            if holder is None:
                if waited > LEASE:  # cut off by a crash of the machine
                    self._lease.force_break()
            elif waited > _patience(holder, touched=self._stamp() != first_seen):
                self._refuse(holder)
            elif waited - said > (_SAID_EVERY if said else _SETTLES):
                said = waited
                self._say(f"waiting for {holder}, which {_how(holder)}, {waited:.0f} s")
            time.sleep(_LOOKS)

    def _try(self) -> bool:
        try:
            self._lease.acquire(timeout=0)
        except (Timeout, LeaseSettingsMismatch):  # the latter: held by another version of this program
            return False
        return True

    def _holder(self) -> Holder | None:
        """None: the lock names nobody."""
        owner = self._lease.owner
        if owner is None:
            return None
        try:
            holder = Holder.load(self._record)
        except InputError:
            holder = None
        if holder is not None and holder.pid == owner.pid:
            return holder
        return Holder(pid=owner.pid, host=owner.hostname.partition("?")[0])  # filelock adds a container's number

    def _stamp(self) -> tuple[int, int] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns

    def _refuse(self, holder: Holder) -> NoReturn:
        raise InputError(
            f"{self._key}: '{self._path.parent}' is being written by {holder}; wait for it to end, or stop it: "
            f"`kill -TERM {holder.pid}` there, and it keeps a checkpoint"
        )

    def _lost(self, compromise: object) -> None:
        """In a thread of the lease's."""
        if getattr(compromise, "reason", "") == "refresh-failed":
            self._say(f"'{self._path}' cannot be reached: another host could take this process for dead")
            return
        self._say(
            f"'{self._path.parent}' has had another writer since this process gave no sign of life for {LEASE:.0f} s, "
            "or its lock was removed: ended, without a checkpoint"
        )
        os._exit(1)


def _patience(holder: Holder, *, touched: bool) -> float:
    """Seconds until it is clear that it goes on."""
    if holder.ends:
        return PATIENCE
    return _SETTLES if touched or holder.is_seen_running else LEASE + HEARTBEAT


def _how(holder: Holder) -> str:
    if holder.ends:
        return "was asked to stop and writes its checkpoint"
    return f"has given no sign of life yet, and after {LEASE:.0f} s without one counts as gone"
