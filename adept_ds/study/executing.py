"""One run after another, on this host: each with its shared work, until its end or until somebody asks to stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from adept_ds.base.errors import EXIT_STOPPED, StopRequestedError
from adept_ds.ranks.stopping import StopRequest
from adept_ds.study.children import RunProcesses

_LOOKS = 0.1
"""Seconds between two looks at a run."""


@dataclass(frozen=True)
class Executor:
    """How runs are started."""

    ranks: int
    threads: int | None
    stop: StopRequest

    def execute(self, arguments: Sequence[str], log: Path, look: Callable[[], None] = lambda: None) -> int:
        """Run `adept ARGUMENTS` to its end.

        Args:
            look: called while it runs.

        Returns:
            Its exit code.

        Raises:
            StopRequestedError: somebody asked this process, or the run, to stop.
        """
        run = RunProcesses(arguments, log, ranks=self.ranks, threads=self.threads)
        told = False
        try:
            while (code := run.poll()) is None:
                if self.stop.requested and not told:
                    run.stop()
                    told = True
                time.sleep(_LOOKS)
                look()
        except BaseException:  # a second Ctrl-C
            run.kill()
            raise
        if code and (told or code == EXIT_STOPPED):
            raise StopRequestedError(
                "stopped; the run in progress keeps its checkpoint, and finished ones their results"
            )
        return code
