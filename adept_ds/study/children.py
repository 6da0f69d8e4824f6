"""Runs as processes of this host: `python -m adept_ds COMMAND CONFIG` on one rank or several, with output in a log.

They are told to stop as a launcher would tell them, and end by themselves, with a checkpoint, when whoever started them
is gone.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from adept_ds.base.errors import EXIT_STOPPED
from adept_ds.base.lifeline import this_launcher

_PATIENCE = 60.0
"""Seconds that ranks have to end once one of them has failed: it may be what they wait for."""

_OF_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class RunProcesses:
    """The ranks of one run."""

    def __init__(self, arguments: Sequence[str], log: Path, *, ranks: int, threads: int | None) -> None:
        """Start them.

        Args:
            arguments: of `adept`.
            log: what all of them say is appended to it.
            threads: of each rank; None: as many cores as it has.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        cores = len(os.sched_getaffinity(0))
        common = {name: value for name, value in os.environ.items() if name not in _OF_LAUNCHERS}
        common |= {"OMP_NUM_THREADS": str(threads or max(1, cores // ranks))} | this_launcher()
        self._failed_at: float | None = None
        self._processes = list[subprocess.Popen[bytes]]()
        port = _free_port()
        with log.open("ab") as output:
            for rank in range(ranks):
                self._processes.append(
                    subprocess.Popen(
                        [sys.executable, "-u", "-m", "adept_ds", *arguments],
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        env=common | (_rank_environment(rank, ranks, port) if ranks > 1 else {}),
                        start_new_session=True,  # Ctrl-C reaches the study alone, which tells its runs
                    )
                )

    def poll(self) -> int | None:
        """The exit code of all of them: 0, or that of the first that failed; None while one is running."""
        codes = [process.poll() for process in self._processes]
        failed = [code for code in codes if code]
        if None not in codes:
            return next((code for code in failed if code != EXIT_STOPPED), EXIT_STOPPED) if failed else 0
        if failed:
            self._failed_at = self._failed_at or time.monotonic()
            if time.monotonic() - self._failed_at > _PATIENCE:
                self.kill()
        return None

    def stop(self) -> None:
        """Ask them to write a checkpoint and end."""
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        for process in self._processes:
            with suppress(ProcessLookupError):
                process.send_signal(number)


def last_words(log: Path) -> str:
    """The last line that a run said: of `adept` itself, unless that only announces a traceback."""
    if not log.is_file():
        return ""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    own = [line for line in lines if line.startswith("adept") and ": unexpected " not in line]
    return (own or lines or [""])[-1]


def _rank_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": str(rank),
        "LOCAL_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
