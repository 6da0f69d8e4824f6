"""Progress of long work: a bar on a terminal, a line every so often elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

ProgressCallback = Callable[[float, str], None]
"""What long work calls with the share that is done (0 to 1) and a few words."""

_NON_TERMINAL_SECONDS = 15.0
"""Without a terminal (a log file, CI), progress is a line every so often."""


class Doing(NamedTuple):
    """What a process is at."""

    words: str
    """'training (last at step 5/7)'"""
    since: float
    """Monotonic seconds: when it last went on."""
    together: bool
    """All ranks do it, and none goes on without the others."""
    title: str = ""
    text: str = ""
    """The few words beside the bar."""
    share: float = 0.0
    """Of the work that is done, 0 to 1."""
    left: float | None = None
    """Seconds until it is over, by its pace since it was first called; None: not known yet."""


def what_is_done() -> Doing:
    """Now, or before it ended, for whoever asks from another thread."""
    return _DOING[-1]


def open_bars() -> list[Doing]:
    """What is done now, the innermost last."""
    return _DOING[1:]


def stage_now() -> str:
    """The stage that this process is in: 'train'; empty between stages."""
    return _STAGES[-1] if _STAGES else ""


@contextmanager
def stage(name: str) -> Iterator[None]:
    """What is done inside belongs to this stage of a run."""
    _STAGES.append(name)
    try:
        yield
    finally:
        _STAGES.pop()


_STAGES: list[str] = []

_DOING = [Doing("starting", 0.0, False)]
"""Of the bars that are open, the innermost last. The first is of none: what was done before, which is over."""


class ProgressBar:
    """A rich bar on a terminal, occasional lines elsewhere, nothing on other ranks than 0.

    Args:
        together: all ranks report this progress, and none goes on without the others.
    """

    def __init__(self, title: str, console: Console, silent: bool, together: bool = False) -> None:
        self._title, self._together = title, together
        self._depth = len(_DOING)
        _DOING.append(Doing(title, time.monotonic(), together, title))
        self._first: tuple[float, float] | None = None
        """When it was first called, and with which share."""
        self._console = console
        self._silent = silent
        self._last_line = time.monotonic()
        self._bar: Progress | None = None
        if console.is_terminal and not silent:
            self._bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=28),
                TextColumn("{task.percentage:>3.0f}%"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("[dim]{task.fields[text]}"),
                console=console,
                transient=True,
            )
            self._task = self._bar.add_task(title, total=1.0, text="")
            self._bar.start()

    def __call__(self, share: float, text: str = "") -> None:
        """Move to `share` (0 to 1) of the work, with a few words beside the bar."""
        self._note(share, text)
        if self._silent:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=share, text=text)
        elif time.monotonic() - self._last_line >= _NON_TERMINAL_SECONDS:
            self._last_line = time.monotonic()
            self._console.print(f"  {self._title} {share:4.0%}  {text}")

    def close(self) -> None:
        words = _DOING[-1].words
        del _DOING[self._depth :]
        if self._depth == 1:
            _DOING[0] = _DOING[0]._replace(words=words)
        _DOING[-1] = _DOING[-1]._replace(since=time.monotonic())
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _note(self, share: float, text: str) -> None:
        where, _, _ = text.partition("  ")
        words = f"{self._title} (last at {where})" if where else self._title
        now = time.monotonic()
        self._first = self._first or (now, share)
        begun, before = self._first
        left = (now - begun) / (share - before) * (1 - share) if share > before else None
        _DOING[self._depth :] = [Doing(words, now, self._together, self._title, text, share, left)]


class Meter:
    """Turns bytes of several works into one progress."""

    def __init__(self, num_bytes: int, progress: ProgressCallback | None) -> None:
        """Args: num_bytes: all that will be read or written, once for each time."""
        self._total = max(1, num_bytes)
        self._done = 0
        self._progress = progress

    def advance(self, num_bytes: int, text: str = "") -> None:
        self._done += num_bytes
        if self._progress:
            self._progress(min(1.0, self._done / self._total), text)

    def rest(self) -> ProgressCallback:
        """For work that counts in shares of its own: from here to the end."""
        start, progress = min(1.0, self._done / self._total), self._progress

        def advance(share: float, text: str) -> None:
            if progress:
                progress(start + share * (1 - start), text)

        return advance


def by_batch(report: ProgressCallback) -> Callable[[int, int], None]:
    """The same, called with the number of a batch that begins, and how many there are."""
    return lambda number, count: report(number / count, f"batch {number + 1} of {count}")
