"""`adept compare` whose runs are forked from this process, which has imported the libraries already.

    python -m harness.compare_worker ARGUMENTS-OF-ADEPT

Everything else is as in `study.children`: output in a log, and an end with whoever started them.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

from adept_ds.base.lifeline import this_launcher
from adept_ds.cli.app import main
from adept_ds.study import executing


class ForkedRun:
    """In place of `RunProcesses`, on one rank."""

    def __init__(self, arguments: Sequence[str], log: Path, *, ranks: int, threads: int | None) -> None:
        assert ranks == 1
        sys.stdout.flush()
        launcher = this_launcher()
        self._process = os.fork()
        if not self._process:
            os.environ.update(launcher)
            os._exit(self._become(arguments, log))
        self._code: int | None = None

    def poll(self) -> int | None:
        if self._code is None:
            process, status = os.waitpid(self._process, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if process else None
        return self._code

    def stop(self) -> None:
        os.kill(self._process, signal.SIGTERM)

    def kill(self) -> None:
        os.kill(self._process, signal.SIGKILL)

    def _become(self, arguments: Sequence[str], log: Path) -> int:
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.argv = ["adept", *arguments]
        try:
            main()
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else int(end.code is not None)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
        return 0


if __name__ == "__main__":
    with mock.patch.object(executing, "RunProcesses", ForkedRun):
        main()
