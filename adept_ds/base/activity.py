"""What a process that holds a lock is at, and how it ended, for those who look at its files (activity.json).

A thread writes it when something has changed, every `EVERY` seconds at most. The work itself is not touched by it: it
notes its progress in memory (`base.progress`), whoever asks. Where nothing can be written, nothing is.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from pydantic import NonNegativeFloat, PositiveInt

from adept_ds.base.errors import AdeptError, exit_code
from adept_ds.base.progress import Doing, open_bars, stage_now
from adept_ds.base.records import Record
from adept_ds.base.writer_lock import Holder, WriterLock

if TYPE_CHECKING:
    from typing import Self

EVERY = 5.0
"""Seconds."""


class Bar(Record):
    """Of progress, as it stood."""

    title: str
    text: str
    share: float
    left_seconds: NonNegativeFloat | None = None
    """Until it is over, if it goes on like this."""


class End(Record):
    """Of a command."""

    code: int
    """Exit code."""
    reason: str
    """The line that it ended with; empty when it is done."""
    at: str


class Activity(Record):
    """Times are of the writer's clock, ISO 8601 with its zone."""

    by: Holder
    ranks: PositiveInt
    stage: str
    """'train'; empty between stages."""
    bars: tuple[Bar, ...]
    """Of what is done, the innermost last."""
    moved: str
    """When that last went on."""
    told: str
    """When this was written."""
    ended: End | None = None

    @classmethod
    def remedy(cls) -> str:
        return "the next command in this directory writes it again"


class Teller:
    """Writes it as long as the block lasts, inside that of the lock, and at last how that ended.

    Args:
        ranks: that work together.
    """

    def __init__(self, path: Path, lock: WriterLock, ranks: int) -> None:
        self._path, self._lock, self._ranks = path, lock, ranks
        self._over, self._writing, self._told = threading.Event(), threading.Lock(), object()
        self._thread = threading.Thread(target=self._look, name="activity", daemon=True)

    def __enter__(self) -> Self:
        self._tell()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.end(exit_code(error) if error else 0, _words(error) if error else "")

    def end(self, code: int, reason: str) -> None:
        """From any thread; nothing is written afterwards."""
        with self._writing:
            if not self._over.is_set():
                self._over.set()
                self._write(End(code=code, reason=reason, at=_iso()))

    def _look(self) -> None:
        while not self._over.wait(EVERY):
            self._tell()

    def _tell(self) -> None:
        with self._writing:
            now = (stage_now(), open_bars())
            if not self._over.is_set() and now != self._told:
                self._told = now
                self._write()

    def _write(self, ended: End | None = None) -> None:
        by = self._lock.holder
        if by is None:  # somebody has taken this process for dead, and writes now
            return
        bars = open_bars()
        since = time.monotonic() - bars[-1].since if bars else 0.0
        found = Activity(
            by=by,
            ranks=self._ranks,
            stage=stage_now(),
            bars=tuple(map(_bar, bars)),
            moved=_iso(since),
            told=_iso(),
            ended=ended,
        )
        with suppress(AdeptError, OSError):
            found.save(self._path)


def _words(error: BaseException) -> str:
    """The line that the command says."""
    if isinstance(error, AdeptError):
        return str(error)
    return "interrupted" if isinstance(error, KeyboardInterrupt) else f"unexpected {type(error).__name__}: {error}"


def _bar(doing: Doing) -> Bar:
    return Bar(title=doing.title, text=doing.text, share=doing.share, left_seconds=doing.left)


def _iso(seconds_ago: float = 0.0) -> str:
    return (datetime.now().astimezone() - timedelta(seconds=seconds_ago)).isoformat(" ", "seconds")
