"""Stopping on request: a signal is noted, and acted upon where nothing is lost."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from adept_ds.base.errors import StopRequestedError
from adept_ds.base.progress import ProgressCallback
from adept_ds.ranks.collectives import Ranks


class StopRequest:
    """Set by USR1 (Slurm's warning before the end), TERM or INT.

    Training goes on to the end of its step and writes a checkpoint; the other stages end at their next step of
    progress, and those that take long keep what they have done (see `unfinished`).

    Args:
        on_request: called once, when the first signal comes.
    """

    def __init__(self, on_request: Callable[[], None] = lambda: None) -> None:
        self.requested = False
        self._on_request = on_request

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        signals = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
        previous = {number: signal.signal(number, self._on_signal) for number in signals}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def checked(self, stage: str, progress: ProgressCallback, ranks: Ranks | None) -> ProgressCallback:
        """`progress`, which from now on also ends the stage when it was asked to stop.

        Args:
            ranks: all that report this progress, and must end at the same point; None if rank 0 works alone, and its
                error reaches the others (see `Ranks.on_main`).

        Raises (when called):
            StopRequestedError: naming the stage.
        """

        def report(share: float, text: str = "") -> None:
            asked = float(self.requested)
            if ranks.sum([asked]).item() if ranks else asked:
                raise StopRequestedError(f"stopped while {stage}; the stages before it are kept")
            progress(share, text)

        return report

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.requested:
            self.requested = True
            self._on_request()
