"""What the user sees, and where everybody else's output goes.

DeepSpeed, torch and transformers write to stdout and stderr of every rank. `capture_output` sends file descriptors 1
and 2 to a log file per rank and keeps the real terminal for this program's own words, on rank 0 only.
"""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.markup import escape

from adept_ds.base.files import writing
from adept_ds.base.progress import ProgressBar

_NON_TERMINAL_WIDTH = 120


class Terminal:
    """Rank 0's voice. On other ranks every method but `waiting` and `complain` does nothing.

    Args:
        stderr: the user's, as a descriptor.
    """

    def __init__(self, stream: TextIO | None, stderr: int = 2) -> None:
        self._silent, self._stderr = stream is None, stderr
        if isinstance(stream, io.TextIOWrapper):  # names of files need not be text, and terminals not know all of it
            stream.reconfigure(errors="backslashreplace")
        self.console = Console(
            file=stream, quiet=stream is None, highlight=False, emoji=False, force_terminal=_is_terminal(stream)
        )
        if not self.console.is_terminal:
            self.console.width = _NON_TERMINAL_WIDTH

    def say(self, message: str) -> None:
        """Text as it is: no markup, no line breaks of the terminal's width."""
        self.console.print(message, markup=False, soft_wrap=True)

    def complain(self, line: str) -> None:
        """On the user's stderr, from any thread of any rank."""
        os.write(self._stderr, f"adept: {line}\n".encode(errors="backslashreplace"))

    def mute(self) -> None:
        """From now on only what is asked for: no word of stages and progress, for output that a program reads."""
        self._silent = True

    def stage(self, name: str, detail: str = "") -> None:
        """What a stage does or found, behind its name; `detail` may carry rich markup."""
        if not self._silent:
            self.console.print(f"[bold cyan]{name:<8}[/] {detail}", soft_wrap=True)

    def waiting(self, name: str, text: str) -> None:
        """Who or what is waited for, as a word of a stage; where there is none to say it, on stderr."""
        if self._silent:
            self.complain(text)
        else:
            self.stage(name, escape(text))

    @contextmanager
    def progress(self, title: str, *, together: bool = False) -> Iterator[ProgressBar]:
        """A bar with time left; calling it with a share of the work moves it.

        Args:
            together: see `ProgressBar`.
        """
        bar = ProgressBar(title, self.console, self._silent, together)
        try:
            yield bar
        finally:
            bar.close()


def _is_terminal(stream: TextIO | None) -> bool:
    """Whether somebody watches; not whether colours are wanted (FORCE_COLOR), which rich alone would take for that.

    Open MPI gives each rank a terminal of its own, whatever it does itself with what the rank writes there.
    """
    return stream is not None and stream.isatty() and "OMPI_COMM_WORLD_RANK" not in os.environ


class _Forgiving(io.FileIO):
    """Takes what the disk does not take any more: no run ends for a line in its log."""

    def write(self, content: Any) -> int:
        try:
            return super().write(content) or 0
        except OSError:
            return len(content)


class OutputCapture:
    """The diverted output of one rank."""

    def __init__(self, log: Path, is_main: bool) -> None:
        with writing(log):
            log.parent.mkdir(parents=True, exist_ok=True)
            self._file = log.open("ab")
        sys.stdout.flush()
        sys.stderr.flush()
        self._saved = (os.dup(1), os.dup(2))
        os.dup2(self._file.fileno(), 1)
        os.dup2(self._file.fileno(), 2)
        self._streams = (sys.stdout, sys.stderr)
        sys.stdout, sys.stderr = (
            io.TextIOWrapper(
                io.BufferedWriter(_Forgiving(descriptor, "wb", closefd=False)),
                encoding="utf-8",
                errors="backslashreplace",
                line_buffering=True,
            )
            for descriptor in (1, 2)
        )
        self._terminal_stream = os.fdopen(os.dup(self._saved[0]), "w", buffering=1) if is_main else None
        self.terminal = Terminal(self._terminal_stream, self._saved[1])

    def restore(self) -> None:
        """Give stdout and stderr back to the process."""
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = self._streams
        for descriptor, saved in zip((1, 2), self._saved, strict=True):
            os.dup2(saved, descriptor)
            os.close(saved)
        if self._terminal_stream is not None:
            self._terminal_stream.close()
        self._file.close()


@contextmanager
def capture_output(log: Path, *, is_main: bool) -> Iterator[Terminal]:
    """Divert this process's stdout and stderr (and those of its libraries and children) to `log`."""
    warnings.simplefilter("default")
    capture = OutputCapture(log, is_main)
    try:
        yield capture.terminal
    finally:
        capture.restore()
